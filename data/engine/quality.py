"""Whether a picture is sharp, well exposed and steady in brightness."""

import math

import numpy as np
from jaxtyping import Float, UInt8

_BLACK, _WHITE = 10, 245  # levels of 255 beyond which nothing is seen
_LEVELS = np.arange(256.0)


def brightness(gray: UInt8[np.ndarray, "h w"]) -> dict[str, float]:
    """Mean and standard deviation of the levels, and the share of pixels that are black or white."""
    import cv2

    counts = cv2.calcHist([gray], [0], None, [256], [0, 256]).reshape(-1).astype(np.float64)
    luma = float(counts @ _LEVELS) / gray.size
    variance = float(counts @ (_LEVELS - luma) ** 2) / gray.size
    clipped = counts[: _BLACK + 1].sum() + counts[_WHITE:].sum()
    return {"luma": luma, "contrast": math.sqrt(variance), "clipped": float(clipped) / gray.size}


def sharpness(gray: UInt8[np.ndarray, "h w"]) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al. 2000), with half a pixel of blur against noise."""
    import cv2

    calm = cv2.GaussianBlur(gray, (3, 3), 0)
    _, deviation = cv2.meanStdDev(cv2.Laplacian(calm, cv2.CV_16S))
    return float(deviation.item()) ** 2


def flicker(luma: Float[np.ndarray, " frames"]) -> float:
    """How much the brightness goes up and down from frame to frame: of its second differences half the RMS.

    A steady fade has none; a lamp that alternates between two levels has twice their half distance.
    """
    return float(np.sqrt((np.diff(luma, 2) ** 2).mean()) / 2) if len(luma) > 2 else 0.0
