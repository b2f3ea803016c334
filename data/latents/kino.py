"""Latent files: one clip, self-describing, chunks of a few latent frames, written and read in bounded memory.

A latent file is a Zarr 3 group, one zip file (`clip.kino`) or a folder (`clip.zarr`): the array `latent`,
float16, (t, c, h, w), `tile` latent frames to a chunk, and attributes that say all that decoding needs. A
clip with a variable frame rate adds `ticks`, int64, the exact times of its frames; kept sound adds `sound`,
the bytes of a file that FFmpeg reads (data.video.soundtrack).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Float16
from zarr.storage import LocalStore, ZipStore

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.configs.files import replacing, replacing_folder
from kinoflow.data.video.info import MAX_RATE
from kinoflow.data.video.timeline import Presentation

CHUNK = 4  # latent frames in a chunk

_FORMAT, _VERSION = "kinoflow latent", 1
_ARRAY, _TICKS, _SOUND = "latent", "ticks", "sound"
_SOUND_CHUNK = 1 << 20
_MOST = {"frames": 1 << 40, "height": 1 << 17, "width": 1 << 17, "channels": 1 << 14, "tile": 1 << 14}
_FOLDER_SUFFIX = ".zarr"


@dataclass(frozen=True, kw_only=True)
class LatentInfo:
    """What a latent file says of itself: the clip it stands for, and the autoencoder that made it.

    `height` and `width` are those of the clip, before padding; `tile` is in latent frames; `tae` is where the
    weights came from, `tae_sha256` what they are (`configs.pretrained.fingerprint`). `source` is the name of
    the clip, or the prompt of one that was sampled; then `metadata` has its seed and settings. It goes into
    the clip that is decoded.

    With `variable_frame_rate`, `fps` is the average, and the file holds exact times in units of `time_base`
    seconds; `resampled` says that frames of the source were repeated or dropped to reach a constant `fps`.
    `sound` is the codec of the sound kept, None without; `sound_origin` is the time stamp in it of the first
    frame. `source_bytes` and `source_modified_ns` tell whether the source is still the same.
    `sample_aspect_ratio` is the width over the height of a pixel as players show it.

    Raises:
        ValueError: values that no clip has.
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
    variable_frame_rate: bool = False
    time_base: Fraction | None = None
    resampled: bool = False
    sound: str | None = None
    sound_origin: Fraction = Fraction(0)
    source_bytes: int = 0
    source_modified_ns: int = 0
    sample_aspect_ratio: Fraction = Fraction(1)
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, most in _MOST.items():
            value = getattr(self, key)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{key}: {value!r} is not a number from 1 to {most}")
        if not 0 < self.fps <= MAX_RATE or (self.variable_frame_rate and not self.time_base):
            raise ValueError(f"fps: {self.fps} with time base {self.time_base} is no frame rate")
        if self.sample_aspect_ratio <= 0:
            raise ValueError(f"sample_aspect_ratio: {self.sample_aspect_ratio} is not above 0")
        if not all(isinstance(text, str) for pair in self.metadata.items() for text in pair):
            raise ValueError("metadata: maps text to text")

    def end_of(self, path: Path, start: int, end: int | None) -> int:
        """`end`, or the end of the clip where it is None.

        Raises:
            UserError: a range outside the clip; the line names the file, `path`.
        """
        stop = self.frames if end is None else end
        if not 0 <= start < stop <= self.frames:
            raise UserError(f"{path}: has frames 0:{self.frames}, not {start}:{stop}; choose a range inside")
        return stop

    def to_attributes(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {k: str(v) if isinstance(v, Fraction) else v for k, v in asdict(self).items()}
        return {"format": _FORMAT, "version": _VERSION, **values}

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any]) -> "LatentInfo":
        """Inverse of `to_attributes`.

        Raises:
            KeyError, TypeError, ValueError: not what `to_attributes` gives.
        """
        values: dict[str, Any] = {}
        for each in fields(cls):
            required = each.default is MISSING and each.default_factory is MISSING
            if each.name in attributes or required:  # files of before lack some
                values[each.name] = attributes[each.name]
        for key in ("fps", "time_base", "sound_origin", "sample_aspect_ratio"):
            if values.get(key) is not None:
                values[key] = Fraction(values[key])
        return cls(**values)


def read_info(path: str | Path) -> LatentInfo:
    """What a latent file says of itself.

    Raises:
        UserError: missing, damaged, or not a latent file of this version.
    """
    with _opened(Path(path)) as (info, _):
        return info


def read_presentation(path: Path) -> Presentation | None:
    """Exact times of the frames of a clip with a variable frame rate, None for a constant one.

    Raises:
        UserError: missing or damaged.
    """
    with _opened(path) as (info, group):
        if not info.variable_frame_rate or info.time_base is None:
            return None
        ticks = _array(group, _TICKS, np.dtype(np.int64), (info.frames + 1,))
        return Presentation(ticks=np.asarray(ticks[:]), time_base=info.time_base)


def read_sound(path: Path) -> Iterator[bytes]:
    """The sound of a latent file, the bytes of a file of its own, piece by piece.

    Raises:
        UserError: missing, damaged, or without sound, when the iterator reaches the fault.
    """
    with _opened(path) as (info, group):
        if info.sound is None:
            raise UserError(f"{path}: holds no sound; encode it again with --audio")
        sound = _array(group, _SOUND, np.dtype(np.uint8), None)
        for start in range(0, sound.shape[0], _SOUND_CHUNK):
            yield np.asarray(sound[start : start + _SOUND_CHUNK]).tobytes()


def read_latents(
    path: Path, start: int, stop: int, shape: tuple[int, int, int, int]
) -> Iterator[Float16[np.ndarray, "t c h w"]]:
    """Latent frames start..stop-1 of a file that holds latents of `shape`, chunk by chunk.

    Raises:
        UserError: missing or damaged, when the iterator reaches the fault.
    """
    with _opened(path) as (info, group):
        array = _array(group, _ARRAY, np.dtype(np.float16), shape)
        if array.chunks != (info.tile, *shape[1:]):
            raise UserError(_damaged(path))
        first = start
        while first < stop:
            last = min((first // info.tile + 1) * info.tile, stop)
            latent = np.asarray(array[first:last])
            if not np.isfinite(latent).all():  # a chunk that is not there reads as the fill value
                raise UserError(f"{path}: damaged, latent frames {first}:{last} are missing; encode again")
            yield latent
            first = last


@contextmanager
def create(
    path: Path,
    info: LatentInfo,
    shape: tuple[int, int, int, int],
    *,
    presentation: Presentation | None = None,
    sound: Path | None = None,
) -> Iterator[zarr.Array]:
    """An empty array to fill; the file takes its name when the block ends without an exception.

    `presentation` goes with a variable frame rate, `sound` (a file of its own) with kept sound.
    """
    folder = path.suffix == _FOLDER_SUFFIX
    if not folder and path.suffix != ".kino":
        raise UserError(f"{path}: end the name in .kino (one file) or {_FOLDER_SUFFIX} (a folder)")
    try:
        with (_replacing_folder if folder else replacing)(path) as aside:
            store = LocalStore(aside) if folder else ZipStore(aside, mode="w")
            try:
                group = zarr.create_group(store=store, attributes=info.to_attributes())
                if presentation is not None:
                    group.create_array(_TICKS, data=presentation.ticks)
                if sound is not None:
                    _store_sound(group, sound)
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
        raise UserError(os_error_line(path, error)) from error


def write(path: Path, info: LatentInfo, latents: Float16[np.ndarray, "t c h w"]) -> None:
    """Write the latent file of a whole clip, without sound.

    Raises:
        UserError: the file cannot be written.
    """
    with create(path, info, latents.shape) as array:
        array[:] = latents


def _store_sound(group: zarr.Group, sound: Path) -> None:
    size = sound.stat().st_size
    array = group.create_array(_SOUND, shape=(size,), chunks=(_SOUND_CHUNK,), dtype="uint8")
    with sound.open("rb") as file:
        for start in range(0, size, _SOUND_CHUNK):
            part = np.frombuffer(file.read(_SOUND_CHUNK), np.uint8)
            array[start : start + len(part)] = part


@contextmanager
def _replacing_folder(path: Path) -> Iterator[Path]:
    if path.exists() and not (path / "zarr.json").is_file():
        raise UserError(f"{path}: is there and is not a latent file; choose another name")
    with replacing_folder(path) as aside:
        yield aside


def _damaged(path: Path) -> str:
    return f"{path}: not a latent file, or damaged; make it with kinoflow tae encode"


@contextmanager
def _opened(path: Path) -> Iterator[tuple[LatentInfo, zarr.Group]]:
    try:
        path.stat()
        if not (path.is_file() or path.is_dir()):  # a pipe would be waited for
            raise UserError(_damaged(path))
        store = LocalStore(path, read_only=True) if path.is_dir() else ZipStore(path, mode="r")
        try:
            group = zarr.open_group(store, mode="r")
            version = group.attrs.get("version")
            if group.attrs.get("format") != _FORMAT:
                raise UserError(_damaged(path))
            if version != _VERSION:
                raise UserError(f"{path}: version {version}, this kinoflow reads {_VERSION}; update it")
            yield LatentInfo.from_attributes(dict(group.attrs)), group
        finally:
            store.close()
    except UserError:
        raise
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error
    except Exception as error:  # zip, Zarr and its compressors each have kinds of their own
        raise UserError(_damaged(path)) from error


def _array(group: zarr.Group, name: str, dtype: np.dtype, shape: tuple[int, ...] | None) -> zarr.Array:
    """An array of the kind that `create` writes.

    Raises:
        KeyError, TypeError: no such array, or another kind.
    """
    array = group[name]
    if not isinstance(array, zarr.Array) or array.dtype != dtype or (shape or array.shape) != array.shape:
        raise TypeError(f"{name}: not the array that was written")
    return array
