"""Memory for what a layer computes on the way: kept from call to call, because fresh pages cost time."""

import math
import threading

import torch
from torch import Tensor

from kinoflow.tae.model.chunks import streams

# What is larger is asked for each time: it would be held for as long as the process lives.
KEPT_BYTES = 64 << 20


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.blocks: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialized tensor of that shape, with the dtype and on the device of `like`.

        On a CPU it lies where the last one of that name in this thread lay: what that one held is lost.
        """
        size = math.prod(shape) * like.element_size()
        if like.device.type != "cpu" or size > KEPT_BYTES:
            return like.new_empty(shape)
        if name not in self.blocks or self.blocks[name].numel() < size:
            with torch.inference_mode(
                mode=False
            ):  # one that is made in that mode can't be written outside it
                self.blocks[name] = torch.empty(size, dtype=torch.uint8)
        return self.blocks[name][:size].view(like.dtype).view(shape)


take = _Scratch().take


def concatenate(pieces: list[Tensor], dim: int) -> Tensor:
    """`torch.cat`; without gradients the result lies where the last one did, which is lost."""
    if not streams():
        return torch.cat(pieces, dim)
    shape = list(pieces[0].shape)
    shape[dim] = sum(piece.shape[dim] for piece in pieces)
    return torch.cat(pieces, dim, out=take("concatenated", tuple(shape), pieces[0]))
