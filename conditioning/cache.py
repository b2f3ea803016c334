"""States of texts on disk: a prompt with another seed, a caption that comes again, is encoded once.

    folder/<encoder>-<hash>/<ab>/<sha256 of the text>.safetensors      hidden [l, d], real tokens only

The hash is over the weights, the tokenizer, the token limit and the dtype: another encoder has a folder of
its own. Entries are written aside and renamed, so that any number of processes may share a cache, and a
killed one leaves whole entries. An entry that is damaged is made anew. Nothing is ever removed: to free
space, delete the folder, or the folders of encoders that are no longer used, at any time.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kinoflow.conditioning.checkpoints import LIMITS
from kinoflow.conditioning.embedding import Encoded, TextEmbedding, warn_of_cuts
from kinoflow.configs.errors import UserError, one_line
from kinoflow.configs.files import replacing

# Counts changes of this file's format and of what becomes of a text before and after the weights.
_FORMAT = 1


@runtime_checkable
class BatchEncoder(Protocol):
    """What a cache asks of a PretrainedEncoder."""

    @property
    def limit(self) -> int: ...

    def encode(self, texts: list[str]) -> Encoded: ...

    def to(self, device: torch.device, dtype: torch.dtype) -> "BatchEncoder": ...


@dataclass(frozen=True, kw_only=True)
class _Entry:
    hidden: Float[Tensor, "l d"]
    cut_at: int | None
    """The encoder's limit when the text was longer."""


class CachedEncoder(nn.Module):
    """A text encoder that looks into a cache first, and is loaded only when something is missing there.

    States are bit for bit those that were computed when the text was first met. Kernels round differently
    at each batch size: where the last bits matter, as in sampling, texts come one at a time, and the cache
    should not be one that is filled in batches.

    Args:
        name: "ul2", "byt5" or "metaclip".
        identity: says which checkpoint it is (`checkpoints.fingerprint`).
        dtype: of the weights and of the states, until ``.to`` changes it.
        load: gives the encoder, in that dtype.
        cache: the folder; made when it is first written.
    """

    def __init__(
        self, *, name: str, identity: str, dtype: torch.dtype, load: Callable[[], BatchEncoder], cache: Path
    ) -> None:
        super().__init__()
        self.name, self.cache = name, cache
        self._identity, self._load = identity, load
        self._encoder: BatchEncoder | None = None
        # Says where .to() has moved this module, before there is any weight to ask.
        self.register_buffer("anchor", torch.empty(0, dtype=dtype), persistent=False)
        self.anchor: Tensor

    @property
    def width(self) -> int:
        """Width of the states; the null prompt's tell it."""
        return self([""]).hidden.shape[2]

    def forward(self, texts: list[str]) -> TextEmbedding:
        """Encode texts to ``hidden (b, l, d)`` and ``mask (b, l)``, l the longest text's tokens.

        Raises:
            UserError: the cache's folder can't be written.
            UserError: the encoder is needed and can't be loaded.
        """
        folder = self.cache / f"{self.name}-{self._hash()}"
        entries = {text: _read(_path(folder, text), text) for text in texts}
        missing = [text for text, entry in entries.items() if entry is None]
        if missing:
            for text, entry in zip(missing, self._compute(missing), strict=True):
                _write(_path(folder, text), text, entry)
                entries[text] = entry
        found = [entry for text in texts if (entry := entries[text]) is not None]
        limits = {entry.cut_at for entry in found if entry.cut_at is not None}
        warn_of_cuts(self.name, max(limits, default=0), [e.cut_at is not None for e in found])
        return self._padded([entry.hidden for entry in found])

    def _compute(self, texts: list[str]) -> list[_Entry]:
        if self._encoder is None:
            self._encoder = self._load().to(self.anchor.device, self.anchor.dtype)
        encoded = self._encoder.encode(texts)
        rows = zip(encoded.states.hidden, encoded.states.mask, encoded.cut, strict=True)
        limit = self._encoder.limit
        return [_Entry(hidden=hidden[mask], cut_at=limit if cut else None) for hidden, mask, cut in rows]

    def _padded(self, states: list[Float[Tensor, "_ d"]]) -> TextEmbedding:
        hidden = nn.utils.rnn.pad_sequence([each.to(self.anchor) for each in states], batch_first=True)
        lengths = torch.tensor([len(each) for each in states], device=hidden.device)
        mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        return TextEmbedding(hidden=hidden, mask=mask)

    def _hash(self) -> str:
        what = f"{_FORMAT} {self.name} {self._identity} {LIMITS[self.name]} {self.anchor.dtype}"
        return hashlib.sha256(what.encode()).hexdigest()[:16]


def _path(folder: Path, text: str) -> Path:
    key = hashlib.sha256(text.encode()).hexdigest()
    return folder / key[:2] / f"{key}.safetensors"


def _checksum(text: str, entry: _Entry) -> str:
    digest = hashlib.sha256(f"{entry.cut_at} {text}".encode())
    digest.update(entry.hidden.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, text: str) -> _Entry | None:
    """The entry of a text; None when there is none or it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            about, hidden = file.metadata() or {}, file.get_tensor("hidden")
        entry = _Entry(hidden=hidden, cut_at=int(about["cut_at"]) or None)
        return entry if about["sha256"] == _checksum(text, entry) else None
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _write(path: Path, text: str, entry: _Entry) -> None:
    entry = replace(entry, hidden=entry.hidden.detach().cpu().contiguous())
    about = {"text": text, "cut_at": str(entry.cut_at or 0), "sha256": _checksum(text, entry)}
    try:
        with replacing(path) as aside:
            save_file({"hidden": entry.hidden}, aside, metadata=about)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path.parents[2]}: text states can't be kept there ({one_line(error)}); free space, check "
            "its rights, or name another cache folder"
        ) from error
