"""Where the text encoders' checkpoints lie: folders, or ids of the Hugging Face hub.

Known ids, their widths and the parts that are read:

    google/ul2                         4096   the encoder half of 20B: 16 GiB in bfloat16
    google/byt5-small, -base, -large   1472, 1536, 1536
    google/byt5-xl, -xxl               2560, 4672
    facebook/metaclip-h14-fullcc2.5b   1024   the text tower, 77 positions stretched to 256
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from kinoflow.configs.errors import UserError, one_line
from kinoflow.configs.pretrained import resolve_folder

# In the order in which the states are handed on. Limits in tokens, end token included (Movie Gen leaves the
# first and the last open; others use these).
LIMITS = {"ul2": 512, "byt5": 100, "metaclip": 256}
# Folders of Stable Diffusion 3's encoders; those of their tokenizers are numbered alike.
CLIP_T5 = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5": "text_encoder_3"}
CLIP_T5_TOKENIZERS = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5": "tokenizer_3"}
_INDEX = "model_index.json"
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_READ = ("*.json", "*.txt", "*.model")
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_HASHED = (*_READ, *_WEIGHTS, "diffusion_pytorch_model*.safetensors")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which text encoders a release has, and how they are held: `text` in kinoflow.yaml."""

    ul2: str = ""
    """Folder or hub id; empty for the release's own text/ul2."""
    byt5: str = ""
    """Folder or hub id; empty for the release's own text/byt5."""
    metaclip: str = ""
    """Folder or hub id; empty for the release's own text/metaclip."""
    clip_t5: str = ""
    """Folder or hub id of Stable Diffusion 3, whose CLIP towers and T5 stand in the place of the three."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and states."""
    offload: tuple[str, ...] = ()
    """Encoders (ul2, byt5) whose weights stay in main memory and visit the GPU block by block."""

    def __post_init__(self) -> None:
        for name in self.offload:
            if name not in ("ul2", "byt5"):
                raise UserError(f"text.offload: {name!r} is not ul2 or byt5, the encoders made of T5 blocks")

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch names it."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]

    def sources(self, release: Path) -> dict[str, str]:
        """A folder or hub id for each encoder; relative folders are looked for in the release first."""
        given = {name: getattr(self, name) for name in LIMITS}
        return {
            name: str(release / (source or f"text/{name}"))
            if not source or (release / source).is_dir()
            else source
            for name, source in given.items()
        }


@dataclass(frozen=True, kw_only=True)
class Source:
    """One encoder's checkpoint: a local folder, or a repository of the hub and a folder in it."""

    name: str
    location: str
    subfolder: str = ""

    def __str__(self) -> str:
        return f"{self.location}/{self.subfolder}" if self.subfolder else self.location

    def folder(self) -> Path:
        """The local folder; what lies on the hub is fetched into its cache first, other libraries' files not.

        Raises:
            UserError: no such folder, or the hub can't be reached and has not been before.
        """
        if Path(self.location).is_dir():
            return Path(self.location) / self.subfolder
        if not _HUB_ID.fullmatch(self.location):
            raise UserError(
                f"{self}: no such folder; a release has its {self.name} encoder there, give its text/ folder"
            )
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        folder = Path()
        for weights in _WEIGHTS:  # old repositories hold pickled weights only; new ones often hold both
            folder = self._fetch([prefix + pattern for pattern in (*_READ, weights)]) / self.subfolder
            if any(folder.glob(weights)):
                break
        return folder

    def _fetch(self, patterns: list[str]) -> Path:
        try:
            return Path(snapshot_download(self.location, allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(
                f"{self}: the {self.name} encoder is neither a folder here nor readable from the hub; check "
                f"the id and the network, or download it elsewhere and give its folder ({one_line(error)})"
            ) from None


def find(source: str | Path | Mapping[str, str | Path]) -> list[Source]:
    """The checkpoints of a mapping of names, or of a folder or hub id with ul2/, byt5/ and metaclip/."""
    if isinstance(source, Mapping):
        if set(source) != set(LIMITS):
            raise UserError(
                f"text encoders: the names must be {', '.join(LIMITS)}, not {', '.join(source) or 'none'}"
            )
        return [Source(name=name, location=str(source[name])) for name in LIMITS]
    if Path(source).is_dir():
        return [Source(name=name, location=str(Path(source) / name)) for name in LIMITS]
    return [Source(name=name, location=str(source), subfolder=name) for name in LIMITS]


def clip_t5_folder(source: str) -> Path:
    """The diffusers folder of Stable Diffusion 3's text encoders; of a hub id they alone are fetched.

    Raises:
        UserError: neither a folder nor readable from the hub, or no folder of diffusers.
    """
    patterns = [
        f"{part}/{name}"
        for part in CLIP_T5.values()
        for name in ("*.json", "model.safetensors", "model-0*.safetensors")
    ]
    folder = resolve_folder(
        source, [_INDEX, *patterns, *(f"{part}/*" for part in CLIP_T5_TOKENIZERS.values())]
    )
    if not (folder / _INDEX).is_file():
        raise UserError(
            f"text.clip_t5: {source} has no {_INDEX}; name a folder or hub id of Stable Diffusion 3"
        )
    return folder


def has_t5(folder: Path) -> bool:
    """Whether a diffusers folder of Stable Diffusion 3 names a T5: without it its states are zeros."""
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return bool((index.get(CLIP_T5["t5"]) or [None])[0])


def clip_t5_fingerprint(folder: Path) -> str:
    """What names the text encoders and tokenizers of such a folder."""
    names = [name for name in CLIP_T5 if name != "t5" or has_t5(folder)]
    parts = [part[name] for part in (CLIP_T5, CLIP_T5_TOKENIZERS) for name in names]
    return " ".join(f"{part}={fingerprint(folder / part)}" for part in parts)


def fingerprint(folder: Path) -> str:
    """SHA-256 over a checkpoint's weights, tokenizer and configuration; a hub snapshot's is its commit.

    Reading 20 GiB takes some 15 s; a snapshot never changes, so nothing of it needs to be read.
    """
    for parent in (folder, *folder.parents):
        if parent.parent.name == "snapshots" and _COMMIT.fullmatch(parent.name):
            named = f"{parent.parent.parent.name}@{parent.name}/{folder.relative_to(parent)}"
            return hashlib.sha256(named.encode()).hexdigest()
    files = sorted(path for pattern in _HASHED for path in folder.glob(pattern))
    return _hash_files(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@lru_cache(maxsize=16)
def _hash_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
