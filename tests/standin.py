"""A stand-in for an accelerator where there is none: the meta device, and one device for each operation."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
_aten = torch.ops.aten
_BETWEEN = {_aten.to, _aten._to_copy, _aten.copy_}  # these are there to go from one device to another

_NUMBERS = {_aten._local_scalar_dense.default, _aten.item.default, _aten.is_nonzero.default}


class Accelerator(TorchDispatchMode):
    """What lies on `meta` computes nothing; an operation on tensors of two devices is refused, as GPUs do.

    What comes back to the CPU is zeros, and a number that is asked for is 0.5.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors((args, kwargs)))
        devices = {tensor.device.type for tensor in tensors if tensor.dim() > 0}
        if func.overloadpacket in _BETWEEN:
            return self._moved(func, args, kwargs)
        if len(devices) > 1:
            raise RuntimeError(f"{func}: tensors on {' and '.join(sorted(devices))}")
        if func in _NUMBERS and "meta" in {t.device.type for t in tensors}:
            return 0.5
        return func(*args, **kwargs)

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            return func(*args, **kwargs)
        except NotImplementedError:  # out of meta, where nothing is
            if func.overloadpacket is _aten.copy_:
                return args[0].zero_()
            said = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
            return torch.zeros(args[0].shape, dtype=said[0] if said else args[0].dtype)


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
