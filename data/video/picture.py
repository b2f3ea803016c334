"""How a stored picture becomes the displayed one: colours, crop, orientation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Shaped, UInt8
from PIL import Image

from kinoflow.data.video.color import AVERAGED, Conversion
from kinoflow.data.video.info import DecodedFrame

_EXIF_ORIENTATION = 0x0112
_EXIF = {  # (transpose, flip rows, flip columns) of TIFF 6.0, Orientation
    1: (False, False, False), 2: (False, False, True), 3: (False, True, True), 4: (False, True, False),
    5: (True, False, False), 6: (True, False, True), 7: (True, True, True), 8: (True, True, False),
}  # fmt: skip


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

    @classmethod
    def from_matrix(cls, matrix: Sequence[int]) -> "Orientation":
        """The right-angle turn or mirroring nearest to a display matrix (ISO 14496-12, tkhd; nine numbers).

        A stored point (x, y) is shown at (a x + c y, b x + d y), with a, b, c, d = matrix[0, 1, 3, 4].
        """
        a, b, c, d = (int(matrix[index]) for index in (0, 1, 3, 4))
        transpose = abs(b) + abs(c) > abs(a) + abs(d)
        across, down = (c, b) if transpose else (a, d)
        return cls(transpose=transpose, flip_rows=down < 0, flip_columns=across < 0)

    @classmethod
    def from_exif(cls, value: int) -> "Orientation":
        """What EXIF's orientation 1..8 asks for; other values ask for nothing."""
        transpose, rows, columns = _EXIF.get(value, _EXIF[1])
        return cls(transpose=transpose, flip_rows=rows, flip_columns=columns)

    @property
    def rotation(self) -> int:
        """Clockwise turn in degrees, after mirroring where the picture is mirrored."""
        if self.transpose:
            return 90 if self.flip_columns else 270
        return 180 if self.flip_rows else 0

    @property
    def mirrored(self) -> bool:
        """Whether left and right are exchanged before the turn."""
        return (self.transpose + self.flip_rows + self.flip_columns) % 2 == 1

    def apply(self, picture: Shaped[np.ndarray, "height width c"]) -> Shaped[np.ndarray, "height2 width2 c"]:
        """Turn one picture; a view."""
        picture = picture.transpose(1, 0, 2) if self.transpose else picture
        return picture[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A frame made small, and somewhat larger where that was asked for."""

    index: int
    small: UInt8[np.ndarray, "h w 3"]
    large: UInt8[np.ndarray, "h2 w2 3"] | None


@dataclass(frozen=True, kw_only=True)
class Display:
    """Size and treatment of every picture of a stream; `stored` and `crop` are (height, width)."""

    stored: tuple[int, int]
    crop: tuple[int, int]
    orientation: Orientation
    conversion: Conversion

    def cropped(self, size: str | None) -> "Display":
        """Cut to "WxH" if that is what evening out would have made of it."""
        if size is None:
            return self
        width, _, height = size.partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            return self
        true = (int(height), int(width))
        padded = tuple(side + side % 2 for side in true)
        return replace(self, crop=true) if padded == self.stored else self

    @property
    def size(self) -> tuple[int, int]:
        """Displayed height, width."""
        return (self.crop[1], self.crop[0]) if self.orientation.transpose else self.crop

    def takes(self, frame: DecodedFrame) -> bool:
        """Whether a frame of its size fills the picture: of the same shape but for rounding to whole pixels.

        A conference recorded at a changing resolution does; a window that was resized does not.
        """
        height, width = self.stored
        return abs(frame.width * height - frame.height * width) <= max(height, width)

    def finish(
        self, frame: DecodedFrame, reformatter: VideoReformatter, longer: int | None = None
    ) -> UInt8[np.ndarray, "height2 width2 3"]:
        """From a decoded frame to the displayed picture; to a small one whose longer side is `longer`.

        That may have a line at its edge which the writer added to make sides even.
        """
        if longer is None:
            rgb = self.conversion.rgb(frame, reformatter, self.stored)
            return self.orientation.apply(rgb[: self.crop[0], : self.crop[1]])
        size = shrunk(self.stored, longer)
        return self.orientation.apply(self.conversion.rgb(frame, reformatter, size, AVERAGED))


def shrunk(size: tuple[int, int], longer: int) -> tuple[int, int]:
    """Height and width of the same aspect whose longer one is at most `longer`; neither is below 1."""
    scale = min(1.0, longer / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def shrink(picture: UInt8[np.ndarray, "h w 3"], longer: int) -> UInt8[np.ndarray, "height width 3"]:
    """A picture whose longer side is at most `longer`, each pixel the average of those it stands for."""
    height, width = shrunk(picture.shape[:2], longer)
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BOX))


def display_of(first: DecodedFrame, codec: str, orientation: Orientation) -> Display:
    """What the first decoded frame asks for."""
    size = (first.height, first.width)
    conversion = Conversion.of(first, codec)
    return Display(stored=size, crop=size, orientation=orientation, conversion=conversion)


def orientation_of(path: Path, demuxer: str, frame: DecodedFrame) -> Orientation:
    """What a file says: EXIF in a photograph, a display matrix in a clip."""
    if demuxer.endswith("_pipe") or demuxer == "image2":
        return _of_photograph(path)
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # side data that PyAV has no name for; what is left is the turn
        return Orientation.from_rotation(frame.rotation)
    if matrix is None:
        return Orientation()
    return Orientation.from_matrix(np.frombuffer(matrix, np.int32).tolist())


def exif_orientation(image: Image.Image) -> Orientation:
    """What the EXIF of an opened picture asks for."""
    return Orientation.from_exif(int(image.getexif().get(_EXIF_ORIENTATION, 1)))


def _of_photograph(path: Path) -> Orientation:
    try:
        with Image.open(path) as image:
            return exif_orientation(image)
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError):
        return Orientation()  # a kind that Pillow does not know, or EXIF that makes no sense
