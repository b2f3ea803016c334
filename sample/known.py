"""A backbone on clips of which something is known, and on clips longer than it was trained on.

`Reader` stands around a backbone and gives it what is known with every call; a long clip it reads in windows
that overlap, whose velocities it averages at each step (MultiDiffusion, Bar-Tal et al. 2023,
arXiv:2302.08113; Movie Gen has it in its upsampler). `held` keeps the kept places on their path and leans
the shown ones on their picture.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kinoflow.conditioning.embedding import Condition
from kinoflow.dit_video.flow.known import Known, velocity_near
from kinoflow.dit_video.flow.paths import GaussianPath, coefficients
from kinoflow.sample.guidance import VelocityModel
from kinoflow.sample.solver import VelocityFn

# How near a picture's latent those of frames that begin or end with it are taken to be, of a variance of 1
# in all (the shipped release's are at 0.03 to 0.3 by channel; with more than this some noise stays), and how
# much of the velocity follows from that: near the data less and less, for motion. Behind a beginning it is
# less, whose own frames say where things are and how they move.
_VARIANCE = 0.05
_MOST, _BEHIND, _FALL = 0.9, 0.6, 2.0


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Spans of `length` latent frames, of which neighbours share `overlap` at least.

    Raises:
        ValueError: an overlap that is not below the length.
    """

    length: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.length:
            raise ValueError(f"windows: an overlap of {self.overlap} in {self.length} latent frames")

    def spans(self, frames: int) -> list[tuple[int, int]]:
        """First and end of each window of a clip of so many latent frames; the last ends with the clip."""
        last = max(frames - self.length, 0)
        starts = [*range(0, last, self.length - self.overlap), last]
        return [(start, min(start + self.length, frames)) for start in starts]

    def weights(self, count: int) -> Float[Tensor, "count 1 1"]:
        """What each latent frame of a window counts: most in the middle, where it sees most around it."""
        place = torch.arange(count)
        return torch.minimum(place + 1, count - place).float().view(-1, 1, 1)


class Reader:
    """A velocity model that gives its backbone what is known of the clip, window by window of a long one."""

    def __init__(
        self, backbone: VelocityModel, known: Known | None = None, windows: Windows | None = None
    ) -> None:
        self._backbone, self._known, self._windows = backbone, known, windows

    def encode_condition(self, condition: Condition) -> Any:
        """As the backbone does."""
        return self._backbone.encode_condition(condition)

    def __call__(self, latent: Float[Tensor, "b c t h w"], time: Tensor, condition: Any) -> Tensor:
        """The velocity of the whole clip."""
        frames = latent.shape[2]
        if self._windows is None or frames <= self._windows.length:
            return self._velocity(latent, time, condition, (0, frames))
        total, counted = torch.zeros_like(latent), torch.zeros_like(latent[:1, :1])
        for first, end in self._windows.spans(frames):
            weights = self._windows.weights(end - first).to(latent)
            total[:, :, first:end] += weights * self._velocity(latent, time, condition, (first, end))
            counted[:, :, first:end] += weights
        return total / counted

    def _velocity(self, latent: Tensor, time: Tensor, condition: Any, span: tuple[int, int]) -> Tensor:
        window = latent[:, :, span[0] : span[1]]
        if self._known is None:
            return self._backbone(window, time, condition)
        known = self._known.window(*span).to(latent).repeated(len(latent))
        return self._backbone(window, time, condition, known)  # type: ignore[call-arg]


def held(velocity_fn: VelocityFn, known: Known, noise: Tensor, path: GaussianPath) -> VelocityFn:
    """The same, with the kept places on the path from `noise` to the known latent, the shown ones near it.

    A backbone's own errors add up along the way, and it corrects them by what is shown hardly at all: late in
    the flow it has learnt to go by x_t. Of the shown places' velocity `_MOST` is therefore the picture's, and
    at the end nothing.
    """
    most = _BEHIND if known.kept.any() else _MOST

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        times = time.expand(len(x))
        x = known.hold(x, noise, times, path)
        u = velocity_fn(x, time)
        share = (_FALL * coefficients(path, times, x).beta).clamp(max=most)
        u = torch.lerp(u, velocity_near(known.latent, x, times, path, _VARIANCE), share * known.shown)
        return known.velocity(u, noise, times, path)

    return velocity
