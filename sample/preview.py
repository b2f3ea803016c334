"""What a clip is going to be, in a terminal while it is made.

The colours are a linear map of the latent, fitted to the release's autoencoder: decoding costs seconds, this
nothing. A terminal of 24-bit colours shows two pixels in a character, the upper half block over its ground.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from rich.color import Color
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from torch import Tensor

from kinoflow.configs.files import seeded
from kinoflow.tae.model.pixels import Pixels, to_bytes
from kinoflow.tae.model.tae import TAE

_GRIDS = (2, 3, 4, 6, 8, 12)  # patches a side of the clips that the map is fitted to, one clip each
_CELLS = 8  # latent cells a side of those clips, of one latent frame
_UPDATES = 16  # pictures a clip
_ROWS = 16  # lines of a terminal that they may take
_MARGIN = 4  # lines that are left to the bars


@dataclass(frozen=True, kw_only=True)
class LatentColors:
    """RGB of a latent, a pixel a cell."""

    weight: Float[Tensor, "3 c"]
    """Of a normalized latent's channels."""
    bias: Float[Tensor, " 3"]
    """In [-1, 1], as the colours."""

    def __call__(self, latent: Float[Tensor, "1 c t h w"]) -> UInt8[Tensor, "t h w 3"]:
        """Pictures of its frames, on the CPU."""
        colors = torch.einsum("oc,cthw->othw", self.weight, latent[0].float().cpu())
        return to_bytes(colors + self.bias[:, None, None, None])


@torch.no_grad()
def fit_colors(decoder: TAE | Pixels) -> LatentColors:
    """The map nearest to an autoencoder in least squares: mean colours of cells, by what it encodes them as.

    The clips are drawn: drifting patches of random colours, hard and soft. Nothing is read for it, so it
    fits any release.
    """
    if isinstance(decoder, Pixels):
        channels = decoder.config.channels
        weight = torch.eye(3) if channels == 3 else torch.ones(3, channels)
        return LatentColors(weight=weight, bias=torch.zeros(3))
    device = next(decoder.parameters()).device
    told, wanted = [], []
    for grid in _GRIDS:
        clip = _patches(grid, decoder.config.factors)
        latent = decoder.normalize(decoder.encode(clip.to(device)).mean).float().cpu()
        told.append(latent[0].flatten(1).T)
        t, h, w = latent.shape[2:]
        wanted.append(F.adaptive_avg_pool3d(clip, (t, h, w))[0].flatten(1).T)
    states = torch.cat(told)
    states = torch.cat((states, torch.ones(len(states), 1)), dim=1)
    solution = torch.linalg.lstsq(states.double(), torch.cat(wanted).double()).solution.float()
    return LatentColors(weight=solution[:-1].T.contiguous(), bias=solution[-1])


def _patches(grid: int, factors: tuple[int, int, int]) -> Float[Tensor, "1 3 f h w"]:
    generator = torch.Generator().manual_seed(seeded("preview", grid))
    colors = torch.tanh(torch.randn(1, 3, grid, grid, generator=generator))
    size = (_CELLS * factors[1], _CELLS * factors[2])
    picture = F.interpolate(colors, size, mode="nearest" if grid % 2 else "bilinear")
    return torch.stack([picture.roll(frame, dims=-1) for frame in range(factors[0])], dim=2)


def each_few(num_velocities: int, show: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """What is called after each of so many velocities, and calls `show` about `_UPDATES` times."""
    every, count = max(1, num_velocities // _UPDATES), 0

    def seen(latent: Tensor) -> None:
        nonlocal count
        if count % every == 0:
            show(latent)
        count += 1

    return seen


def half_blocks(frames: UInt8[Tensor, "t h w 3"], *, columns: int, rows: int = _ROWS) -> Segments:
    """As many frames as fit beside each other, the first and the last among them, in `rows` lines at most."""
    t, height, width, _ = frames.shape
    scale = min(1.0, 2 * rows / height, columns / width)
    if scale < 1:
        size = (max(1, int(height * scale)), max(1, int(width * scale)))
        small = F.interpolate(frames.movedim(-1, 1).float(), size, mode="area")
        frames = small.movedim(1, -1).round().to(torch.uint8)
        height, width = size
    count = min(t, max(1, (columns + 1) // (width + 1)))
    chosen: list[Any] = frames[torch.linspace(0, t - 1, count).round().long()].tolist()
    segments = []  # not a Text, which would be rendered anew at each update of the bars
    for row in range(0, height, 2):
        for number, frame in enumerate(chosen):
            segments.append(Segment(" " if number else ""))
            below: list[Any] = frame[row + 1] if row + 1 < height else [None] * width
            for upper, lower in zip(frame[row], below, strict=True):
                ground = None if lower is None else Color.from_rgb(*lower)
                segments.append(Segment("▀", Style(color=Color.from_rgb(*upper), bgcolor=ground)))
        segments.append(Segment.line())
    return Segments(segments)


class Previews:
    """The pictures of the clips that are being made, each under its number.

    Args:
        decoder: of the release, asked for when there is to be something to show.
    """

    def __init__(self, decoder: Callable[[], TAE | Pixels], console: Console | None = None) -> None:
        self._decoder, self._console = decoder, console or Console(stderr=True)
        self._shown: dict[int, Segments] = {}

    @property
    def possible(self) -> bool:
        """Whether stderr is a terminal that shows 24-bit colours."""
        console = self._console
        return console.is_terminal and console.color_system == "truecolor" and not console.no_color

    def watch(
        self, number: int, num_velocities: int, updated: Callable[[], None] = lambda: None
    ) -> Callable[[Tensor], None] | None:
        """What is to see a clip's latent at each of so many velocities; None where nothing can be shown.

        `updated` is called when there is a new picture.
        """
        if not self.possible:
            return None
        colors = self._colors  # before there is a backbone, beside which there may be no room for the decoder

        def show(latent: Float[Tensor, "1 c t h w"]) -> None:
            width, height = self._console.size
            rows = max(1, min(_ROWS, height - _MARGIN))
            self._shown[number] = half_blocks(colors(latent), columns=width, rows=rows)
            updated()

        return each_few(num_velocities, show)

    def drop(self, number: int) -> None:
        """The clip is made, or will not be."""
        self._shown.pop(number, None)

    def __call__(self) -> Iterable[Segments]:
        """The one that was begun first: one picture moves less than several that take turns."""
        shown = dict(self._shown)
        return [shown[min(shown)]] if shown else []

    @cached_property
    def _colors(self) -> LatentColors:
        return fit_colors(self._decoder())
