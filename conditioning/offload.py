"""Weights that stay in main memory and visit the device block by block."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def stream(blocks: Iterable[nn.Module], device: Callable[[], torch.device]) -> None:
    """Each block's weights are copied to `device()` when the block runs and dropped there afterwards.

    The originals stay where they are, so nothing is copied back: one forward pass moves every weight once.
    Only for inference: the weights a block computes with are not the parameters' own.
    """
    for block in blocks:
        # A weight that two blocks share has one original.
        originals: dict[str, Tensor] = {}

        def fetch(module: nn.Module, *_: Any, originals: dict[str, Tensor] = originals) -> None:
            for name, parameter in module.named_parameters():
                originals[name] = parameter.data
                parameter.data = parameter.data.to(device(), non_blocking=True)

        def drop(module: nn.Module, *_: Any, originals: dict[str, Tensor] = originals) -> None:
            for name, parameter in module.named_parameters():
                parameter.data = originals.pop(name)

        block.register_forward_pre_hook(fetch)
        block.register_forward_hook(drop, always_call=True)
