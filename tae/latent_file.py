"""Latent files: self-describing, one chunk for each encoder tile, written and read in bounded memory.

A latent file is a Zarr 3 group, one zip file (`clip.kino`) or a folder (`clip.zarr`): the array `latent`,
float16, (t, c, h, w), one chunk for each encoder tile, and attributes that say all that decoding needs.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Float16
from zarr.storage import LocalStore, ZipStore

from data.atomic import os_error_line, replacing

_FORMAT, _VERSION = "kinoflow latent", 1
_ARRAY = "latent"
_FOLDER_SUFFIX = ".zarr"


class LatentFileError(ValueError):
    """A latent file that cannot be read or written; one line that names the file and the remedy."""


@dataclass(frozen=True, kw_only=True)
class LatentInfo:
    """What a latent file says of itself: the clip it stands for, and the autoencoder that made it.

    `height` and `width` are those of the clip, before padding; `tile` is in latent frames; `tae` is where the
    weights came from, `tae_sha256` what they are. `normalized` says whether the latents have the per-channel
    statistics taken out (this version never does).
    """

    frames: int
    height: int
    width: int
    fps: Fraction
    color: dict[str, str | None]
    source: str
    tae: str
    tae_sha256: str
    channels: int
    tile: int
    normalized: bool = False

    def to_attributes(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"format": _FORMAT, "version": _VERSION, **asdict(self), "fps": str(self.fps)}

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any]) -> "LatentInfo":
        """Inverse of `to_attributes`.

        Raises:
            KeyError, TypeError, ValueError: not what `to_attributes` gives.
        """
        values = {key: attributes[key] for key in cls.__dataclass_fields__}
        return cls(**{**values, "fps": Fraction(values["fps"])})


def read_info(path: str | Path) -> LatentInfo:
    """What a latent file says of itself.

    Raises:
        LatentFileError: missing, damaged, or not a latent file of this version.
    """
    with _opened(Path(path)) as (info, _):
        return info


def read_latents(path: Path, start: int, stop: int) -> Iterator[Float16[np.ndarray, "t c h w"]]:
    """Latent frames start..stop-1 of a file, chunk by chunk.

    Raises:
        LatentFileError: missing or damaged, when the iterator reaches the fault.
    """
    with _opened(path) as (info, array):
        first = start
        while first < stop:
            last = min((first // info.tile + 1) * info.tile, stop)
            latent = np.asarray(array[first:last])
            if not np.isfinite(latent).all():  # a chunk that is not there reads as the fill value
                raise LatentFileError(
                    f"{path}: damaged, latent frames {first}:{last} are missing; encode again"
                )
            yield latent
            first = last


@contextmanager
def create(path: Path, info: LatentInfo, shape: tuple[int, int, int, int]) -> Iterator[zarr.Array]:
    """An empty array to fill; the file takes its name when the block ends without an exception."""
    folder = path.suffix == _FOLDER_SUFFIX
    if not folder and path.suffix != ".kino":
        raise LatentFileError(f"{path}: end the name in .kino (one file) or {_FOLDER_SUFFIX} (a folder)")
    try:
        with (_replacing_folder if folder else replacing)(path) as aside:
            store = LocalStore(aside) if folder else ZipStore(aside, mode="w")
            try:
                group = zarr.create_group(store=store, attributes=info.to_attributes())
                yield group.create_array(
                    _ARRAY,
                    shape=shape,
                    chunks=(info.tile, *shape[1:]),
                    dtype="float16",
                    fill_value=np.nan,
                    dimension_names=("t", "c", "h", "w"),
                )
            finally:
                store.close()
    except OSError as error:
        raise LatentFileError(os_error_line(path, error)) from error


@contextmanager
def _replacing_folder(path: Path) -> Iterator[Path]:
    if path.exists() and not (path / "zarr.json").is_file():
        raise LatentFileError(f"{path}: is there and is not a latent file; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, old = (path.with_name(f".{path.name}.{os.getpid()}.{role}") for role in ("new", "old"))
    try:
        yield aside
        if path.exists():
            path.replace(old)
        aside.replace(path)
    finally:
        for leftover in (aside, old):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[LatentInfo, zarr.Array]]:
    damaged = f"{path}: not a latent file, or damaged; make it with kinoflow tae encode"
    try:
        path.stat()
        store = LocalStore(path, read_only=True) if path.is_dir() else ZipStore(path, mode="r")
        try:
            group = zarr.open_group(store, mode="r")
            version = group.attrs.get("version")
            if group.attrs.get("format") != _FORMAT:
                raise LatentFileError(damaged)
            if version != _VERSION:
                raise LatentFileError(f"{path}: version {version}, this kinoflow reads {_VERSION}; update it")
            array = group[_ARRAY]
            if not isinstance(array, zarr.Array):
                raise LatentFileError(damaged)
            yield LatentInfo.from_attributes(dict(group.attrs)), array
        finally:
            store.close()
    except LatentFileError:
        raise
    except OSError as error:
        raise LatentFileError(os_error_line(path, error)) from error
    except Exception as error:  # zip, Zarr and its compressors each have kinds of their own
        raise LatentFileError(damaged) from error
