"""From prompts or labels to frames: conditions, noise, the flow, the autoencoder's decoder.

Each prompt runs on its own. Batched kernels round differently at each batch size, so only this gives the
same prompt and seed the same bytes whatever else is asked for; `pipeline` makes several at once in threads.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kinoflow.conditioning.embedding import Condition
from kinoflow.conditioning.labels import Labels
from kinoflow.configs.errors import UserError
from kinoflow.dit_video.flow.known import Known
from kinoflow.dit_video.flow.matching import Objective, data_from_velocity
from kinoflow.dit_video.flow.paths import GaussianPath, cond_ot, cosine
from kinoflow.sample import schedule as grids
from kinoflow.sample import solver as solvers
from kinoflow.sample.cache import Passes, watched
from kinoflow.sample.guidance import PLAIN, Guidance, VelocityModel, guided_velocity
from kinoflow.sample.known import Reader, Windows, held
from kinoflow.sample.objective import as_velocity
from kinoflow.sample.solver import VelocityFn
from kinoflow.tae.model.config import LatentShape
from kinoflow.tae.model.pixels import Pixels, to_bytes
from kinoflow.tae.model.tae import TAE
from kinoflow.tae.tiles.tiled import DEFAULT_MEMORY, TiledTAE

ScheduleName = Literal["linear", "linear-quadratic", "shifted", "stable-diffusion-3"]
SolverName = Literal["euler", "midpoint", "heun", "sde"]
PathName = Literal["cond_ot", "cosine"]
_EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2, "sde": 1}


@runtime_checkable
class Encoder(Protocol):
    """What sampling asks of a PromptEncoder or, where prompts are names of classes, of a LabelEncoder."""

    def __call__(self, prompts: list[str], fps: Fraction) -> Condition: ...

    def null(self) -> Condition: ...


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the ODE, or with `solver` "sde" the SDE, is solved.

    Raises:
        UserError: a value outside its range.
    """

    guidance_scale: float = 4.0
    """Weight of the prompt or label, 0 to 100; 1 is the plain model, 0 the unconditional one."""
    guidance: Guidance = PLAIN
    """How that weight is used."""
    cache: float = 0.0
    """How far a velocity may be off that is taken from an earlier step, 0 to 1: 0 computes every one."""
    num_steps: int = 50
    """Intervals of the time grid."""
    schedule: ScheduleName = "linear-quadratic"
    """How the intervals lie."""
    shift: float = 3.0
    """Of the schedules shifted and stable-diffusion-3: above 1 nearer to the noise."""
    solver: SolverName = "euler"
    """How an interval is crossed."""
    diffusion: float = 1.0
    """Noise of the SDE, in units of √β; 0 to 10."""
    path: PathName = "cond_ot"
    """What the model was trained on."""
    objective: Objective = "velocity"
    """What the model was trained to give."""

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_scale <= 100:
            raise UserError(f"guidance_scale: {self.guidance_scale} is not in 0..100; try 1 to 8")
        if not 0 <= self.cache <= 1:
            raise UserError(f"cache: {self.cache} is not in 0..1; try 0.05")
        if not 0 <= self.diffusion <= 10:
            raise UserError(f"diffusion: {self.diffusion} is not in 0..10; try 0.5 to 1")
        if not 0 < self.shift <= 100:
            raise UserError(f"shift: {self.shift} is not above 0 and up to 100; try 1 to 3")
        if self.zero_steps >= len(self.times()) - 1:
            raise UserError(
                f"num_steps: {self.num_steps} are too few for guidance_kind zero-star, of which the first "
                f"{self.zero_steps} stand still; use more"
            )

    def times(self) -> Float[Tensor, " points"]:
        """The time grid, from 0 (noise) to 1 (data)."""
        if self.is_shifted:
            grid = grids.shifted if self.schedule == "shifted" else grids.stable_diffusion_3
            return grid(self.num_steps, self.shift)
        return (grids.linear if self.schedule == "linear" else grids.linear_quadratic)(self.num_steps)

    @property
    def is_shifted(self) -> bool:
        """Whether `shift` has an effect."""
        return self.schedule in ("shifted", "stable-diffusion-3")

    @property
    def zero_steps(self) -> int:
        """First intervals of the grid that stand still, and cost nothing."""
        return self.guidance.zero_steps if self.guidance.kind == "zero-star" and self.is_guided else 0

    @property
    def is_guided(self) -> bool:
        """Whether `guidance` has an effect."""
        return self.guidance_scale != 1

    @property
    def num_evaluations(self) -> int:
        """Velocities of one sample, computed or from the cache."""
        return (self.num_steps - self.zero_steps) * _EVALUATIONS[self.solver]


def generate(
    backbone: VelocityModel,
    tae: TAE | Pixels,
    encoder: Encoder,
    prompts: Sequence[str],
    *,
    frames: int,
    height: int,
    width: int,
    fps: Fraction,
    guidance_scale: float = 4.0,
    guidance: Guidance = PLAIN,
    cache: float = 0.0,
    num_steps: int = 50,
    seeds: Sequence[int],
    negative: str | None = None,
    schedule: ScheduleName = "linear-quadratic",
    shift: float = 3.0,
    solver: SolverName = "euler",
    diffusion: float = 1.0,
    path: PathName = "cond_ot",
    objective: Objective = "velocity",
    memory: int = DEFAULT_MEMORY,
    progress: Callable[[], None] | None = None,
) -> UInt8[Tensor, "b frames height width 3"]:
    """Clips of `prompts` (or of classes, by name or number), RGB 0..255 on the CPU, one seed each.

    The same (prompt, seed) gives the same frames in any list (on the same number of threads). `negative`
    stands in for the null prompt of the guidance; decoding takes up to `memory` bytes; `progress` is called
    after each velocity.

    Raises:
        UserError: not one seed for each prompt, a setting outside its range, or a `negative` without effect.
        ValueError: a clip that the autoencoder or the transformer cannot make.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise UserError(f"seeds: {len(seeds)} for {len(prompts)} prompts; give one for each prompt")
    check_negative(negative, guidance_scale)
    sampling = Sampling(
        guidance_scale=guidance_scale, guidance=guidance, cache=cache, num_steps=num_steps, schedule=schedule,
        shift=shift, solver=solver, diffusion=diffusion, path=path, objective=objective,
    )  # fmt: skip
    shape = tae.config.latent_shape(frames, height, width)
    null = null_condition(encoder, negative, fps)
    clips = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        told = encoder([prompt], fps)
        latent = sample_latent(backbone, told, null, shape, seed=seed, sampling=sampling, progress=progress)
        clips.append(decode_latent(tae, latent, frames, memory))
    return torch.cat(clips)


def check_negative(negative: str | None, guidance_scale: float) -> None:
    """Refuse a negative prompt that steers nothing.

    Raises:
        UserError: it is empty, or the guidance is the plain model's.
    """
    if negative is None:
        return
    if not negative.strip():
        raise UserError("negative: empty; say what to steer away from, or leave it out")
    if guidance_scale == 1:
        raise UserError("negative: guidance_scale 1 steers away from nothing; use more, or leave it out")


def check_seed(seed: int) -> None:
    """Refuse a seed that PyTorch's generators do not take.

    Raises:
        UserError: it is not in 0 .. 2^63 - 1.
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"seed: {seed} is not in 0 .. 2^63 - 1")


def null_condition(encoder: Encoder, negative: str | None, fps: Fraction) -> Condition:
    """What guidance steers away from: the negative prompt or class, or ∅ where there is none."""
    return encoder.null() if negative is None else encoder([negative], fps)


@torch.no_grad()
def sample_latent(
    backbone: VelocityModel,
    condition: Condition,
    null: Condition,
    shape: LatentShape,
    *,
    seed: int,
    sampling: Sampling,
    progress: Callable[[], None] | None = None,
    passes: Passes | None = None,
    known: Known | None = None,
    windows: Windows | None = None,
    lean: bool = True,
    seen: Callable[[Float[Tensor, "1 c t h w"]], None] | None = None,
) -> Float[Tensor, "1 c t h w"]:
    """Solve the flow from the noise of `seed` (t = 0) to a normalized latent (t = 1), in fp32.

    `condition` holds one prompt or label. The noise is drawn on the CPU, the same for every device. `passes`
    is added to. What is `known` of the clip is put in at each step, where it is kept; a clip that is longer
    than `windows` is made in as many. Places that are shown `lean` on what is shown, or know of it alone.
    `seen` is shown after each velocity where the flow seems to lead.
    """
    like = torch.empty(0)
    if isinstance(backbone, torch.nn.Module):
        like = next(backbone.parameters(), like)
    path = {"cond_ot": cond_ot, "cosine": cosine}[sampling.path]
    read = backbone if known is None and windows is None else Reader(backbone, known, windows)
    conditions = _like(condition, like), _like(null, like)
    count = Passes() if passes is None else passes
    guided = _guided(read, *conditions, dtype=like.dtype, sampling=sampling, path=path, passes=count)

    def told(x: Tensor, time: Tensor) -> Tensor:
        result = guided(x, time)
        if progress is not None:
            progress()
        if seen is not None:
            seen(data_from_velocity(result, x, time.expand(len(x)), path))
        return result

    draw = noise_stream(shape, seed)
    # To stand still in the first steps is to begin after them.
    noise, times = draw().to(like.device), sampling.times()[sampling.zero_steps :]
    if known is None:
        return _solve(told, noise, times, sampling=sampling, path=path, draw=draw)
    known = known.to(noise)
    if not lean and not known.kept.any():
        return _solve(told, noise, times, sampling=sampling, path=path, draw=draw)
    velocity = held(told, known, noise, path)
    latent = _solve(velocity, noise, times, sampling=sampling, path=path, draw=draw)
    return torch.where(known.kept > 0, known.latent, latent)


def _guided(
    backbone: VelocityModel, condition: Condition, null: Condition, *, dtype: torch.dtype, sampling: Sampling,
    path: GaussianPath, passes: Passes,
) -> VelocityFn:  # fmt: skip
    def convert(output_fn: VelocityFn) -> VelocityFn:
        # Flow time stays exact, whatever the weights are.
        return as_velocity(lambda x, t: output_fn(x.to(dtype), t).float(), sampling.objective, path)

    return guided_velocity(
        backbone, condition, null, sampling.guidance_scale, sampling.guidance, path=path,
        around=lambda model: watched(model, sampling.cache, passes), convert=convert,
    )  # fmt: skip


def _solve(
    velocity: VelocityFn, noise: Tensor, times: Tensor, *, sampling: Sampling, path: GaussianPath,
    draw: Callable[[], Tensor],
) -> Tensor:  # fmt: skip
    if sampling.solver == "sde":
        return solvers.euler_maruyama(
            velocity, noise, times, path=path, diffusion_fn=solvers.fading(path, sampling.diffusion),
            noise_fn=lambda: draw().to(noise.device),
        )  # fmt: skip
    solve = {"euler": solvers.euler, "midpoint": solvers.midpoint, "heun": solvers.heun}[sampling.solver]
    return solve(velocity, noise, times)


def noise_stream(shape: LatentShape, seed: int) -> Callable[[], Float[Tensor, "1 c t h w"]]:
    """Standard normal draws from this sample's own generator: where its flow starts, then an SDE's noise.

    Raises:
        UserError: a seed that is not in 0 .. 2^63 - 1.
    """
    check_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    size = (1, shape.channels, shape.frames, shape.height, shape.width)
    return lambda: torch.randn(size, generator=generator)


def decode_latent(
    tae: TAE | Pixels, latent: Float[Tensor, "b c t h w"], frames: int, memory: int = DEFAULT_MEMORY
) -> UInt8[Tensor, "b frames height width 3"]:
    """Frames, RGB 0..255 on the CPU, of a normalized latent, in tiles that take up to `memory` bytes.

    The flow ends in the autoencoder's latent space (lecture notes, Remark 4); this leads out of it.

    Raises:
        UserError: frames too large for `memory`.
    """
    return torch.cat(list(decode_pieces(tae, latent, frames, memory)), dim=1)


@torch.no_grad()
def decode_pieces(
    tae: TAE | Pixels, latent: Float[Tensor, "b c t h w"], frames: int, memory: int = DEFAULT_MEMORY
) -> Iterator[UInt8[Tensor, "b _ height width 3"]]:
    """The frames of `decode_latent`, a few at a time, in order: of a long clip no more than a few are held.

    Raises:
        UserError: frames too large for `memory`, when the first piece is asked for.
    """
    if isinstance(tae, Pixels):
        yield to_bytes(tae.decode(latent, frames)).cpu()
        return
    for piece in TiledTAE(tae, memory=memory).decode_whole(tae.denormalize(latent), frames):
        for part in piece.split(tae.config.factors[0], dim=2):
            yield to_bytes(part).cpu()
        del piece, part  # not held while the next tile is decoded


def _like(condition: Condition, like: Tensor) -> Condition:
    if isinstance(condition, Labels):
        return replace(condition, index=condition.index.to(like.device))
    return tuple(embedding.to(like) for embedding in condition)
