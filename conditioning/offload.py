"""Weights that stay in main memory and visit the device block by block."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def stream(
    blocks: Iterable[nn.Module],
    device: Callable[[], torch.device],
    *,
    ahead: bool = False,
    alone: Callable[[nn.Module], Iterable[nn.Module]] = lambda _: (),
) -> None:
    """Copies of each block's weights are on `device()` while the block runs, and only then.

    The originals stay where they are, so nothing is copied back: one forward pass moves every weight once.
    Only for inference: what a block computes with are not the parameters that an optimizer would know.

    With `ahead` the copies of the next block are made while one runs, on a GPU beside its kernels: then two
    blocks are there at most. `alone` names modules of a block that are also called outside of it.
    """
    visits = []
    for block in blocks:
        visits.append(_Visit(block, device))
        for module in alone(block):
            _Visit(module, device, within=visits[-1])
    for visit, following in pairwise(visits if ahead else ()):
        visit.following, following.before = following, visit


class _Visit:
    """The two hooks of one block, and its originals while the copies stand in their places."""

    def __init__(
        self, block: nn.Module, device: Callable[[], torch.device], within: "_Visit | None" = None
    ) -> None:
        self.block, self.device, self.within = block, device, within
        self.following: _Visit | None = None
        self.before: _Visit | None = None
        self.originals: list[tuple[nn.Module, str, Tensor]] = []
        self.coming: list[tuple[nn.Module, str, Tensor, Tensor]] | None = None  # with the copies
        self.side: torch.cuda.Stream | None = None  # on which copies are made
        self.ended: torch.cuda.Event | None = None
        block.register_forward_pre_hook(self.arrive)
        block.register_forward_hook(self.leave, always_call=True)  # after an error too

    def fetch(self) -> None:
        """Begin to make the copies."""
        device = self.device()
        if device.type == "cuda" and self.side is None:
            self.side = torch.cuda.Stream(device)
        with nullcontext() if self.side is None else torch.cuda.stream(self.side):
            self.coming = [
                (module, name, own, own.detach().to(device, non_blocking=True, copy=True))
                for module in self.block.modules()
                for name, own in _own(module)
            ]

    def arrive(self, block: nn.Module, args: Any) -> None:  # noqa: ARG002
        if self.within is not None and self.within.originals:
            return
        if self.coming is None:
            self.fetch()
        coming, self.coming = self.coming or [], None
        current = None if self.side is None else torch.cuda.current_stream(self.side.device)
        if self.side is not None and current is not None:
            current.wait_stream(self.side)
        for module, name, own, copy in coming:
            if current is not None:
                copy.record_stream(
                    current
                )  # of the other stream: not to be used again before this one is done
            self.originals.append((module, name, own))
            kept = isinstance(own, nn.Parameter)
            setattr(module, name, nn.Parameter(copy, requires_grad=False) if kept else copy)
        if self.following is not None:
            if self.before is not None and self.before.ended is not None:
                self.before.ended.synchronize()  # else this process runs ahead, and more copies are there
            self.following.fetch()

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        while self.originals:
            module, name, own = self.originals.pop()
            setattr(module, name, own)
        if self.side is not None:
            self.ended = torch.cuda.Event()
            self.ended.record(torch.cuda.current_stream(self.side.device))


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    """A module's own parameters and buffers: int8 weights are buffers."""
    parameters = module.named_parameters(recurse=False, remove_duplicate=False)
    return [*parameters, *module.named_buffers(recurse=False, remove_duplicate=False)]
