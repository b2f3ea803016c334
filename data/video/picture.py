"""How a stored picture becomes the displayed one: orientation, colour matrix and range, alpha."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Shaped, UInt8

from kinoflow.data.video.info import DecodedFrame

BT709, BT601, BT2020 = 1, 5, 9
LIMITED, FULL = 1, 2
# H.273 matrices that swscale has coefficients for.
_CONVERTIBLE = {1: BT709, 4: 4, 5: BT601, 6: BT601, 7: 7, 9: BT2020, 10: BT2020}


def matrix_of(tag: int, *, height: int, width: int) -> int:
    """The YCbCr matrix to undo: the tagged one, else what players assume (BT.709 for HD, BT.601 below)."""
    return _CONVERTIBLE.get(tag, BT709 if width >= 1280 or height > 576 else BT601)


def expand_levels(picture: UInt8[np.ndarray, "*any"]) -> UInt8[np.ndarray, "*any"]:
    """Limited levels 16..235 to 0..255."""
    levels = (np.arange(256) - 16.0) * 255 / 219
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)[picture]


def over_black(picture: UInt8[np.ndarray, "height width 4"]) -> UInt8[np.ndarray, "height width 3"]:
    """Composite straight alpha over black."""
    color, alpha = picture[..., :3].astype(np.uint16), picture[..., 3:].astype(np.uint16)
    return ((color * alpha + 127) // 255).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Orientation:
    """From the stored picture to the displayed one: transpose, then flip."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @classmethod
    def from_rotation(cls, degrees: int) -> "Orientation":
        """The right-angle turn nearest to `degrees` counterclockwise."""
        turn = round(degrees / 90) % 4
        return cls(transpose=turn % 2 == 1, flip_rows=turn in (1, 2), flip_columns=turn in (2, 3))

    @property
    def rotation(self) -> int:
        """Clockwise turn in degrees (a mirrored picture counts as the turn that is left)."""
        if self.transpose:
            return 90 if self.flip_columns else 270
        return 180 if self.flip_rows else 0

    def apply(self, picture: Shaped[np.ndarray, "height width c"]) -> Shaped[np.ndarray, "height2 width2 c"]:
        """Turn one picture; a view."""
        picture = picture.transpose(1, 0, 2) if self.transpose else picture
        return picture[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


@dataclass(frozen=True, kw_only=True)
class Display:
    """Size and treatment of every picture of a stream; `stored` and `crop` are (height, width)."""

    stored: tuple[int, int]
    crop: tuple[int, int]
    orientation: Orientation
    matrix: int
    range: int
    expand_gray: bool
    alpha: bool

    def cropped(self, size: str | None) -> "Display":
        """Cut to "WxH" if that is what evening out would have made of it."""
        if size is None:
            return self
        width, _, height = size.partition("x")
        if not (width.isdigit() and height.isdigit()):
            return self
        true = (int(height), int(width))
        padded = tuple(side + side % 2 for side in true)
        return replace(self, crop=true) if padded == self.stored else self

    @property
    def size(self) -> tuple[int, int]:
        """Displayed height, width."""
        return (self.crop[1], self.crop[0]) if self.orientation.transpose else self.crop

    def finish(self, picture: UInt8[np.ndarray, "height width c"]) -> UInt8[np.ndarray, "height2 width2 3"]:
        """From converted pixels (RGB, or RGBA with alpha) to the displayed picture."""
        picture = over_black(picture) if self.alpha else picture
        picture = expand_levels(picture) if self.expand_gray else picture
        return self.orientation.apply(picture[: self.crop[0], : self.crop[1]])


def display_of(first: DecodedFrame, codec: str) -> Display:
    """What the first decoded frame asks for."""
    # FFmpeg takes untagged grey for full range; H.264 and H.265 define it as limited.
    untagged_limited = codec in {"h264", "hevc"} and first.color_range != FULL
    limited = first.color_range == LIMITED or untagged_limited
    size = (first.height, first.width)
    return Display(
        stored=size,
        crop=size,
        # Not from the frame's side_data: PyAV has no name for a photograph's EXIF there, and may crash later.
        orientation=Orientation.from_rotation(first.rotation),
        matrix=matrix_of(first.colorspace, height=first.height, width=first.width),
        range=first.color_range,
        expand_gray=first.format.name.startswith("gray") and limited,
        alpha=first.format.name == "pal8" or any(component.is_alpha for component in first.format.components),
    )
