"""Bytes and model values: the one place that fixes how 0..255 and [-1, 1] stand for each other."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def from_bytes(
    frames: UInt8[Tensor, "*b frames height width 3"],
) -> Float[Tensor, "*b 3 frames height width"]:
    """RGB bytes to float32 in [-1, 1], channels first."""
    # In place on a copy: a tile of frames is large, and each operation would make another.
    return frames.movedim(-1, -4).to(torch.float32, copy=True).div_(127.5).sub_(1)


def to_bytes(video: Float[Tensor, "*b 3 f height width"]) -> UInt8[Tensor, "*b f height width 3"]:
    """RGB in [-1, 1] to the nearest bytes, channels last; what lies outside is clamped."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-4, -1)
