"""How much memory a pass through an autoencoder takes, counted before it is run, and budgets for it.

The count runs the model's own code on the meta device, which has shapes and no values, and follows which
tensors are alive at the same time. It sees whatever the layers do; it does not see scratch space inside an
operation, so a budget is filled to `FILL` only.
"""

import functools
import re
import weakref
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kinoflow.configs.errors import UserError
from kinoflow.tae.model.chunks import counted_for
from kinoflow.tae.model.config import TAEConfig
from kinoflow.tae.model.tae import TAE

Part = Literal["encode", "decode"]

# Convolutions keep copies in another layout, and blocks that were freed lie between those that are alive.
FILL = 0.6

_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**n for n, p in enumerate("kMGT", 1)}}
_UNITS |= {f"{p}iB": 1024**n for n, p in enumerate("KMGT", 1)}
_BY_NAME = {name.lower(): size for name, size in _UNITS.items()}


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "8GiB", "500MB", "1.5 GiB" or "1048576".

    Raises:
        UserError: not a positive size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", text)
    unit = _BY_NAME.get(match[2].lower()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise UserError(f"memory: {text!r} is not a size; write it as 8GiB or 500MB")
    return size


def format_bytes(size: int) -> str:
    """A size for people, in MiB, rounded up."""
    return f"{-(-size // 2**20)}MiB"


def ran_out(failure: Exception) -> bool:
    """Whether an operation failed because there was no memory for it."""
    if isinstance(failure, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(failure).lower()
    # What torch's CPU allocator, its CUDA libraries and oneDNN say in a RuntimeError of no special kind.
    return isinstance(failure, RuntimeError) and any(
        words in said
        for words in ("not enough memory", "can't allocate memory", "out of memory", "alloc_failed")
    )


@functools.lru_cache(maxsize=1024)
def peak_bytes(
    config: TAEConfig,
    part: Part,
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    on: str = "cpu",
    frames: torch.dtype | None = None,
) -> int:
    """Bytes of the tensors that are alive at the same time while a tile is encoded or decoded.

    `shape` is (frames, height, width) in frames and pixels for "encode", (t, h, w) in latent positions for
    "decode". Its input and its output count; weights don't. `on` is the type of the device, which decides how
    much is streamed at once; `frames` is the dtype of what is encoded, the model's if it is not given.
    """
    model = _on_meta(config, dtype)
    if part == "encode":
        with counted_for(on), _LiveBytes() as live, torch.no_grad():
            model.encode(torch.empty(1, 3, *shape, dtype=frames or dtype, device="meta"))
    else:
        with counted_for(on), _LiveBytes() as live, torch.no_grad():
            latent = torch.empty(1, config.latent_channels, *shape, dtype=dtype, device="meta")
            model.decode(latent, shape[0] * config.factors[0])
    return live.peak


def weight_bytes(config: TAEConfig, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of an autoencoder's weights."""
    return sum(parameter.nbytes for parameter in _on_meta(config, dtype).parameters())


@functools.lru_cache(maxsize=4)
def _on_meta(config: TAEConfig, dtype: torch.dtype) -> TAE:
    with torch.device("meta"):
        return TAE(config).to(dtype).to(memory_format=torch.channels_last_3d).eval()  # pyright: ignore[reportCallIssue]


class _LiveBytes(TorchDispatchMode):
    """The largest number of bytes of storage that operations made and that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._meet(leaf.untyped_storage())
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._lose, size)

    def _lose(self, size: int) -> None:
        self._now -= size
