"""Clips to latent files and back, tile by tile, in bounded memory.

Frames are padded to multiples of the spatial factor by repeating the last row and column, and cropped again.
`reconstruct` rounds its latents to float16 as well, so it gives the frames of `encode` followed by `decode`.
The exact times of a variable frame rate and, on request, the sound go into the latent file as well.
"""

import math
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float16, UInt8
from torch import Tensor

from configs.pretrained import fingerprint
from data import video
from data.audio import SoundInfo, extract
from data.footage import Footage, footage, stamp
from tae.latent_file import LatentFileError, LatentInfo, create, read_info, read_latents
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

Progress = Callable[[int], None]


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

    def encode(
        self,
        source: str | Path | Footage,
        path: str | Path,
        progress: Progress | None = None,
        *,
        audio: bool = False,
    ) -> LatentInfo:
        """Write the latent file of a clip; `progress` is told the number of frames done.

        With `audio`, the sound is stored beside the latents as it is.

        Raises:
            VideoError: the clip cannot be read.
            LatentFileError: the file cannot be written.
        """
        clip, path = source if isinstance(source, Footage) else footage(source), Path(path)
        latents = self._latents(clip.stream(self.tile_frames))
        with ExitStack() as stack:
            nut = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "sound.nut"
            heard = clip.info.path if audio and clip.info.audio else None
            sound = None if heard is None else extract(heard, nut, video.origin(heard))
            info = self._describe(clip, sound)
            array = stack.enter_context(
                create(
                    path,
                    info,
                    self._latent_shape(info.frames, info.height, info.width),
                    presentation=clip.presentation,
                    sound=None if sound is None else nut,
                )
            )
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
        end = info.end_of(path, start, end)
        tiles = self._tiling.decoder_tiles(info.frames, start, end)
        shape = self._latent_shape(info.frames, info.height, info.width)
        latents = read_latents(path, tiles[0].start, tiles[-1].stop, shape)
        yield from self._frames(latents, info, start, end)

    def reconstruct(self, source: str | Path | Footage) -> Iterator[FramePair]:
        """A clip beside what encoding and decoding make of it, without a file in between.

        Raises:
            VideoError: the clip cannot be read.
        """
        clip = source if isinstance(source, Footage) else footage(source)
        waiting: deque[np.ndarray] = deque()

        def kept() -> Iterator[np.ndarray]:
            for frames in clip.stream(self.tile_frames):
                waiting.extend(frames)
                yield frames

        for decoded in self._frames(self._latents(kept()), clip.info, 0, clip.info.frames):
            original = np.stack([waiting.popleft() for _ in decoded])
            yield FramePair(source=original, decoded=decoded)

    def _describe(self, clip: Footage, sound: SoundInfo | None) -> LatentInfo:
        size, modified = stamp(clip.info.path)
        times = clip.presentation
        return LatentInfo(
            frames=clip.info.frames,
            height=clip.info.height,
            width=clip.info.width,
            fps=clip.info.fps,
            color=asdict(clip.info.color),
            source=clip.info.path.name,
            tae=self.name,
            tae_sha256=self.sha256,
            channels=self._channels,
            tile=self._tiling.tile,
            variable_frame_rate=times is not None,
            time_base=None if times is None else times.time_base,
            resampled=clip.resampled,
            sound=None if sound is None else sound.codec,
            sound_origin=Fraction(0) if sound is None else sound.origin,
            source_bytes=size,
            source_modified_ns=modified,
        )

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
