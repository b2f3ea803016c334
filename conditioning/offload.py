"""Weights that stay in main memory and visit the device block by block."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def stream(blocks: Iterable[nn.Module], device: Callable[[], torch.device]) -> None:
    """Copies of each block's weights are on `device()` while the block runs, and only then.

    The originals stay where they are, so nothing is copied back: one forward pass moves every weight once.
    Only for inference: what a block computes with are not the parameters that an optimizer would know.
    """
    for block in blocks:
        _Visit(block, device)


class _Visit:
    """The two hooks of one block, and its originals while the copies stand in their places."""

    def __init__(self, block: nn.Module, device: Callable[[], torch.device]) -> None:
        self.device = device
        self.originals: list[tuple[nn.Module, str, nn.Parameter]] = []
        block.register_forward_pre_hook(self.arrive)
        block.register_forward_hook(self.leave, always_call=True)  # after an error too

    def arrive(self, block: nn.Module, args: Any) -> None:  # noqa: ARG002
        for module in block.modules():
            for name, own in module.named_parameters(recurse=False, remove_duplicate=False):
                self.originals.append((module, name, own))
                copy = own.detach().to(self.device(), non_blocking=True)
                setattr(module, name, nn.Parameter(copy, requires_grad=False))

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        while self.originals:
            module, name, own = self.originals.pop()
            setattr(module, name, own)
