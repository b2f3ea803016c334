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
_RESTS, _AROUND = 4.0, 5
_RESTED, _FAR, _OFF = 6.0, 49, 24.0
Frames = UInt8[np.ndarray, "_ height width 3"]


def going_on(own: Frames, pieces: Iterable[Frames]) -> Iterator[Frames]:
    """Frames that were made, a few at a time, of which the first are to be those of a clip, its `own`.

    No more of them are held than `FADE` and a piece.
    """
    if len(own) > FADE:
        yield own[:-FADE]
    rest, made, added = iter(pieces), own[:0], -len(own)
    while added <= 0:
        piece = next(rest)
        made, added = np.concatenate((made[-FADE:], piece)), added + len(piece)
    ends, begins = made[:-added][-FADE:], made[-added:]
    pair = np.stack((ends[-1], begins[0]))
    still = np.maximum(
        resting(pair, _RESTS, _AROUND),
        resting(own[-FADE:], _RESTED, _FAR) * resting(pair, _OFF, _AROUND),
    )
    offset = still * (own[-1].astype(np.float32) - begins[0])
    yield _ended(own[-FADE:], ends, still)
    yield _begun(begins, 0, offset)
    for piece in rest:
        yield _begun(piece, added, offset) if added < FADE else piece
        added += len(piece)
        del piece  # not held while the next one is made


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
    """The clip's last frames, which become those that were made where it does not rest."""
    share = (np.arange(FADE - len(own), FADE, dtype=np.float32) + 1)[:, None, None, None] / (FADE + 1)
    share = share * (1 - still)
    return np.rint(share * made + (1 - share) * own).astype(np.uint8)


def _begun(made: Frames, number: int, offset: Float[np.ndarray, "height width 3"]) -> Frames:
    """Added frames from `number` on, which begin with an offset and lose it."""
    left = np.clip(1 - (number + np.arange(len(made), dtype=np.float32)) / FADE, 0, 1)
    return np.rint(made + left[:, None, None, None] * offset).clip(0, 255).astype(np.uint8)
