"""MMDiT in a plan: FLOPs, activations and parameters of the two-stream backbone, and its text encoders.

Letters of the formulas: L image tokens, T text tokens, d width, p values of a patch, e width of the states.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from kinoflow.configs.errors import UserError
from kinoflow.dit_video.mmdit import MMDiT, MMDiTConfig
from kinoflow.train.plan.config import PlanInputs
from kinoflow.train.plan.flops import Flops, mmdit_flops
from kinoflow.train.plan.memory import HIGH, Activations, Slice
from kinoflow.train.plan.text import EncoderSize, clip_parameters, t5_parameters
from kinoflow.train.plan.workload import Clip, count_parts, optimizer_sizes, read_clips
from kinoflow.train.run.config import RunConfig

# Of published config.json files; both towers project to their own width.
_CLIP_L = {"intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 49408}
_CLIP_G = {"intermediate_size": 5120, "num_hidden_layers": 32, "vocab_size": 49408}
_T5_XXL = {"d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128}
_WIDTHS = {"clip_l": 768, "clip_g": 1280, "t5": 4096}
_TOKENS = {"clip_l": 77, "clip_g": 77, "t5": 256}  # conditioning.clip_t5 fills them with padding


def released_encoders(config: MMDiTConfig) -> tuple[EncoderSize, ...]:
    """The encoders of Stable Diffusion 3, where the backbone takes their states; none where it does not."""
    if config.text_widths != (_WIDTHS["t5"],) or config.pooled_width != 768 + 1280:
        return ()
    shapes = {"clip_l": ("openai/clip-vit-large-patch14", _CLIP_L),
              "clip_g": ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", _CLIP_G),
              "t5": ("google/t5-v1_1-xxl", _T5_XXL)}  # fmt: skip
    found = []
    for name, (source, shape) in shapes.items():
        width, tokens = _WIDTHS[name], _TOKENS[name]
        count = t5_parameters if name == "t5" else clip_parameters
        projection = 0 if name == "t5" else width * width
        parameters = count(width, shape, tokens) + projection
        found.append(EncoderSize(name=name, source=source, parameters=parameters, width=width, tokens=tokens))
    return tuple(found)


class MMDiTWorkload:
    """The two-stream backbone on latents of single frames; `text_tokens` are those of each of its texts."""

    fuses_attention = True
    splits: tuple[int, ...] = (1,)

    def __init__(self, config: RunConfig, text_tokens: Sequence[int]) -> None:
        self.config = config.mmdit
        self.depth = config.mmdit.depth
        self.text_tokens = tuple(text_tokens)
        with torch.device("meta"):
            # A kernel has no parameters, and that of the cluster may not run here.
            model = MMDiT(replace(config.mmdit, attention="sdpa"))
        self.parameters = count_parts(model)
        self.sizes = (optimizer_sizes(model),)
        self.clips = read_clips(config, (1, config.mmdit.patch, config.mmdit.patch))
        for clip in self.clips:
            if clip.frames != 1:
                raise UserError(f"data.buckets: {clip.name} is a clip, and an mmdit makes pictures; take "
                                "buckets of one frame")  # fmt: skip

    def flops(self, clip: Clip) -> dict[str, Flops]:
        return mmdit_flops(self.config, clip.tokens, self.text_tokens)

    def activations(self, clip: Clip, inputs: PlanInputs) -> Activations:
        piece = Slice(
            tokens=clip.tokens,
            text_tokens=self.text_tokens,
            clips=inputs.micro_batch(clip.batch_size),
            precision=inputs.precision,
            sequence=1,
            checkpoint_every=inputs.checkpoint_every,
        )
        return mmdit_activations(self.config, piece)

    def problems(self) -> list[str]:
        most = self.config.max_tokens
        return [
            f"data.buckets: {clip.name} has {max(clip.grid)} tokens along a side and the position tables end "
            f"at {most}; raise mmdit.max_tokens"
            for clip in self.clips
            if max(clip.grid) > most
        ]


def mmdit_activations(config: MMDiTConfig, piece: Slice) -> Activations:
    """Activations of MMDiT, counted tensor by tensor: those of `dit_video.joint` with a fused kernel.

    Checkpointing keeps the inputs of each block and, while its backward pass runs, that block's activations.
    """
    d, n, text = config.width, config.depth, piece.clips * sum(piece.text_tokens)
    again = set(range(0, n, piece.checkpoint_every)) if piece.checkpoint_every else set()
    kept = 0.0
    for index in range(n):
        boundary = piece.low * (piece.length + text) * d
        kept += boundary if index in again else _block_bytes(config, piece, index)
    gradients = piece.low * piece.length * (2 * d + 4 * d)
    widest = max((_block_bytes(config, piece, index) for index in again), default=0.0)
    return Activations(saved=kept + _outside_bytes(config, piece), workspace=gradients + widest)


def _block_bytes(config: MMDiTConfig, piece: Slice, index: int) -> float:
    """Bytes of one block: every tensor that autograd saves, of the image and of the text."""
    d, text = config.width, piece.clips * sum(piece.text_tokens)
    last, second = index == config.depth - 1, index in config.dual_attention_layers
    norms, several = 2 if config.qk_norm else 0, int(piece.clips > 1)
    widths = {
        "residual, modulated, normalized": (2 + several) * d,
        "normalized queries and keys": norms * d,
        "queries, keys, values, joined": 3 * d,
        "attended, its part, projected": (2 + several) * d,
        "feed-forward: residual, modulated, normalized": (2 + several) * d,
        "feed-forward: hidden, activated": 8 * d,
        "feed-forward: projected": d,
    }
    whole = sum(widths.values())
    # Text that ends is looked at: it asks nothing.
    ended = (2 + several) * d + norms // 2 * d + 2 * d
    # Normalized, modulated, queries, keys, values, attended, projected.
    own = (several + 1 + 3 + norms + 2) * d if second else 0
    statistics = HIGH * (piece.length + text) * (4 + config.heads * (1 + norms))
    return piece.low * (piece.length * (whole + own) + text * (ended if last else whole)) + statistics


def _outside_bytes(config: MMDiTConfig, piece: Slice) -> float:
    """Bytes around the blocks: patches in and out, head, text."""
    d, patch = config.width, config.latent_channels * config.patch**2
    whole = piece.clips * piece.tokens
    compared = HIGH * whole * 2 * patch  # prediction and target, as the loss takes them
    states = sum(tokens * width for tokens, width in zip(piece.text_tokens, config.text_widths, strict=True))
    head = (2 + (piece.clips > 1)) * d  # residual, modulated, normalized
    return piece.low * (whole * (patch + head) + piece.clips * states) + compared
