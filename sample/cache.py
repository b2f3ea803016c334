"""A step cache: velocities that hardly change from step to step are not computed again.

It lies around a model, which knows nothing of it, and belongs to one clip.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kinoflow.sample.solver import VelocityFn


@dataclass
class Passes:
    """Passes of one sample through its backbone; one half of the guidance is one pass."""

    computed: int = 0
    """What the time went into."""
    reused: int = 0
    """What the cache saved."""


def watched(model: VelocityFn, threshold: float, passes: Passes) -> VelocityFn:
    """The model, whose passes are counted, behind a cache where there is a threshold."""
    model = counted(model, passes)
    return StepCache(model, threshold, passes) if threshold else model


def counted(model: VelocityFn, passes: Passes) -> VelocityFn:
    """The same model, whose rows are counted."""

    def count(x: Tensor, time: Tensor) -> Tensor:
        passes.computed += x.shape[0]
        return model(x, time)

    return count


class StepCache:
    """A model that answers from what it said before where its answer would hardly have changed.

    EasyCache (Zhou et al. 2025, arXiv:2507.02860, section 3): between two computed outputs the change of
    the output is to that of x as k, and k hardly changes. So k |x - x'|, relative to |v|, estimates by how
    much each step changes the output, and while the sum of it since the last computed one is below
    `threshold` the model is not asked. |.| is the mean of absolute values over all rows: both halves of a
    guidance are computed or answered together.

    What was computed is forgotten when another model of the clip, for one half of the guidance or for both,
    was asked in between: `passes`, which they share, tells.

    The paper answers with the last v and how far x has moved. Here the answer is the line through the last
    two computed outputs, followed no farther than they lie apart: it is nearer (docs/LOG.md).
    """

    def __init__(self, model: VelocityFn, threshold: float, passes: Passes) -> None:
        self._model, self._threshold, self._passes = model, threshold, passes
        self._last: _Computed | None = None
        self._before: _Computed | None = None
        self._x: Tensor | None = None  # where it was asked last
        self._error = 0.0
        self._turn = 0  # of the clip's passes, after it was asked last

    def __call__(self, x: Float[Tensor, "b ..."], time: Float[Tensor, ""]) -> Float[Tensor, "b ..."]:
        if self._turn != self._passes.computed + self._passes.reused:
            self._last = self._before = None
        now = float(time)
        output = self._known(x, now)
        if output is None:
            output = self._computed(x, time, now)
        else:
            self._passes.reused += x.shape[0]
        self._x, self._turn = x, self._passes.computed + self._passes.reused
        return output

    def _known(self, x: Tensor, now: float) -> Tensor | None:
        """The answer without the model, where it is near enough."""
        last, before = self._last, self._before
        if last is None or before is None or self._x is None:
            return None
        self._error += last.rate * _size(x - self._x) / max(_size(last.output), 1e-12)
        if not self._error < self._threshold:
            return None
        share = min(1.0, (now - last.time) / (last.time - before.time))
        return last.output + share * (last.output - before.output)

    def _computed(self, x: Tensor, time: Tensor, now: float) -> Tensor:
        output = self._model(x, time)
        # Twice at one time, as Heun's method asks, says nothing of how it changes with the time.
        earlier = self._before if self._last is not None and self._last.time == now else self._last
        rate = math.inf  # of one alone nothing is known
        if earlier is not None:
            rate = _size(output - earlier.output) / max(_size(x - earlier.x), 1e-12)
        self._last, self._before = _Computed(output=output, x=x, time=now, rate=rate), earlier
        self._error = 0.0
        return output


@dataclass(frozen=True, kw_only=True)
class _Computed:
    """An output of the model, and k of the change to it."""

    output: Tensor
    x: Tensor
    time: float
    rate: float


def _size(x: Tensor) -> float:
    return float(x.abs().mean(dtype=torch.float32))
