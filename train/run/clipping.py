"""The bound of the gradient norm: one that is given, and one that follows what the norm was of late."""

import math

from kinoflow.train.run.config import OptimizerConfig

DECAY = 0.98  # of the running mean: about fifty steps


class Clipping:
    """Equal on every process, and a part of checkpoints."""

    def __init__(self, config: OptimizerConfig) -> None:
        self._fixed = config.grad_clip or math.inf
        self._factor = config.adaptive_clip
        self._sum = self._weight = 0.0

    @property
    def adaptive(self) -> bool:
        """Whether the bound changes, so that norms must be told."""
        return self._factor > 0

    @property
    def bound(self) -> float:
        """Of the next step's norm; 0 where there is none."""
        adaptive = self._factor * self._sum / self._weight if self._factor and self._weight else math.inf
        bound = min(self._fixed, adaptive)
        return bound if math.isfinite(bound) else 0.0

    def saw(self, norm: float) -> None:
        """Take in the norm of a step as it was clipped: one that is far off moves the mean little."""
        bound = self.bound
        clipped = min(norm, bound) if bound else norm
        self._sum = DECAY * self._sum + (1 - DECAY) * clipped
        self._weight = DECAY * self._weight + (1 - DECAY)

    def counters(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"clip_sum": self._sum, "clip_weight": self._weight} if self.adaptive else {}

    def load(self, counters: dict[str, float]) -> None:
        """Take over what `counters` gave; a run that clipped otherwise before begins anew."""
        self._sum, self._weight = counters.get("clip_sum", 0.0), counters.get("clip_weight", 0.0)
