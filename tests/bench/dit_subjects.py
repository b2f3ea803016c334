"""The models that `tests/bench/dit.py` measures: of equal width, depth, tokens and text. Not run alone."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.dit_video import DiTConfig, VideoDiT
from kinoflow.dit_video.mmdit import MMDiT, MMDiTConfig

HEAD = 128
TEXT_WIDTH = 4096
POOLED = 768
PICTURE_HEAD, PICTURE_POOLED = 64, 2048
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all models share. `tokens` = 4 x side², as one clip of four latent frames."""

    width: int = 1024
    depth: int = 3
    side: int = 16
    text: int = 128
    dtype: str = "bf16"
    compile: int = 0
    repeats: int = 5
    rounds: int = 3
    threads: int = torch.get_num_threads()

    @property
    def tokens(self) -> int:
        return 4 * self.side**2


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, a call of its forward, and the containers of its repeated blocks (compiled each alone)."""

    model: nn.Module
    call: Callable[[], Tensor]
    blocks: tuple[str, ...]


def hidden_width(width: int, ratio: float) -> int:
    """A feed-forward width near the ratio, a multiple of 64 as in every released model."""
    return 64 * round(width * ratio / 64)


def kinoflow(s: Settings) -> Subject:
    config = DiTConfig(width=s.width, depth=s.depth, heads=s.width // HEAD, ffn=hidden_width(s.width, 8 / 3),
                       text_widths=(TEXT_WIDTH,), max_tokens=(4, s.side, s.side))  # fmt: skip
    model = VideoDiT(config)
    model.init_weights()
    shake(model)
    model.to(DTYPES[s.dtype])
    latent, hidden = inputs(s, 16), text(s)
    embedding = TextEmbedding(hidden=hidden, mask=mask(s))
    return Subject(
        model=model, call=lambda: model(latent, torch.full((1,), 0.5), (embedding,)), blocks=("blocks",)
    )


@torch.no_grad()
def shake(model: nn.Module) -> None:
    for parameter in model.parameters():  # closed gates would carry no gradient
        parameter.add_(torch.randn_like(parameter), alpha=0.02)


def wan(s: Settings) -> Subject:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=s.width // HEAD, attention_head_dim=HEAD, ffn_dim=hidden_width(s.width, 2.7),
        num_layers=s.depth, text_dim=TEXT_WIDTH,
    ).to(DTYPES[s.dtype])  # fmt: skip
    latent, hidden, step = inputs(s, 16), text(s), torch.tensor([500])
    return Subject(
        model=model, call=lambda: model(latent, step, hidden, return_dict=False)[0], blocks=("blocks",)
    )


def hunyuan(s: Settings) -> Subject:
    """A third of the blocks has two streams, as in the released 20 + 40."""
    from diffusers import HunyuanVideoTransformer3DModel

    double = max(s.depth // 3, 1)
    model = HunyuanVideoTransformer3DModel(
        num_attention_heads=s.width // HEAD, attention_head_dim=HEAD, num_layers=double,
        num_single_layers=s.depth - double, text_embed_dim=TEXT_WIDTH, pooled_projection_dim=POOLED,
    ).to(DTYPES[s.dtype])  # fmt: skip
    latent, hidden, real, step = inputs(s, 16), text(s), mask(s), torch.tensor([500])
    pooled, guidance = torch.randn(1, POOLED).to(hidden), torch.tensor([6000.0]).to(hidden)
    return Subject(
        model=model,
        call=lambda: model(latent, step, hidden, real, pooled, guidance, return_dict=False)[0],
        blocks=("transformer_blocks", "single_transformer_blocks"),
    )


def cogvideox(s: Settings) -> Subject:
    """The 5B's layout: rotary positions, one stream."""
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    model = CogVideoXTransformer3DModel(
        num_attention_heads=s.width // HEAD, attention_head_dim=HEAD, num_layers=s.depth,
        text_embed_dim=TEXT_WIDTH, max_text_seq_length=s.text, use_rotary_positional_embeddings=True,
        sample_width=2 * s.side, sample_height=2 * s.side, sample_frames=13,
    ).to(DTYPES[s.dtype])  # fmt: skip
    latent, hidden, step = inputs(s, 16).transpose(1, 2), text(s), torch.tensor([500])
    rotary = get_3d_rotary_pos_embed(HEAD, ((0, 0), (s.side, s.side)), (s.side, s.side), 4)
    return Subject(
        model=model,
        call=lambda: model(latent, hidden, step, image_rotary_emb=rotary, return_dict=False)[0],
        blocks=("transformer_blocks",),
    )


def mochi(s: Settings) -> Subject:
    from diffusers import MochiTransformer3DModel

    model = MochiTransformer3DModel(
        num_attention_heads=s.width // HEAD, attention_head_dim=HEAD, num_layers=s.depth,
        pooled_projection_dim=s.width // 2, text_embed_dim=TEXT_WIDTH,
    ).to(DTYPES[s.dtype])  # fmt: skip
    latent, hidden, real, step = inputs(s, 12), text(s), mask(s), torch.tensor([500])
    return Subject(
        model=model,
        call=lambda: model(latent, hidden, step, real, return_dict=False)[0],
        blocks=("transformer_blocks",),
    )


def ltx(s: Settings) -> Subject:
    """Takes tokens, not latents: its autoencoder has folded the patches in."""
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        num_attention_heads=s.width // HEAD, attention_head_dim=HEAD, cross_attention_dim=s.width,
        num_layers=s.depth, caption_channels=TEXT_WIDTH,
    ).to(DTYPES[s.dtype])  # fmt: skip
    dtype = DTYPES[s.dtype]
    tokens, hidden, real, step = (
        torch.randn(1, s.tokens, 128).to(dtype),
        text(s),
        mask(s),
        torch.tensor([500]),
    )
    return Subject(
        model=model,
        call=lambda: model(tokens, hidden, step, real, 4, s.side, s.side, return_dict=False)[0],
        blocks=("transformer_blocks",),
    )


def mmdit(s: Settings) -> Subject:
    """Stable Diffusion 3.5's kind: norms of queries and keys."""
    config = MMDiTConfig(width=s.width, depth=s.depth, heads=s.width // PICTURE_HEAD, max_tokens=2 * s.side,
                         text_widths=(TEXT_WIDTH,), pooled_width=PICTURE_POOLED)  # fmt: skip
    model = MMDiT(config)
    model.init_weights()
    shake(model)
    model.to(DTYPES[s.dtype])
    latent, embedding = picture(s), TextEmbedding(hidden=text(s), mask=mask(s), pooled=pooled(s))
    return Subject(
        model=model,
        call=lambda: model(latent[:, :, None], torch.full((1,), 0.5), (embedding,)),
        blocks=("blocks",),
    )


def sd3(s: Settings) -> Subject:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=4 * s.side, num_layers=s.depth, attention_head_dim=PICTURE_HEAD,
        num_attention_heads=s.width // PICTURE_HEAD, joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=s.width, pooled_projection_dim=PICTURE_POOLED, pos_embed_max_size=2 * s.side,
        qk_norm="rms_norm",
    ).to(DTYPES[s.dtype])  # fmt: skip
    latent, hidden, vector, step = picture(s), text(s), pooled(s), torch.tensor([500.0])
    return Subject(
        model=model,
        call=lambda: model(latent, hidden, vector, step, return_dict=False)[0],
        blocks=("transformer_blocks",),
    )


MODELS = {"kinoflow": kinoflow, "wan": wan, "hunyuanvideo": hunyuan, "cogvideox": cogvideox, "mochi": mochi,
          "ltx": ltx}  # fmt: skip
PAIR = {"mmdit": mmdit, "sd3": sd3}


def inputs(s: Settings, channels: int) -> Tensor:
    """A latent that patches of (1, 2, 2) turn into `tokens` tokens."""
    return torch.randn(1, channels, 4, 2 * s.side, 2 * s.side).to(DTYPES[s.dtype])


def picture(s: Settings) -> Tensor:
    """A latent of as many tokens: a square of 2 side x 2 side."""
    return torch.randn(1, 16, 4 * s.side, 4 * s.side).to(DTYPES[s.dtype])


def pooled(s: Settings) -> Tensor:
    return torch.randn(1, PICTURE_POOLED).to(DTYPES[s.dtype])


def text(s: Settings) -> Tensor:
    return torch.randn(1, s.text, TEXT_WIDTH).to(DTYPES[s.dtype])


def mask(s: Settings) -> Tensor:
    return torch.ones(1, s.text, dtype=torch.bool)
