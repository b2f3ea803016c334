"""Classifier-free guidance: velocities with and without the condition (prompt or label), combined.

Beside the plain combination there are three that were published since, and an interval outside of which there
is none; `Guidance` chooses. What each of them buys on the shipped release is in docs/LOG.md.

Letters: u without and c with the condition, v what is made of them, w the guidance scale.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kinoflow.conditioning.embedding import Condition, TextEmbedding
from kinoflow.conditioning.labels import Labels
from kinoflow.configs.errors import UserError
from kinoflow.dit_video.flow.paths import GaussianPath, cond_ot
from kinoflow.sample.solver import VelocityFn

GuidanceKind = Literal["cfg", "zero-star", "apg"]
Around = Callable[[VelocityFn], VelocityFn]
"""Puts something around a model that is asked for its output at (x, time)."""


@runtime_checkable
class VelocityModel(Protocol):
    """What sampling asks of a backbone."""

    def __call__(self, latent: Tensor, time: Tensor, condition: Any) -> Tensor: ...

    def encode_condition(self, condition: Condition) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How the guidance scale is used; the defaults are plain classifier-free guidance.

    Raises:
        UserError: a value outside its range.
    """

    kind: GuidanceKind = "cfg"
    """Plain, CFG-Zero* or adaptive projected guidance."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Flow times, 0 noise and 1 data, between which there is guidance; outside the scale is 1: one pass."""
    rescale: float = 0.0
    """How much of the conditional velocity's spread is given back, 0 none to 1 all."""
    zero_steps: int = 1
    """Of zero-star: first steps that stand still."""
    momentum: float = -0.5
    """Of apg: how much of the earlier updates goes into the next; negative is away from them."""
    threshold: float = 0.06
    """Of apg: the longest update, as root mean square of the denoised prediction's change; 0 is any."""
    parallel: float = 0.0
    """Of apg: how much is kept of the update along the prediction, 0 none to 1 all."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(GuidanceKind):
            known = ", ".join(get_args(GuidanceKind))
            raise UserError(f"guidance_kind: {self.kind!r} is none; use one of {known}")
        if len(self.interval) != 2 or not 0 <= self.interval[0] < self.interval[1] <= 1:
            told = ":".join(f"{time:g}" for time in self.interval)
            raise UserError(f"guidance_interval: {told} is not two rising times in 0..1; try 0.1:0.9")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"guidance_rescale: {self.rescale} is not in 0..1; try 0.7")
        if self.zero_steps < 0:
            raise UserError(f"guidance.zero_steps: {self.zero_steps} is below 0; try 1")
        if not -1 < self.momentum < 1:
            raise UserError(f"guidance.momentum: {self.momentum} is not between -1 and 1; try -0.5")
        if not self.threshold >= 0:
            raise UserError(f"guidance.threshold: {self.threshold} is below 0; 0 is none")
        if not 0 <= self.parallel <= 1:
            raise UserError(f"guidance.parallel: {self.parallel} is not in 0..1; try 0")

    @property
    def is_plain(self) -> bool:
        """Whether it is (1.8) at all times and no more."""
        return self.kind == "cfg" and self.interval == (0, 1) and self.rescale == 0


PLAIN = Guidance()


def guide(
    unconditional: Float[Tensor, "b ..."], conditional: Float[Tensor, "b ..."], guidance_scale: float
) -> Float[Tensor, "b ..."]:
    """(1 - w) u(x|∅) + w u(x|y): classifier-free guidance, eq. 1.8 of the lecture notes (and their figure 1).

    By (1.3) and (1.5) it is u(x|∅) + w b ∇ log p(y|x), without the classifier of Remark 2; it asks for no
    Gaussian path (Remark 3). Outputs of a score model are combined alike (1.15).
    """
    return (1 - guidance_scale) * unconditional + guidance_scale * conditional


def guide_zero_star(
    unconditional: Float[Tensor, "b ..."], conditional: Float[Tensor, "b ..."], guidance_scale: float
) -> Float[Tensor, "b ..."]:
    """(1 - w) s u + w c with s = ⟨c, u⟩ / |u|²: CFG-Zero* (Fan et al. 2025, arXiv:2503.18886, eq. 9-11).

    s u is the point nearest to c on the line through u: a model that is not yet right is not extrapolated
    along a difference of mere lengths. Its other half, zero-init, is that first steps are left out.
    """
    along = _dot(conditional, unconditional)
    square = _dot(unconditional, unconditional)
    return guide(torch.where(square > 0, along / square, 1.0) * unconditional, conditional, guidance_scale)


def rescaled(
    guided: Float[Tensor, "b ..."], conditional: Float[Tensor, "b ..."], rescale: float
) -> Float[Tensor, "b ..."]:
    """φ v std(c) / std(v) + (1 - φ) v: Lin et al. 2023 (arXiv:2305.08891), eq. 15 and 16, φ = `rescale`.

    Guidance of a large scale spreads values further than any data; this takes some of it back.
    """
    ratio = _std(conditional) / _std(guided)
    return rescale * (guided * ratio) + (1 - rescale) * guided


class Projected:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv:2410.02416, algorithm 1) of one clip.

    It works on denoised predictions ẑ, as its section 4 says of models that give another thing; here ẑ is
    where a velocity leads: x = α ẑ + β ε̂ and v = α̇ ẑ + β̇ ε̂ make ẑ = (β v − β̇ x) / (α̇ β − α β̇). The update
    ẑ_c − ẑ_u gets the momentum of earlier ones, is shortened to `threshold`, and loses what lies along ẑ_c,
    which only adds contrast. The paper's threshold is a norm; ours is one divided by the root of the number
    of values, so that it means the same for a clip of any size (its 15 for SDXL is our 0.06).
    """

    def __init__(self, guidance_scale: float, guidance: Guidance, path: GaussianPath) -> None:
        self._scale, self._guidance, self._path = guidance_scale, guidance, path
        self._average: Tensor | float = 0.0

    def __call__(
        self, unconditional: Tensor, conditional: Tensor, x: Float[Tensor, "b ..."], time: Float[Tensor, ""]
    ) -> Float[Tensor, "b ..."]:
        """The guided velocity at (x, time); times rise from call to call."""
        at = self._path(time.double())
        alpha, beta, alpha_dot, beta_dot = map(float, (at.alpha, at.beta, at.alpha_dot, at.beta_dot))
        determinant = alpha_dot * beta - alpha * beta_dot
        update, ratio = conditional - unconditional, 1.0
        if beta > 1e-4:  # at the data a velocity says nothing more of ẑ, and earlier updates would drown it
            ratio = beta / determinant  # of a change of ẑ to that of v
            update = self._average = ratio * update + self._guidance.momentum * self._average
            if self._guidance.threshold:
                size = (_dot(update, update) / update[0].numel()).sqrt()
                update = update * (self._guidance.threshold / size.clamp(min=1e-12)).clamp(max=1)
        denoised = (beta * conditional - beta_dot * x) / determinant
        along = _dot(update, denoised) / _dot(denoised, denoised).clamp(min=1e-12) * denoised
        update = update - (1 - self._guidance.parallel) * along
        return conditional + (self._scale - 1) * update / ratio


def guided_velocity(
    backbone: VelocityModel,
    condition: Condition,
    null: Condition,
    guidance_scale: float,
    guidance: Guidance = PLAIN,
    *,
    path: GaussianPath = cond_ot,
    around: Around = lambda model: model,
    convert: Around = lambda output: output,
) -> VelocityFn:
    """The guided velocity as a function of (latent, time) for a solver (lecture notes, Key Idea 1, figure 2).

    `null` stands for ∅: the null prompt or no class, or what is to be steered away from in its place, one
    row or as many as `condition`. Conditions go through the model once, here; both halves of the guidance,
    which one network gives (Summary 1), then run as one batch of 2b. With `guidance_scale` 1 the
    unconditional half has no weight and is left out, and so it is outside the guidance's interval
    (Kynkäänniemi et al. 2024, arXiv:2404.07724).

    `around` is put around the model where it is asked, for one half or both; `convert` makes velocities of
    its outputs, on the `path` that it was trained on. The result belongs to one clip: it may remember.
    """

    def ask(condition: Condition) -> VelocityFn:
        context = backbone.encode_condition(condition)
        return around(lambda x, time: backbone(x, time.expand(x.shape[0]), context))

    if guidance_scale == 1:
        return convert(ask(condition))
    both = ask(stack(null, condition))
    if guidance.is_plain:
        # Combined as they come, before they are velocities: the same, and in the model's own number type.
        return convert(lambda x, time: _halved(both, x, time, guidance_scale))
    single = convert(ask(condition)) if guidance.interval != (0, 1) else None
    halves, combine = convert(both), _combination(guidance_scale, guidance, path)

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        first, last = time.new_tensor(guidance.interval)  # rounded as the time is
        if single is not None and not first <= time <= last:
            return single(x, time)
        unconditional, conditional = halves(torch.cat((x, x)), time).chunk(2)
        guided = combine(unconditional, conditional, x, time)
        return rescaled(guided, conditional, guidance.rescale) if guidance.rescale else guided

    return velocity


def _halved(both: VelocityFn, x: Tensor, time: Tensor, guidance_scale: float) -> Tensor:
    unconditional, conditional = both(torch.cat((x, x)), time).chunk(2)
    return guide(unconditional, conditional, guidance_scale)


def _combination(
    scale: float, guidance: Guidance, path: GaussianPath
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    if guidance.kind == "apg":
        return Projected(scale, guidance, path)
    combine = guide_zero_star if guidance.kind == "zero-star" else guide
    return lambda unconditional, conditional, _x, _time: combine(unconditional, conditional, scale)


def _dot(first: Float[Tensor, "b ..."], second: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """Products of the rows, shaped (b, 1, …, 1)."""
    return (first * second).flatten(1).sum(1).view(-1, *(1,) * (first.ndim - 1))


def _std(x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    return x.flatten(1).std(1).view(-1, *(1,) * (x.ndim - 1))


def stack(null: Condition, condition: Condition) -> Condition:
    """Rows of `null` above rows of `condition`; texts encoder by encoder, padded to a common length.

    Raises:
        TypeError: one holds labels and the other texts.
    """
    if isinstance(null, Labels) and isinstance(condition, Labels):
        rows = null.index.expand(len(condition.index))
        return replace(condition, index=torch.cat((rows, condition.index)))
    if isinstance(null, Labels) or isinstance(condition, Labels):
        raise TypeError("guidance: labels beside texts")
    return tuple(_stack_one(*pair) for pair in zip(null, condition, strict=True))


def _stack_one(null: TextEmbedding, own: TextEmbedding) -> TextEmbedding:
    rows = own.mask.shape[0]
    length = max(null.mask.shape[1], own.mask.shape[1])
    null, own = _pad(null, length), _pad(own, length)
    pooled = None
    if null.pooled is not None and own.pooled is not None:
        pooled = torch.cat((null.pooled.expand(rows, -1), own.pooled))
    return TextEmbedding(
        hidden=torch.cat((null.hidden.expand(rows, -1, -1), own.hidden)),
        mask=torch.cat((null.mask.expand(rows, -1), own.mask)),
        pooled=pooled,
    )


def _pad(embedding: TextEmbedding, length: int) -> TextEmbedding:
    missing = length - embedding.mask.shape[1]
    return TextEmbedding(
        hidden=torch.nn.functional.pad(embedding.hidden, (0, 0, 0, missing)),
        mask=torch.nn.functional.pad(embedding.mask, (0, missing), value=False),
        pooled=embedding.pooled,
    )
