"""Where a clip goes on: what is added begins as the clip ends.

What is made has been through the autoencoder, which gives the clip's own frames back nearly, not quite. Where
something moves, the clip's last frames become what the autoencoder makes of them; where all rests they stay
as they are, and the first frames that are added lose the difference by and by. So neither jumps.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch.nn.functional import avg_pool2d, max_pool2d

FADE = 8
"""Frames on each side, over which one becomes the other."""
# Up to which change, of 255, something rests: it and what is around it, in pixels. Where the clip rested
# already, and so far from what moved in it that nothing comes by, what is made may be off by more.
_RESTS, _AROUND = 2.0, 5
_RESTED, _FAR, _OFF = 6.0, 49, 24.0
Frames = UInt8[np.ndarray, "_ height width 3"]
Frame = UInt8[np.ndarray, "height width 3"]


def going_on(own: Frames, pieces: Iterable[Frames]) -> Iterator[Frames]:
    """Frames that were made, a few at a time, of which the first are to be those of a clip, its `own`."""
    rest, held, count = iter(pieces), [], 0
    for piece in rest:
        held.append(piece)
        count += len(piece)
        if count > len(own):
            break
    made, seam = np.concatenate(held), len(own)
    before, after = made[seam - 1], made[seam]
    still = np.maximum(
        resting(np.stack((before, after)), _RESTS, _AROUND),
        resting(own[-FADE:], _RESTED, _FAR) * resting(np.stack((before, after)), _OFF, _AROUND),
    )
    offset = still * (own[-1].astype(np.float32) - made[seam])
    yield _ended(own, made[:seam], still)
    yield _begun(made[seam:], 0, offset)
    done = len(made) - seam
    for piece in rest:
        yield _begun(piece, done, offset)
        done += len(piece)


def resting(frames: Frames, most: float, around: int) -> Float[np.ndarray, "height width 1"]:
    """1 where no frame differs from the last by more than `most`, and 0 where one does by twice that.

    What moves in a square of `around` pixels, an odd number, counts for its middle.
    """
    change = np.abs(frames[-1].astype(np.float32) - frames).max(axis=(0, 3))
    moves = torch.from_numpy(np.clip(change / most - 1, 0, 1))[None, None]
    near = max_pool2d(moves, around, stride=1, padding=around // 2)
    smooth = avg_pool2d(near, _AROUND, stride=1, padding=_AROUND // 2, count_include_pad=False)
    return 1 - smooth[0, 0, :, :, None].numpy()


def _ended(own: Frames, made: Frames, still: Float[np.ndarray, "height width 1"]) -> Frames:
    """The clip's frames, of which the last become those that were made where it does not rest."""
    number = np.arange(len(own)) - len(own) + FADE + 1
    share = np.clip(number / (FADE + 1), 0, 1)[:, None, None, None] * (1 - still)
    return np.rint(share * made + (1 - share) * own).astype(np.uint8)


def _begun(made: Frames, number: int, offset: Float[np.ndarray, "height width 3"]) -> Frames:
    """Added frames from `number` on, which begin with an offset and lose it."""
    left = np.clip(1 - (number + np.arange(len(made), dtype=np.float32)) / FADE, 0, 1)
    return np.rint(made + left[:, None, None, None] * offset).clip(0, 255).astype(np.uint8)
