"""Buckets: the sizes, durations and frame rates that clips are cut to, one per batch."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import seeded

_FORM = (
    "write frames x height x width @ fps, for example 16x64x64@16 or '16x64x64@24000/1001 weight=2 batch=8'"
)
_PATTERN = re.compile(r"(\d+)x(\d+)x(\d+)@(\d+(?:\.\d+|/\d+)?)")
# A clip of 23.976 fps may fill a bucket of 24: one frame in a thousand is shown twice.
_FPS_TOLERANCE = Fraction(98, 100)


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A clip's shape: `frames` at `fps` per second, `height` x `width` pixels; one frame is an image.

    `weight` is the relative share of batches; `batch_size` overrides the run's. Raises UserError
    naming the key.
    """

    frames: int
    height: int
    width: int
    fps: Fraction
    weight: float = 1.0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for key in ("frames", "height", "width", "fps"):
            if getattr(self, key) <= 0:
                raise UserError(f"bucket {key}: {getattr(self, key)} must be positive; {_FORM}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise UserError(f"bucket weight: {self.weight} must be a number of 0 or more")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"bucket batch: {self.batch_size} must be 1 or more")

    def __str__(self) -> str:
        """The form that `parse` reads."""
        text = f"{self.frames}x{self.height}x{self.width}@{self.fps}"
        if self.weight != 1.0:
            text += f" weight={self.weight:.17g}"
        if self.batch_size is not None:
            text += f" batch={self.batch_size}"
        return text

    @property
    def span(self) -> Fraction:
        """Seconds from where the first frame begins to where the last one does; 0 for an image."""
        return (self.frames - 1) / self.fps

    def filled_by(self, *, duration: Fraction, fps: Fraction) -> bool:
        """Whether a clip lasts long enough and has enough frames per second; any clip fills an image.

        `duration` is in seconds; the clip's last frame may serve up to half a frame before its end.
        """
        if self.frames == 1:
            return duration > 0
        return fps >= _FPS_TOLERANCE * self.fps and self.span + 1 / (2 * fps) < duration


def parse(text: str) -> Bucket:
    """Read `16x64x64@16`, with fps an integer, a decimal or a fraction, then ` weight=2` and ` batch=8`.

    Raises UserError for anything else.
    """
    shape, *options = text.split() or [""]
    match = _PATTERN.fullmatch(shape)
    if match is None:
        raise UserError(f"bucket: can't read {text!r}; {_FORM}")
    frames, height, width, fps = match.groups()
    if fps.endswith("/0"):
        raise UserError(f"bucket fps: {fps} divides by zero; {_FORM}")
    weight, batch_size = 1.0, None
    for option in options:
        key, _, value = option.partition("=")
        try:
            if key == "weight":
                weight = float(value)
                continue
            if key == "batch":
                batch_size = int(value)
                continue
        except ValueError as error:
            raise UserError(f"bucket {key}: {value!r} is not a number; {_FORM}") from error
        raise UserError(f"bucket: unknown option {option!r} in {text!r}; {_FORM}")
    return Bucket(
        frames=int(frames),
        height=int(height),
        width=int(width),
        fps=Fraction(fps),
        weight=weight,
        batch_size=batch_size,
    )


def choose(seed: int, step: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket of a training step: by weight, from (seed, step) alone, so every rank agrees.

    Raises UserError when no bucket has a weight above zero.
    """
    total = math.fsum(bucket.weight for bucket in buckets)
    if not total > 0:
        raise UserError("buckets: none has a weight above 0; give at least one")
    point = seeded("bucket", seed, step) * 2.0**-63 * total
    for bucket in buckets:
        point -= bucket.weight
        if point < 0:
            return bucket
    return [bucket for bucket in buckets if bucket.weight > 0][-1]


def check_batches(buckets: Sequence[Bucket], batch_size: int, slices: int) -> None:
    """See that each bucket's batch, its own or `batch_size`, divides into the slices that processes take.

    Raises UserError that names the bucket whose batch does not.
    """
    for bucket in buckets:
        size = bucket.batch_size or batch_size
        if bucket.weight > 0 and size % slices:
            raise UserError(f"data.buckets: the {size} clips of a batch of {bucket} do not divide into "
                            f"{slices} (processes / parallel.sequence x deepspeed.accumulation)")  # fmt: skip


def _aspect_distance(height: int, width: int, bucket: Bucket) -> float:
    return abs(math.log(width / height) - math.log(bucket.width / bucket.height))


def admissible(
    buckets: Sequence[Bucket], *, duration: Fraction, height: int, width: int, fps: Fraction
) -> tuple[Bucket, ...]:
    """The buckets that a clip can serve: it fills their duration, and no other aspect is nearer to its own.

    Empty when the clip is too short, or has too few frames per second, for every one.
    """
    fillable = [bucket for bucket in buckets if bucket.filled_by(duration=duration, fps=fps)]
    if not fillable:
        return ()
    least = min(_aspect_distance(height, width, bucket) for bucket in fillable)
    return tuple(b for b in fillable if _aspect_distance(height, width, b) <= least + 1e-9)
