"""From a decoded frame to RGB as a screen shows it: matrix, range, transfer function, alpha.

Y'CbCr matrices of BT.601, BT.709, BT.2020 (non-constant luminance), FCC, SMPTE 240M and YCgCo are undone.
Linear light is encoded as sRGB; all other transfer functions for screens are shown as they are, PQ and HLG
without tone mapping. What needs another decoding to be right (constant luminance, ICtCp, logarithms, the
XYZ of cinemas) is refused.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import UInt8, UInt16

from kinoflow.data.video.info import DecodedFrame

BT709, BT601, BT2020, YCGCO = 1, 5, 9, 8
LIMITED, FULL = 1, 2
LINEAR = 8
# Without these flags swscale takes shortcuts that are up to 3 levels off and differ between processors.
_FLAGS = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
EXACT = Interpolation.BILINEAR | _FLAGS
AVERAGED = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT  # to small pictures

# H.273 matrices that swscale has coefficients for.
_CONVERTIBLE = {1: BT709, 4: 4, 5: BT601, 6: BT601, 7: 7, 9: BT2020}
_REFUSED_MATRICES = {
    10: "BT.2020 with constant luminance", 11: "SMPTE 2085", 12: "chroma-derived", 13: "chroma-derived",
    14: "ICtCp", 15: "IPT-C2", 16: "YCgCo-R", 17: "YCgCo-R",
}  # fmt: skip
_REFUSED_TRANSFERS = {9: "logarithmic", 10: "logarithmic", 17: "SMPTE 428 (XYZ)"}


def refusal(frame: DecodedFrame) -> str | None:
    """Why the colours of a frame would come out wrong, and what to do; None where they come out right."""
    is_rgb = frame.format.is_rgb
    kind = None if is_rgb else _REFUSED_MATRICES.get(frame.colorspace)
    what = "matrix"
    if kind is None:
        kind, what = _REFUSED_TRANSFERS.get(frame.color_trc), "transfer function"
    if kind is None and frame.format.name.startswith("xyz"):
        kind, what = "XYZ", "pixel format"
    if kind is None:
        return None
    return f"its colours have a {what} that is not undone here ({kind}); convert the clip to BT.709 first"


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


def to_srgb(linear: UInt16[np.ndarray, "*any"]) -> UInt8[np.ndarray, "*any"]:
    """Linear light, 0..65535 for 0..1, to sRGB bytes (IEC 61966-2-1)."""
    light = np.arange(65536) / 65535
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.uint8)[linear]


def from_ycgco(
    codes: UInt16[np.ndarray, "height width 3"], *, full: bool
) -> UInt8[np.ndarray, "height width 3"]:
    """Y, Cg, Co in 16 bits (8-bit codes times 256) to RGB (H.273, equations for MatrixCoefficients 8)."""
    luma, green, orange = np.moveaxis(codes.astype(np.float32) / 256, -1, 0)
    green, orange = green - 128, orange - 128
    if not full:
        luma, green, orange = (luma - 16) * (255 / 219), green * (255 / 224), orange * (255 / 224)
    rest = luma - green
    rgb = np.stack([rest + orange, luma + green, rest - orange], axis=-1)
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How the frames of one stream become RGB; `range` is the code that frames carry, 0 for none."""

    matrix: int
    range: int
    expand_gray: bool
    alpha: bool
    linear: bool
    premultiplied: bool

    @classmethod
    def of(cls, first: DecodedFrame, codec: str) -> "Conversion":
        """What the first decoded frame asks for."""
        # FFmpeg takes untagged grey for full range; H.264 and H.265 define it as limited.
        untagged_limited = codec in {"h264", "hevc"} and first.color_range != FULL
        limited = first.color_range == LIMITED or untagged_limited
        ycgco = first.colorspace == YCGCO and not first.format.is_rgb and len(first.format.components) > 2
        matrix = matrix_of(first.colorspace, height=first.height, width=first.width)
        alpha = any(component.is_alpha for component in first.format.components)
        return cls(
            matrix=YCGCO if ycgco else matrix,
            range=first.color_range,
            expand_gray=first.format.name.startswith("gray") and limited,
            alpha=first.format.name == "pal8" or alpha,
            linear=first.color_trc == LINEAR,
            premultiplied=codec == "exr",
        )

    def rgb(
        self,
        frame: DecodedFrame,
        reformatter: VideoReformatter,
        size: tuple[int, int],
        interpolation: Interpolation = EXACT,
    ) -> UInt8[np.ndarray, "height width 3"]:
        """One frame, brought to `size` (height, width)."""
        reformatted = partial(self._reformatted, frame, reformatter, size, interpolation=interpolation)
        if self.matrix == YCGCO:
            codes = reformatted("yuv444p16le").to_ndarray()
            shown = from_ycgco(codes, full=self.range == FULL)
            return to_srgb(shown.astype(np.uint16) * 257) if self.linear else shown
        if self.linear:
            deep = reformatted("rgba64le" if self.alpha else "rgb48le")
            light = deep.to_ndarray()
            if self.alpha and not self.premultiplied:
                return to_srgb((light[..., :3].astype(np.uint64) * light[..., 3:] // 65535).astype(np.uint16))
            return to_srgb(light[..., :3])
        shown = reformatted("rgba" if self.alpha else "rgb24").to_ndarray()
        shown = over_black(shown) if self.alpha else shown
        return expand_levels(shown) if self.expand_gray else shown

    def _reformatted(
        self,
        frame: DecodedFrame,
        reformatter: VideoReformatter,
        size: tuple[int, int],
        pixel_format: str,
        *,
        interpolation: Interpolation,
    ) -> DecodedFrame:
        ycgco = self.matrix == YCGCO  # swscale can't undo it; named otherwise, the levels stay as they are
        if ycgco:
            frame.colorspace = BT709
        return reformatter.reformat(
            frame,
            height=size[0],
            width=size[1],
            format=pixel_format,
            src_colorspace=BT709 if ycgco else self.matrix,
            dst_colorspace=BT709 if ycgco else None,
            src_color_range=(self.range or LIMITED) if ycgco else self.range,
            dst_color_range=(self.range or LIMITED) if ycgco else FULL,
            interpolation=interpolation,
            threads=1,
        )
