"""Whether a picture is sharp, well exposed and steady in brightness."""

import numpy as np
from jaxtyping import Float, UInt8

_BLACK, _WHITE = 10, 245  # levels of 255 beyond which nothing is seen


def brightness(gray: UInt8[np.ndarray, "h w"]) -> dict[str, float]:
    """Mean and standard deviation of the levels, and the share of pixels that are black or white."""
    return {"luma": float(gray.mean()), "contrast": float(gray.std()),
            "clipped": float(((gray <= _BLACK) | (gray >= _WHITE)).mean())}  # fmt: skip


def sharpness(gray: UInt8[np.ndarray, "h w"]) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al. 2000), with half a pixel of blur against noise."""
    import cv2

    calm = cv2.GaussianBlur(gray, (3, 3), 0)
    return float(cv2.Laplacian(calm, cv2.CV_32F).var())


def flicker(luma: Float[np.ndarray, " frames"]) -> float:
    """How much the brightness goes up and down from frame to frame: of its second differences half the RMS.

    A steady fade has none; a lamp that alternates between two levels has twice their half distance.
    """
    return float(np.sqrt((np.diff(luma, 2) ** 2).mean()) / 2) if len(luma) > 2 else 0.0
