"""Conditions in the latent (Movie Gen, sections 5 and 6): what is known of a clip, and where.

A backbone that takes them has more input channels: the known latent, a mask of the places that are to stay
as they are, and one of those that are only shown. They start at zero weight, so that a text-to-video model
goes on from where it was.

Kept places hold the clip's own latent: a beginning to go on from, an end, all but a region. They lie on the
path of the clip, whatever the model says, and the loss leaves them out. Shown places hold the latent of a
single frame, where the clip's latent holds eight: the model learns what follows from it. Behind a beginning
its last frame is shown, which says more exactly where things are than the eight frames' latent does. An
upsampler (section 3.1.5) is shown everywhere what a smaller clip says; its latents are of single frames.

Letters: b clips, c channels, t h w latent sizes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import max_pool2d

from kinoflow.dit_video.flow.paths import GaussianPath, coefficients

_RESTS = 0.05  # root mean square of a normalized latent's change, up to which it is none
_REACH = 3  # cells that something may move through in a latent frame: three pixels a frame
MASKS = 2  # channels that a backbone reads beside the known latent
_MODES = ("first", "both", "prefix", "suffix", "region", "upsample")


@dataclass(frozen=True, kw_only=True)
class Known:
    """A normalized latent, 0 where nothing is known, and masks in {0, 1} of the places kept and shown."""

    latent: Float[Tensor, "b c t h w"]
    kept: Float[Tensor, "b 1 t h w"]
    shown: Float[Tensor, "b 1 t h w"]

    @property
    def channels(self) -> Float[Tensor, "b read t h w"]:
        """What a backbone reads beside x_t."""
        return torch.cat((self.latent, self.kept, self.shown), dim=1)

    def to(self, like: Tensor) -> "Known":
        """On the device and in the number type of a tensor."""
        return self.each(lambda tensor: tensor.to(like))

    def window(self, first: int, end: int) -> "Known":
        """Of the latent frames first .. end - 1."""
        return self.each(lambda tensor: tensor[:, :, first:end])

    def repeated(self, rows: int) -> "Known":
        """The same for so many rows, a multiple of its own."""
        return self.each(lambda tensor: tensor.repeat(rows // len(tensor), 1, 1, 1, 1))

    def each(self, change: Callable[[Tensor], Tensor]) -> "Known":
        """With all three tensors changed alike."""
        return Known(latent=change(self.latent), kept=change(self.kept), shown=change(self.shown))

    def hold(self, x: Tensor, noise: Tensor, time: Float[Tensor, " b"], path: GaussianPath) -> Tensor:
        """x with α z + β ε in the kept places: where the path of the known latent is at this time."""
        at = coefficients(path, time, x)
        return torch.where(self.kept > 0, at.alpha * self.latent + at.beta * noise, x)

    def velocity(self, u: Tensor, noise: Tensor, time: Float[Tensor, " b"], path: GaussianPath) -> Tensor:
        """u with α̇ z + β̇ ε in the kept places, which keeps a solver on that path."""
        at = coefficients(path, time, u)
        return torch.where(self.kept > 0, at.alpha_dot * self.latent + at.beta_dot * noise, u)


def velocity_near(
    center: Float[Tensor, "b ..."],
    x: Float[Tensor, "b ..."],
    time: Float[Tensor, " b"],
    path: GaussianPath,
    variance: float,
) -> Float[Tensor, "b ..."]:
    """E[α̇ z + β̇ ε | x] of x = α z + β ε, for z ~ N(center, variance) and ε ~ N(0, 1).

    Gaussian conditioning: the mean, and what x is off its own mean times their covariance over x's variance.
    It is finite at every time in [0, 1].
    """
    at = coefficients(path, time, x)
    covariance = at.alpha_dot * at.alpha * variance + at.beta_dot * at.beta
    slope = covariance / (at.alpha.square() * variance + at.beta.square())
    return at.alpha_dot * center + slope * (x - at.alpha * center)


def nothing(like: Float[Tensor, "b c t h w"]) -> Known:
    """Nothing of clips of this size."""
    mask = torch.zeros_like(like[:, :1])
    return Known(latent=torch.zeros_like(like), kept=mask, shown=mask)


def keep(clip: Float[Tensor, "b c t h w"], mask: Float[Tensor, "*b 1 t h w"]) -> Known:
    """The places of a clip where `mask` is 1."""
    mask = mask.expand(len(clip), -1, -1, -1, -1).to(clip)
    return Known(latent=clip * mask, kept=mask, shown=torch.zeros_like(mask))


def show(known: Known, frame: int, picture: Float[Tensor, "b c h w"]) -> Known:
    """With the latent of a picture at a latent frame: 0 the first, -1 the last.

    Raises:
        ValueError: the place is kept already.
    """
    if known.kept[:, :, frame].any():
        raise ValueError(f"latent frame {frame} is kept, it cannot be shown as well")
    latent, shown = known.latent.clone(), known.shown.clone()
    latent[:, :, frame], shown[:, :, frame] = picture, 1
    return replace(known, latent=latent, shown=shown)


def shown_everywhere(smaller: Float[Tensor, "b c t h w"]) -> Known:
    """What an upsampler is told: the latent of the smaller clip, brought to the larger one's size."""
    mask = torch.ones_like(smaller[:, :1])
    return Known(latent=smaller, kept=torch.zeros_like(mask), shown=mask)


def begun(clip: Float[Tensor, "b c t h w"], count: int, picture: Float[Tensor, "b c h w"]) -> Known:
    """The first `count` latent frames of a clip, and behind them the latent of their last frame alone."""
    return show(keep(clip, span(clip, 0, count)), count, picture)


def went_on(clip: Float[Tensor, "b c t h w"], count: int, picture: Float[Tensor, "b c h w"]) -> Known:
    """As `begun`; where the clip rests, the next latent frame is kept as the picture has it.

    A model draws a background anew that has not moved, a shade or a contour off, and one sees it flicker.
    Where the last latent frame is that of its own last frame alone, nothing moved in it; a few cells away
    from all that moves nothing will in the next.
    """
    known = begun(clip, count, picture)
    rests = resting(clip[:, :, count - 1], picture)
    kept, shown = known.kept.clone(), known.shown.clone()
    kept[:, :, count], shown[:, :, count] = rests, 1 - rests
    return replace(known, kept=kept, shown=shown)


def resting(last: Float[Tensor, "b c h w"], picture: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """1 at cells of a latent frame farther than `_REACH` from all that moved in it, else 0."""
    moved = ((last - picture).square().mean(dim=1, keepdim=True) > _RESTS**2).to(last)
    return 1 - max_pool2d(moved, 2 * _REACH + 1, stride=1, padding=_REACH)


def span(like: Float[Tensor, "b c t h w"], first: int, last: int) -> Float[Tensor, "1 1 t h w"]:
    """A mask of the latent frames first .. last - 1."""
    mask = torch.zeros_like(like[:1, :1])
    mask[:, :, first:last] = 1
    return mask


@dataclass(frozen=True, kw_only=True)
class KnownConfig:
    """How often a clip is trained with something known of it; the rest of the clips have text alone.

    Clips of one latent frame take none of those in time.
    """

    first: float = 0.0
    """Its first frame is shown."""
    both: float = 0.0
    """Its first and last frame are shown."""
    prefix: float = 0.0
    """Some latent frames at its beginning are kept; behind them their last frame is shown."""
    suffix: float = 0.0
    """Some at its end are kept."""
    region: float = 0.0
    """All but a rectangle, or a rectangle alone, is kept through time."""
    upsample: float = 0.0
    """Its smaller twin is shown, of latents with upsample; 1 for an upsampler."""
    window: int = 0
    """Of such latents, frames that a step takes of a clip, elsewhere each time; 0: all."""

    def __post_init__(self) -> None:
        shares = [getattr(self, mode) for mode in _MODES]
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError("known: the shares are 0 or more and sum to 1 at most")
        if self.upsample and sum(shares) > self.upsample:
            raise ValueError("known.upsample: its latents are of single frames; the other shares must be 0")
        if self.window < 0 or (self.window and not self.upsample):
            raise ValueError("known.window: a number of frames, beside known.upsample; leave it out")

    @property
    def pictures(self) -> bool:
        """Whether latents of single frames are needed."""
        return self.first + self.both + self.prefix > 0

    @property
    def any(self) -> bool:
        """Whether anything is known of any clip."""
        return self != KnownConfig()


def draw(
    config: KnownConfig,
    rng: np.random.Generator,
    clip: Float[Tensor, "1 c t h w"],
    pictures: Float[Tensor, "k c h w"] | None,
    smaller: Float[Tensor, "1 c t h w"] | None = None,
) -> Known:
    """What a training step knows of a clip.

    `pictures` are latents of its first frame and of the last one of each latent frame, 1 + t in all;
    `smaller` is the latent of its smaller twin.

    One level chooses the mode, whatever the clip: those of clips that cannot have it know nothing.
    """
    mode, frames = _mode(config, rng.random()), clip.shape[2]
    if mode == "region":
        return keep(clip, _rectangle(rng, clip))
    if mode == "upsample":
        assert smaller is not None, "the latents were asked for it"
        return shown_everywhere(smaller)
    if mode is None or frames == 1:
        return nothing(clip)
    if mode == "suffix":
        return keep(clip, span(clip, int(rng.integers(1, frames)), frames))
    if pictures is None:
        raise ValueError(f"known.{mode}: the clip has no latents of single frames")
    if mode == "prefix":
        count = int(rng.integers(1, frames))
        return begun(clip, count, pictures[count : count + 1])
    known = show(nothing(clip), 0, pictures[:1])
    return show(known, -1, pictures[-1:]) if mode == "both" else known


def _mode(config: KnownConfig, level: float) -> str | None:
    """The one that a number in [0, 1) falls on, None where nothing is known."""
    for mode in _MODES:
        level -= getattr(config, mode)
        if level < 0:
            return mode
    return None


def _rectangle(rng: np.random.Generator, like: Float[Tensor, "1 c t h w"]) -> Float[Tensor, "1 1 t h w"]:
    """A mask through time, of a rectangle (¼ to ¾ of each side) or, as often, of all but it."""
    mask = torch.zeros_like(like[:, :1])
    places = []
    for size in like.shape[3:]:
        length = int(rng.integers(max(size // 4, 1), max(3 * size // 4, 1) + 1))
        begin = int(rng.integers(0, size - length + 1))
        places.append(slice(begin, begin + length))
    mask[:, :, :, places[0], places[1]] = 1
    return mask if rng.random() < 0.5 else 1 - mask


def joined(parts: list[Known]) -> Known:
    """Clips of a batch."""
    return Known(
        latent=torch.cat([part.latent for part in parts]),
        kept=torch.cat([part.kept for part in parts]),
        shown=torch.cat([part.shown for part in parts]),
    )
