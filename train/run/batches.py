"""Batches move as one: to pinned memory where they are made, to the device where they are used."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def pinned(batch: T) -> T:
    """The same in page-locked memory, from which a GPU copies while it computes."""
    return _mapped(batch, Tensor.pin_memory)


def moved(batch: T, device: torch.device) -> T:
    """The same on another device; what is pinned is on its way when this returns."""
    return _mapped(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor, or tuples and dataclasses of them, of numbers and of None, with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, tuple):
        return tuple(_mapped(part, change) for part in value)
    assert is_dataclass(value) and not isinstance(value, type), f"a batch of {type(value).__name__}"
    parts = {each.name: _mapped(getattr(value, each.name), change) for each in fields(value)}
    return replace(value, **parts)
