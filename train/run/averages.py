"""The averaged weights of a checkpoint, put together from the shards of all ranks."""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kinoflow.configs.errors import UserError


class AveragedState(Mapping[str, Tensor]):
    """The EMA of a checkpoint (fp32; buffers and frozen parameters as they are), from the shard files alone.

    Tensors are put together when they are asked for: the whole may fit nowhere.

    Raises:
        UserError: a shard is unreadable or elements are missing.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._shards: dict[Path, dict[str, Any]] = {}
        self._shapes: dict[str, list[int]] = {}
        filled: dict[str, int] = {}
        for path in sorted(checkpoint.glob("ema_*.safetensors")):
            with self._opened(path) as shard:
                self._shards[path] = json.loads(shard.metadata()["fragments"])
                for name, piece in self._shards[path].items():
                    self._shapes[name] = piece["shape"]
                    filled[name] = filled.get(name, 0) + prod(shard.get_slice(name).get_shape())
        if not self._shards:
            raise UserError(f"{checkpoint}: no EMA shards (ema_*.safetensors), nothing to export")
        for name, shape in self._shapes.items():
            if filled[name] != prod(shape):
                raise UserError(f"{checkpoint}: {name} has {filled[name]} of {prod(shape)} elements, "
                                      "an EMA shard is missing")  # fmt: skip
        self._rest = checkpoint / "rest.safetensors"
        with self._opened(self._rest) as rest:
            self._others = list(rest.keys())

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """These tensors; each shard is opened once for all of them."""
        state = {name: torch.empty(self._shapes[name]) for name in names if name in self._shapes}
        for path, pieces in self._shards.items():
            if wanted := state.keys() & pieces.keys():
                with self._opened(path) as shard:
                    for name in wanted:
                        value, start = shard.get_tensor(name), pieces[name]["start"]
                        state[name].view(-1)[start : start + value.numel()] = value
        with self._opened(self._rest) as rest:
            state |= {name: rest.get_tensor(name) for name in names if name not in state}
        return state

    @contextmanager
    def _opened(self, path: Path) -> Iterator[Any]:
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._checkpoint}: {error}; export from an older checkpoint") from error

    def __getitem__(self, name: str) -> Tensor:
        return self.read([name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._others, *self._shapes])

    def __len__(self) -> int:
        return len(self._others) + len(self._shapes)
