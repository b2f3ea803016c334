"""Tensors that are cut over processes: each writes its pieces, and any number of others reads what it needs.

A file is a safetensors file of flat pieces. Its metadata say of each the whole tensor's shape and the piece's
first element, so that neither the number of processes nor the way they cut tensors has to stay the same.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kinoflow.configs.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Elements [start, start + len(value)) of a flattened tensor of `shape`."""

    shape: tuple[int, ...]
    start: int
    value: Float[Tensor, " n"]


def write_pieces(path: Path, pieces: Mapping[str, Piece]) -> None:
    """Write the pieces of one process."""
    index = {key: {"shape": list(piece.shape), "start": piece.start} for key, piece in pieces.items()}
    values = {key: piece.value for key, piece in pieces.items()}
    save_file(values, path, metadata={"fragments": json.dumps(index)})


class Shards(Mapping[str, Tensor]):
    """The tensors of `<kind>_*.safetensors` in a folder; values are read when they are asked for.

    Raises:
        UserError: a file is unreadable, there is none, or elements are missing.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.shapes: dict[str, list[int]] = {}
        self._files: dict[Path, dict[str, tuple[int, int]]] = {}
        filled: dict[str, int] = {}
        for path in sorted(folder.glob(f"{kind}_*.safetensors")):
            spans = self._files[path] = {}
            with opened(path) as file:
                for key, piece in json.loads(file.metadata()["fragments"]).items():
                    count = file.get_slice(key).get_shape()[0]
                    spans[key] = piece["start"], piece["start"] + count
                    self.shapes[key] = piece["shape"]
                    filled[key] = filled.get(key, 0) + count
        if not self._files:
            raise UserError(f"{folder}: no {kind}_*.safetensors; take another checkpoint")
        for key, shape in self.shapes.items():
            if filled[key] != prod(shape):
                raise UserError(f"{folder}: {key} has {filled[key]} of {prod(shape)} elements, a file "
                                f"{kind}_*.safetensors is missing; take another checkpoint")  # fmt: skip

    def read(self, keys: Collection[str], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """These tensors; each file is opened once for all of them."""
        found = {key: torch.empty(self.shapes[key], dtype=dtype) for key in keys}
        for path, spans in self._files.items():
            if wanted := found.keys() & spans.keys():
                with opened(path) as file:
                    for key in wanted:
                        begin, end = spans[key]
                        found[key].view(-1)[begin:end] = file.get_tensor(key)
        return found

    def parts(self, wanted: Mapping[str, tuple[int, int]]) -> dict[str, Float[Tensor, " n"]]:
        """Elements [begin, end) of each of these flattened tensors, read from where they lie and no more."""
        found = {key: torch.empty(end - begin) for key, (begin, end) in wanted.items()}
        for path, spans in self._files.items():
            shared = {key: _overlap(spans[key], wanted[key]) for key in spans.keys() & wanted.keys()}
            with opened(path) as file:
                for key, (begin, end) in shared.items():
                    if begin < end:
                        there, here = spans[key][0], wanted[key][0]
                        piece = file.get_slice(key)[begin - there : end - there]
                        found[key][begin - here : end - here] = piece
        return found

    def __getitem__(self, key: str) -> Tensor:
        return self.read([key])[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: {error}; take another checkpoint") from error


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return max(one[0], other[0]), min(one[1], other[1])
