"""The averaged weights of a checkpoint, put together from the shards of all ranks."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from kinoflow.train.run.shards import Shards, opened


class AveragedState(Mapping[str, Tensor]):
    """The EMA of a checkpoint (fp32; buffers and frozen parameters as they are), from the shard files alone.

    Tensors are put together when they are asked for: the whole may fit nowhere.

    Raises:
        UserError: a shard is unreadable or elements are missing.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._averages = Shards(checkpoint, "ema")
        self._rest = checkpoint / "rest.safetensors"
        with opened(self._rest) as rest:
            self._others = list(rest.keys())

    def read(self, names: Collection[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """These tensors, the averages in fp32 or `dtype`; each shard is opened once for all of them."""
        state = self._averages.read([n for n in names if n in self._averages], dtype or torch.float32)
        with opened(self._rest) as rest:
            state |= {name: rest.get_tensor(name) for name in names if name not in state}
        return state

    def __getitem__(self, name: str) -> Tensor:
        return self.read([name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._others, *self._averages])

    def __len__(self) -> int:
        return len(self._others) + len(self._averages)
