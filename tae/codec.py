"""Clips to latent files and back, tile by tile, in bounded memory.

A latent file is a Zarr 3 group, one zip file (`clip.kino`) or a folder (`clip.zarr`): the array `latent`,
float16, (t, c, h, w), one chunk for each encoder tile, and attributes that say all that decoding needs.
Frames are padded to multiples of the spatial factor by repeating the last row and column, and cropped again.
`reconstruct` rounds its latents to float16 as well, so it gives the frames of `encode` followed by `decode`.
Sound is not kept.
"""

import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from jaxtyping import Float, Float16, UInt8
from torch import Tensor
from zarr.storage import LocalStore, ZipStore

from configs.pretrained import fingerprint
from data import video
from data.atomic import os_error_line, replacing
from tae.model import TAE
from tae.pixels import from_bytes, to_bytes
from tae.tiling import (
    Decode,
    Encode,
    SpatialTiling,
    TemporalTiling,
    decode_stream,
    encode_stream,
    spatial_decoder,
    spatial_encoder,
)

_FORMAT, _VERSION = "kinoflow latent", 1
_ARRAY = "latent"
_FOLDER_SUFFIX = ".zarr"

Progress = Callable[[int], None]


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


@dataclass(frozen=True, kw_only=True)
class FramePair:
    """Frames of a clip and what the autoencoder makes of them."""

    source: UInt8[np.ndarray, "frames height width 3"]
    decoded: UInt8[np.ndarray, "frames height width 3"]


class Codec:
    """An autoencoder with its tiling and the name that latent files know it by.

    Args:
        tae: model in evaluation mode, on the device to work on.
        name: where its weights came from, for people.
        spatial_tile: pixels a side above which frames are cut into overlapping tiles; None never cuts.
    """

    def __init__(self, tae: TAE, *, name: str, spatial_tile: int | None = None) -> None:
        self.name, self.sha256 = name, fingerprint(tae.state_dict())
        self._factors = tae.config.factors
        self._channels = tae.config.latent_channels
        self._device = next(tae.parameters()).device
        self._tiling = TemporalTiling(factor=self._factors[0])
        quiet = torch.inference_mode()
        self._encode: Encode = quiet(lambda clip: tae.encode(clip).mean)
        self._decode: Decode = quiet(tae.decode)
        if spatial_tile is not None:
            cells = max(1, spatial_tile // max(self._factors[1:]))
            spatial = SpatialTiling(factors=self._factors[1:], tile=cells, overlap=cells // 4)
            self._encode = spatial_encoder(self._encode, spatial)
            self._decode = spatial_decoder(self._decode, spatial)

    @property
    def tile_frames(self) -> int:
        """Frames in one encoder tile."""
        return self._tiling.frames

    def latent_bytes(self, frames: int, height: int, width: int) -> int:
        """Bytes of the float16 latents of a clip, before compression."""
        return 2 * math.prod(self._latent_shape(frames, height, width))

    def encode(self, source: str | Path, path: str | Path, progress: Progress | None = None) -> LatentInfo:
        """Write the latent file of a clip; `progress` is told the number of frames done.

        Raises:
            VideoError: the clip cannot be read.
            LatentFileError: the file cannot be written.
        """
        clip, path = video.probe(source), Path(path)
        info = LatentInfo(
            frames=clip.frames,
            height=clip.height,
            width=clip.width,
            fps=clip.fps,
            color=asdict(clip.color),
            source=clip.path.name,
            tae=self.name,
            tae_sha256=self.sha256,
            channels=self._channels,
            tile=self._tiling.tile,
        )
        latents = self._latents(video.stream(source, chunk=self.tile_frames))
        shape = self._latent_shape(info.frames, info.height, info.width)
        with _created(path, info, shape) as array:
            for index, latent in enumerate(latents):
                start = index * info.tile
                array[start : start + len(latent)] = latent
                if progress is not None:
                    progress(min((index + 1) * self.tile_frames, info.frames))
        return info

    def decode(
        self, path: str | Path, *, start: int = 0, end: int | None = None
    ) -> Iterator[UInt8[np.ndarray, "frames height width 3"]]:
        """Frames start..end-1 of a latent file, piece by piece; reads and decodes only the tiles they need.

        Raises:
            LatentFileError: not a latent file, damaged, of another autoencoder, or a range outside it.
        """
        path = Path(path)
        info = read_info(path)
        if info.tae_sha256 != self.sha256:
            raise LatentFileError(
                f"{path}: made by the autoencoder {info.tae} ({info.tae_sha256[:12]}), not {self.name} "
                f"({self.sha256[:12]}); give that one with --weights"
            )
        end = info.frames if end is None else end
        if not 0 <= start < end <= info.frames:
            raise LatentFileError(
                f"{path}: has frames 0:{info.frames}, not {start}:{end}; choose a range inside"
            )
        tiles = self._tiling.decoder_tiles(info.frames, start, end)
        yield from self._frames(_read(path, tiles[0].start, tiles[-1].stop), info, start, end)

    def reconstruct(self, source: str | Path) -> Iterator[FramePair]:
        """A clip beside what encoding and decoding make of it, without a file in between.

        Raises:
            VideoError: the clip cannot be read.
        """
        clip = video.probe(source)
        waiting: deque[np.ndarray] = deque()

        def kept() -> Iterator[np.ndarray]:
            for frames in video.stream(source, chunk=self.tile_frames):
                waiting.extend(frames)
                yield frames

        for decoded in self._frames(self._latents(kept()), clip, 0, clip.frames):
            original = np.stack([waiting.popleft() for _ in decoded])
            yield FramePair(source=original, decoded=decoded)

    def _latents(self, clips: Iterable[np.ndarray]) -> Iterator[Float16[np.ndarray, "t c h w"]]:
        videos = (self._to_model(frames) for frames in clips)
        for latent in encode_stream(videos, self._encode, self._tiling):
            stored = latent[0].transpose(0, 1).to(torch.float16)
            if not stored.isfinite().all():
                raise LatentFileError(f"{self.name}: gives latents beyond float16; train it further")
            yield stored.cpu().numpy()

    def _frames(
        self, latents: Iterable[np.ndarray], clip: LatentInfo | video.VideoInfo, start: int, end: int
    ) -> Iterator[UInt8[np.ndarray, "frames height width 3"]]:
        stored = (
            torch.from_numpy(latent).to(self._device).float().transpose(0, 1)[None] for latent in latents
        )
        pieces = decode_stream(stored, self._decode, self._tiling, frames=clip.frames, start=start, end=end)
        for piece in pieces:
            yield to_bytes(piece[0, :, :, : clip.height, : clip.width]).cpu().numpy()

    def _to_model(self, frames: UInt8[np.ndarray, "f height width 3"]) -> Float[Tensor, "1 3 f rows columns"]:
        clip = from_bytes(torch.from_numpy(frames).to(self._device)[None])
        rows, columns = (
            -side % factor for side, factor in zip(clip.shape[3:], self._factors[1:], strict=True)
        )
        return torch.nn.functional.pad(clip, (0, columns, 0, rows, 0, 0), mode="replicate")

    def _latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        _, rows, columns = self._factors
        return self._tiling.latent_frames(frames), self._channels, -(-height // rows), -(-width // columns)


def read_info(path: str | Path) -> LatentInfo:
    """What a latent file says of itself.

    Raises:
        LatentFileError: missing, damaged, or not a latent file of this version.
    """
    with _opened(Path(path)) as (info, _):
        return info


def _read(path: Path, start: int, stop: int) -> Iterator[Float16[np.ndarray, "t c h w"]]:
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
def _created(path: Path, info: LatentInfo, shape: tuple[int, int, int, int]) -> Iterator[zarr.Array]:
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
