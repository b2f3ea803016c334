"""Near duplicates: the same shot at another size, bitrate or length, found by hashes of its pictures.

Two clips are compared when two of their pictures have the same 16 bits in a quarter of their hashes, which is
sure where a pair of pictures differs by three bits or fewer; so time and memory grow with the clips and not
with their pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import UInt8, UInt64

_SIDE, _LOW = 32, 8  # of the picture that is transformed, and of the low frequencies that are kept
_FLATTEST = 4.0  # levels of 255: pictures of less contrast are all alike
_BANDS, _BITS = 4, 16
_CROWD = 200  # clips with the same band: what they share is a logo or a slate, not a shot
_ALIKE = 0.5  # share of the pictures of the shorter clip that the other one has too


@dataclass(frozen=True, kw_only=True)
class Hashed:
    """A clip by the hashes of its pictures in their order; `shot` is equal for pieces of one shot."""

    hashes: UInt64[np.ndarray, " pictures"]
    shot: tuple[str, int]


def picture_hash(gray: UInt8[np.ndarray, "h w"]) -> int:
    """Which of the 63 lowest frequencies of a picture are above their median (pHash); 0 of a flat one."""
    import cv2

    if cv2.meanStdDev(gray)[1].item() < _FLATTEST:
        return 0
    small = cv2.resize(gray, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:_LOW, :_LOW].reshape(-1)[1:]
    bits = low > np.partition(low, _LOW**2 // 2 - 1)[_LOW**2 // 2 - 1]  # the median of 63
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little") or 1


def duplicates(clips: Sequence[Hashed], bits: int) -> dict[int, int]:
    """Which clips repeat another, and which one: of clips alike the first stays.

    Pieces of one shot do not repeat each other. Two pictures are alike that differ by at most `bits` of 64.
    """
    found: dict[int, int] = {}
    neighbours = _neighbours(clips)
    for index, clip in enumerate(clips):
        for other in sorted(neighbours.get(index, ())):
            if other < index and other not in found and _alike(clip, clips[other], bits):
                found[index] = other
                break
    return found


def _neighbours(clips: Sequence[Hashed]) -> dict[int, set[int]]:
    """The clips that share a band with each."""
    owner = np.repeat(np.arange(len(clips)), [len(clip.hashes) for clip in clips])
    hashes = np.concatenate([clip.hashes for clip in clips]) if clips else np.empty(0, np.uint64)
    owner, hashes = owner[hashes != 0], hashes[hashes != 0]
    found: dict[int, set[int]] = {}
    for band in range(_BANDS):
        values = (hashes >> np.uint64(band * _BITS)) & np.uint64(2**_BITS - 1)
        pairs = np.unique(np.stack([values.astype(np.int64), owner]), axis=1)
        for group in np.split(pairs[1], np.flatnonzero(np.diff(pairs[0])) + 1):
            for one, other in combinations(group.tolist(), 2) if len(group) <= _CROWD else ():
                if clips[one].shot != clips[other].shot:
                    found.setdefault(one, set()).add(other)
                    found.setdefault(other, set()).add(one)
    return found


def _alike(one: Hashed, other: Hashed, bits: int) -> bool:
    """Whether the shorter clip's pictures, but for flat ones, are among the other's."""
    seen = [each.hashes[each.hashes != 0] for each in (one, other)]
    shorter, longer = sorted(seen, key=len)
    if len(shorter) == 0:
        return False
    nearest = np.bitwise_count(shorter[:, None] ^ longer[None]).min(axis=1)
    return bool((nearest <= bits).mean() >= _ALIKE)
