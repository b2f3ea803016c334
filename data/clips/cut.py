"""Long footage and large pictures cut to short square clips that a training loader reads fast.

From a clip, windows in time and space are taken as they come: a window is a square of random place and size,
brought to one side length. From a picture, a square that drifts and zooms slowly: real texture with a known,
smooth motion. The same seed gives the same windows.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch.nn.functional import affine_grid, grid_sample, interpolate

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import seeded
from kinoflow.data import video
from kinoflow.data.clips import pace
from kinoflow.data.clips.fit import fit
from kinoflow.data.clips.manifest import ClipEntry

_CRF = 8
_CHUNK = 32
_PICTURE_FPS = Fraction(24)
_SECONDS = 2
_MOST = 10**6
# Drift of a picture window over its clip, in shares of its side, and the most it grows or shrinks.
_DRIFT = 0.35
_ZOOM = 1.25


@dataclass(frozen=True, kw_only=True)
class CutConfig:
    """`frames` and `side` of the clips (pixels), windows a minute of footage, and windows a picture.

    Without `frames` a clip lasts two seconds at the rate it is written at, which fills the longest bucket of
    the mini configurations (32 frames at 16 a second). `fps` plays every clip at that rate,
    whatever its own: an autoencoder does not ask for true speed. None keeps the rate of the footage. Footage
    of a variable rate is sampled at `fps`, or at its average rate, so that each frame of a clip is the one
    shown at its time.
    """

    frames: int | None = None
    side: int = 128
    per_minute: float = 300.0
    per_picture: int = 20
    fps: Fraction | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("frames", "side", "per_minute", "per_picture", "fps"):
            value = getattr(self, key)
            if value is not None and not 0 < value <= _MOST:
                raise UserError(f"--{key.replace('_', '-')}: {value} must be positive, and at most {_MOST}")
        if self.side % 2:
            raise UserError(f"--side: {self.side} is odd; H.264 wants an even number of pixels")
        if self.seed < 0:
            raise UserError(f"--seed: {self.seed} is negative; use 0 or more")

    def length(self, fps: Fraction) -> int:
        """Frames of a clip that is written at a rate."""
        return self.frames or math.ceil(_SECONDS * fps)


@dataclass(frozen=True, kw_only=True)
class Window:
    """Frames start..start+frames-1 of the square at (top, left) with sides of `size` pixels."""

    start: int
    top: int
    left: int
    size: int


def windows(config: CutConfig, *, frames: int, height: int, width: int, fps: Fraction) -> list[Window]:
    """The windows of a clip in the order of their start; none when the clip is shorter than one.

    Raises:
        UserError: a picture smaller than the window.
    """
    if min(height, width) < config.side:
        raise UserError(f"--side: {config.side} is more than the {width}x{height} pixels there are")
    length = config.length(config.fps or fps)
    if frames < length:
        return []
    rng = np.random.default_rng(seeded("windows", config.seed, frames, height, width))
    count = max(1, round(config.per_minute * float(frames / fps) / 60))
    starts = np.sort(rng.integers(frames - length + 1, size=count))
    return [_window(rng, int(start), config.side, height, width) for start in starts]


def _window(rng: np.random.Generator, start: int, side: int, height: int, width: int) -> Window:
    largest = min(height, width)
    size = round(math.exp(rng.uniform(math.log(side), math.log(largest))))
    top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    return Window(start=start, top=int(top), left=int(left), size=size)


def cut(source: Path, out: Path, config: CutConfig, caption: str = "") -> Iterator[ClipEntry]:
    """Write the windows of one clip or picture into `out`/clips; the row of each, its path relative to out.

    Raises:
        UserError: a source that can't be read, is smaller or shorter than a window, or faster than a clip.
    """
    info = video.probe(source)
    if min(info.height, info.width) < config.side:
        raise UserError(f"{source}: has {info.width}x{info.height} pixels; give a smaller --side")
    if info.frames == 1:
        fps = config.fps or _PICTURE_FPS
        clips = _pans(source, config, config.length(fps))
    else:
        repeats, own = _paced(source, info, config.fps)
        count, fps = int(repeats.sum()), config.fps or own
        found = windows(config, frames=count, height=info.height, width=info.width, fps=own)
        if not found:
            raise UserError(
                f"{source}: has {count} frames, a clip takes {config.length(fps)}; give fewer --frames"
            )
        clips = _footage(source, repeats, found, config.length(fps), config.side)
    for number, frames in enumerate(clips):
        name = f"clips/{source.stem}-{number:05d}.mp4"
        video.write(out / name, frames, fps=fps, crf=_CRF, metadata={"title": source.name})
        yield ClipEntry(
            path=name, caption=caption, frames=len(frames), fps=fps, width=config.side, height=config.side,
            extra={"source": source.name},
        )  # fmt: skip


def _paced(
    source: Path, info: video.VideoInfo, fps: Fraction | None
) -> tuple[Int64[np.ndarray, " frames"], Fraction]:
    """How often each frame comes at a constant rate, and that rate: the clip's own where it is constant."""
    if not info.variable_frame_rate:
        return np.ones(info.frames, np.int64), info.fps
    times, rate = pace.times_of(source), fps or info.fps
    slots = math.ceil(times.time_of(-1) * rate - Fraction(1, 2))
    shown = pace.steady(times, begin=Fraction(0), rate=rate, count=max(slots, 1))
    return np.bincount(shown, minlength=info.frames), rate


def _footage(
    source: Path, repeats: Int64[np.ndarray, " n"], found: Iterable[Window], length: int, side: int
) -> Iterator[UInt8[np.ndarray, "frames side side 3"]]:
    """The windows of a clip, read once from its first frame to its last."""
    waiting, times = list(found), iter(repeats.tolist())
    held: list[np.ndarray] = []
    first = 0
    for chunk in video.stream(source, chunk=_CHUNK):
        for frame in chunk:
            held += [frame] * next(times)
        while waiting and waiting[0].start + length <= first + len(held):
            window = waiting.pop(0)
            rows, columns = (slice(at, at + window.size) for at in (window.top, window.left))
            begin = window.start - first
            frames = np.stack([frame[rows, columns] for frame in held[begin : begin + length]])
            yield fit(frames, side, side)
        passed = (waiting[0].start if waiting else first + len(held)) - first
        first, held = first + max(passed, 0), held[max(passed, 0) :]


def _pans(source: Path, config: CutConfig, length: int) -> Iterator[UInt8[np.ndarray, "frames side side 3"]]:
    """Squares that wander over a picture."""
    picture = video.read(source)[0]
    height, width, _ = picture.shape
    rng = np.random.default_rng(seeded("drift", config.seed, height, width))
    for _ in range(config.per_picture):
        window = _window(rng, 0, config.side, height, width)
        rows, columns = (
            slice(window.top, window.top + window.size),
            slice(window.left, window.left + window.size),
        )
        yield _pan(picture[rows, columns], rng, length, config.side)


def _pan(
    square: UInt8[np.ndarray, "size size 3"], rng: np.random.Generator, length: int, final: int
) -> UInt8[np.ndarray, "frames side side 3"]:
    """Frames of a moving, zooming square inside `square`, with sides of `final` pixels."""
    # Sampled at twice the final side, then averaged down: no aliasing from the resampling itself.
    side, detail = 2 * final, min(square.shape[0], 3 * final)
    source = torch.from_numpy(fit(square[None], detail, detail)).permute(0, 3, 1, 2)
    time = torch.linspace(-0.5, 0.5, length)
    drift, zoom = rng.uniform(-_DRIFT, _DRIFT, 2), rng.uniform(-math.log(_ZOOM), math.log(_ZOOM))
    scale = torch.exp(zoom * time) * (1 - _DRIFT / 2) / math.sqrt(_ZOOM)
    theta = torch.zeros(length, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale, scale
    theta[:, 0, 2], theta[:, 1, 2] = drift[0] * time, drift[1] * time
    grid = affine_grid(theta, [length, 3, side, side], align_corners=False)
    pixels = source.float().expand(length, -1, -1, -1)
    moved = grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return _bytes(interpolate(moved, scale_factor=0.5, mode="area"))


def _bytes(pixels: torch.Tensor) -> UInt8[np.ndarray, "f side side 3"]:
    return pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
