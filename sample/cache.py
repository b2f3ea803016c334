"""A step cache: velocities that hardly change from step to step are not computed again.

It lies around a model, which knows nothing of it, and belongs to one clip.
"""

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


def counted(model: VelocityFn, passes: Passes) -> VelocityFn:
    """The same model, whose rows are counted."""

    def count(x: Tensor, time: Tensor) -> Tensor:
        passes.computed += x.shape[0]
        return model(x, time)

    return count


class StepCache:
    """A model that answers from memory where its answer would hardly have changed.

    EasyCache (Zhou et al. 2025, arXiv:2507.02860, section 3): between two computed outputs the change of
    the output is to that of x as k, and k hardly changes. So k |x - x'|, relative to |v|, estimates by how
    much each step changes the output, and while the sum of it since the last computed one is below
    `threshold` the model is not asked. |.| is the mean of absolute values over all rows: both halves of a
    guidance are computed or reused together.

    The paper reuses v - x, and so a velocity that follows x. For a flow, whose velocity is that of a
    straight line as long as nothing new is known, v itself is nearer (docs/LOG.md): it is what is reused.
    """

    def __init__(self, model: VelocityFn, threshold: float, passes: Passes) -> None:
        self._model, self._threshold, self._passes = model, threshold, passes
        self._output: Tensor | None = None
        self._at: Tensor | None = None  # where that was computed
        self._seen: Tensor | None = None  # where it was asked last
        self._rate: float | None = None
        self._error = 0.0

    def __call__(self, x: Float[Tensor, "b ..."], time: Float[Tensor, ""]) -> Float[Tensor, "b ..."]:
        if self._output is not None and self._seen is not None and self._rate is not None:
            self._error += self._rate * _size(x - self._seen) / max(_size(self._output), 1e-12)
            if self._error < self._threshold:
                self._seen = x
                self._passes.reused += x.shape[0]
                return self._output
        output = self._model(x, time)
        if self._output is not None and self._at is not None:
            moved = _size(x - self._at)
            self._rate = _size(output - self._output) / moved if moved > 0 else None
        self._output, self._at, self._seen, self._error = output, x, x, 0.0
        return output


def _size(x: Tensor) -> float:
    return float(x.abs().mean(dtype=torch.float32))
