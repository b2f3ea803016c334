"""What a run trains, seen from a cluster: clips, parameters, FLOPs and activations. No memory is taken."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from kinoflow.configs.errors import UserError
from kinoflow.data.clips.buckets import Bucket, parse
from kinoflow.dit_video.video_dit import DiTConfig, VideoDiT
from kinoflow.tae.model.tae import TAE
from kinoflow.tae.training.discriminator import PatchDiscriminator
from kinoflow.train.plan.config import PlanInputs
from kinoflow.train.plan.flops import Flops, dit_flops, tae_flops
from kinoflow.train.plan.memory import Activations, Slice, dit_activations, tae_activations
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.optimizer import parameter_groups


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One bucket: its pixels, the grid of its tokens (or latent cells), its share of the steps."""

    name: str
    frames: int
    height: int
    width: int
    grid: tuple[int, int, int]
    share: float
    batch_size: int

    @property
    def tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w


class Workload(Protocol):
    """One of the models that a cluster is rented for."""

    clips: tuple[Clip, ...]
    parameters: dict[str, int]
    sizes: tuple[tuple[int, ...], ...]
    """Elements of every parameter, a tuple for each optimizer, in its order."""
    depth: int
    """Blocks that can be computed again on the way back; 0 where none can."""
    splits: tuple[int, ...]
    """Numbers of GPUs that can share a clip."""
    fuses_attention: bool
    """Whether its kernel computes q kᵀ once more on the way back."""

    def flops(self, clip: Clip) -> dict[str, Flops]: ...

    def activations(self, clip: Clip, inputs: PlanInputs) -> Activations: ...

    def problems(self) -> list[str]:
        """What would stop the run at its first step, with the remedy."""
        ...


class DiTWorkload:
    """The transformer on latents of the buckets; `text_tokens` are those of each encoder, padded."""

    def __init__(self, config: RunConfig, text_tokens: Sequence[int]) -> None:
        if config.lora.rank:
            raise UserError("lora.rank: the plan counts a training of all weights; set lora.rank=0")
        self.config: DiTConfig = config.dit
        self.depth, self.splits = config.dit.depth, divisors(config.dit.heads)
        self.fuses_attention = config.dit.attention != "math"
        self.text_tokens = tuple(text_tokens)
        with torch.device("meta"):
            # A kernel has no parameters, and that of the cluster may not run here.
            model = VideoDiT(replace(config.dit, attention="sdpa"))
        self.parameters = count_parts(model)
        self.sizes = (optimizer_sizes(model),)
        self.clips = read_clips(config, config.dit.patch_size)

    def flops(self, clip: Clip) -> dict[str, Flops]:
        return dit_flops(self.config, clip.tokens, self.text_tokens)

    def activations(self, clip: Clip, inputs: PlanInputs) -> Activations:
        piece = Slice(
            tokens=clip.tokens,
            text_tokens=self.text_tokens,
            clips=inputs.micro_batch(clip.batch_size),
            precision=inputs.precision,
            sequence=inputs.sequence,
            checkpoint_every=inputs.checkpoint_every,
        )
        return dit_activations(self.config, piece)

    def problems(self) -> list[str]:
        problems = []
        if self.config.attention == "math":
            problems.append("dit.attention: math keeps scores that the plan leaves out; take sdpa")
        for clip in self.clips:
            axes = zip(("time", "height", "width"), clip.grid, self.config.max_tokens, strict=True)
            problems += [
                f"data.buckets: {clip.name} has {size} tokens along {axis} and the position table ends at "
                f"{limit}; raise dit.max_tokens"
                for axis, size, limit in axes
                if size > limit
            ]
        return problems


class TAEWorkload:
    """The autoencoder, with its discriminator where the adversarial term has a weight.

    FLOPs and activations are the autoencoder's own: the perceptual network and the discriminator run beside
    it and are left out, the discriminator's parameters and states are not.
    """

    depth = 0
    splits: tuple[int, ...] = (1,)
    fuses_attention = False

    def __init__(self, config: RunConfig) -> None:
        self.config = config.tae
        with torch.device("meta"):
            modules: list[nn.Module] = [TAE(config.tae)]
            if config.loss.adversarial > 0:
                modules.append(PatchDiscriminator(config.discriminator))
        self.parameters = count_parts(modules[0])
        if len(modules) > 1:
            self.parameters["discriminator"] = sum(p.numel() for p in modules[1].parameters())
        self.sizes = tuple(optimizer_sizes(module) for module in modules)
        self.clips = read_clips(config, (1, 1, 1))

    def flops(self, clip: Clip) -> dict[str, Flops]:
        return tae_flops(self.config, clip.frames, clip.height, clip.width)

    def activations(self, clip: Clip, inputs: PlanInputs) -> Activations:
        saved = tae_activations(self.config, (clip.frames, clip.height, clip.width), inputs.precision)
        return Activations(saved=inputs.micro_batch(clip.batch_size) * saved, workspace=0.0)

    def problems(self) -> list[str]:
        return []


def divisors(number: int) -> tuple[int, ...]:
    """From 1 to the number itself."""
    return tuple(size for size in range(1, number + 1) if number % size == 0)


def count_parts(model: nn.Module) -> dict[str, int]:
    """Parameters by the first name of the state dict, those of repeated blocks by "blocks.<layer>"."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        first, *rest = name.split(".")
        part = f"{first}.{rest[1]}" if first == "blocks" else first
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def optimizer_sizes(module: nn.Module) -> tuple[int, ...]:
    """Elements of every parameter, in the order in which ZeRO joins and cuts them."""
    return tuple(p.numel() for group in parameter_groups(module, 0.1) for p in group["params"])


def _latent_frames(config: RunConfig, bucket: Bucket, frames: int) -> int:
    """An upsampler has a latent for each frame, and trains on windows of them."""
    if not config.known.upsample:
        return frames
    return min(bucket.frames, config.known.window or bucket.frames)


def read_clips(config: RunConfig, patch: tuple[int, int, int]) -> tuple[Clip, ...]:
    """The buckets of a run, their shares summing to one.

    Raises:
        UserError: no bucket, one that cannot be read, or that autoencoder or patches do not divide.
    """
    if config.data.buckets is None:
        raise UserError("data.buckets: the plan needs the clips, for example data.buckets=[16x64x64@16]")
    clips = []
    for name in config.data.buckets:
        try:
            bucket = parse(name)
            latent = config.tae.latent_shape(bucket.frames, bucket.height, bucket.width)
        except (UserError, ValueError) as error:
            raise UserError(f"data.buckets: {name}: {error}") from None
        sides = (_latent_frames(config, bucket, latent.frames), latent.height, latent.width)
        if any(side % size for side, size in zip(sides, patch, strict=True)):
            raise UserError(f"data.buckets: {name} is a latent of {sides} and the patch_size is {patch}; "
                              "take a size that it divides")  # fmt: skip
        t, h, w = (side // size for side, size in zip(sides, patch, strict=True))
        clip = Clip(
            name=name,
            frames=bucket.frames,
            height=bucket.height,
            width=bucket.width,
            grid=(t, h, w),
            share=bucket.weight,
            batch_size=bucket.batch_size or config.data.batch_size,
        )
        clips.append(clip)
    shares = sum(clip.share for clip in clips)
    if shares <= 0:
        raise UserError("data.buckets: no bucket has a weight above 0; give at least one")
    return tuple(replace(clip, share=clip.share / shares) for clip in clips if clip.share > 0)
