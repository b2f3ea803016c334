"""Clips to latent files and back, tile by tile, in bounded memory.

Frames are padded to multiples of the spatial factor by repeating the last row and column, and cropped again.
`reconstruct` rounds its latents to float16 as well, so it gives the frames of `encode` followed by `decode`.
The exact times of a variable frame rate and, on request, the sound go into the latent file as well.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float16, UInt8
from torch import Tensor

from kinoflow.configs.errors import UserError
from kinoflow.configs.pretrained import fingerprint
from kinoflow.data import video
from kinoflow.data.latents import stored
from kinoflow.data.latents.kino import CHUNK, LatentInfo, create, read_info, read_latents
from kinoflow.data.video.footage import Footage, footage, stamp
from kinoflow.data.video.soundtrack import SoundInfo, extract
from kinoflow.tae.codec.temporary import blamed_on_temporary_folder, sound_file
from kinoflow.tae.model.pixels import to_bytes
from kinoflow.tae.model.tae import TAE
from kinoflow.tae.tiles.blend import regrouped
from kinoflow.tae.tiles.plan import Mode
from kinoflow.tae.tiles.tiled import DEFAULT_MEMORY, TiledTAE

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
        tiling: how tiles meet, see tae.tiles.tiled.
        memory: bytes for weights and tiles; the interpreter and FFmpeg take some more.
        spatial_tile: at most so many pixels a side for tiles in space; None leaves it to `memory`.
    """

    def __init__(
        self,
        tae: TAE,
        *,
        name: str,
        tiling: Mode = "halo",
        memory: int = DEFAULT_MEMORY,
        spatial_tile: int | None = None,
    ) -> None:
        self.name, self.sha256 = name, fingerprint(tae.state_dict())
        self._factors = tae.config.factors
        self._channels = tae.config.latent_channels
        self._device = next(tae.parameters()).device
        self._tiled = TiledTAE(tae, mode=tiling, memory=memory, spatial_tile=spatial_tile)

    def tile_frames(self, height: int, width: int) -> int:
        """Frames in one decoder tile of frames of this size.

        Raises:
            UserError: frames too large for the budget.
        """
        return self._tiled.tile_frames(self._latent_shape(1, height, width)[2:])

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
            UserError: the clip cannot be read.
            UserError: the file cannot be written.
        """
        clip, path = source if isinstance(source, Footage) else footage(source), Path(path)
        latents = self._latents(clip.stream(self._factors[0]))
        with ExitStack() as stack:
            nut, sound = None, None
            if audio and clip.info.audio:
                nut, origin = stack.enter_context(sound_file()), video.origin(clip.info.path)
                with blamed_on_temporary_folder():
                    sound = extract(clip.info.path, nut, origin)
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
                    progress(min((index + 1) * info.tile * self._factors[0], info.frames))
        return info

    def decode(
        self, path: str | Path, *, start: int = 0, end: int | None = None
    ) -> Iterator[UInt8[np.ndarray, "frames height width 3"]]:
        """Frames start..end-1 of a latent file, piece by piece; reads and decodes only what they are made of.

        They are the frames of the whole clip but for rounding: one level in at most one of 10,000 values.

        Raises:
            UserError: not a latent file, damaged, of another autoencoder, or a range outside it.
        """
        path = Path(path)
        info = read_info(path)
        if info.tae_sha256 != self.sha256:
            raise UserError(
                f"{path}: made by the autoencoder {info.tae} ({info.tae_sha256[:12]}), not {self.name} "
                f"({self.sha256[:12]}); give that one with --weights"
            )
        end = info.end_of(path, start, end)
        shape = self._latent_shape(info.frames, info.height, info.width)
        needed = self._tiled.latents_for(info.frames, start, end, cells=shape[2:])
        latents = read_latents(path, needed.start, needed.stop, shape)
        yield from self._frames(latents, info, start, end)

    def reconstruct(self, source: str | Path | Footage) -> Iterator[FramePair]:
        """A clip beside what encoding and decoding make of it, without a file in between.

        Raises:
            UserError: the clip cannot be read.
        """
        clip = source if isinstance(source, Footage) else footage(source)
        waiting: deque[np.ndarray] = deque()

        def kept() -> Iterator[np.ndarray]:
            for frames in clip.stream(self._factors[0]):
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
            sample_aspect_ratio=clip.info.sample_aspect_ratio,
            color=asdict(clip.info.color),
            source=clip.info.path.name,
            tae=self.name,
            tae_sha256=self.sha256,
            channels=self._channels,
            tile=CHUNK,
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
        for latent in regrouped(self._tiled.encode_stream(videos), CHUNK):
            yield stored(latent[0].transpose(0, 1), self.name)

    def _frames(
        self, latents: Iterable[np.ndarray], clip: LatentInfo | video.VideoInfo, start: int, end: int
    ) -> Iterator[UInt8[np.ndarray, "frames height width 3"]]:
        means = (
            torch.from_numpy(latent).to(self._device).float().transpose(0, 1)[None] for latent in latents
        )
        for piece in self._tiled.decode_stream(means, frames=clip.frames, start=start, end=end):
            for part in piece[0, :, :, : clip.height, : clip.width].split(self._factors[0], dim=1):
                yield to_bytes(part).cpu().numpy()
            del piece, part  # not held while the next tile is decoded

    def _to_model(self, frames: UInt8[np.ndarray, "f height width 3"]) -> UInt8[Tensor, "1 3 f rows columns"]:
        """Still bytes: they become values a tile at a time."""
        rows, columns = (
            -side % factor for side, factor in zip(frames.shape[1:3], self._factors[1:], strict=True)
        )
        padded = np.pad(frames, ((0, 0), (0, rows), (0, columns), (0, 0)), mode="edge")
        return torch.from_numpy(padded).to(self._device).movedim(-1, 0)[None]

    def _latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        time, rows, columns = self._factors
        return -(-frames // time), self._channels, -(-height // rows), -(-width // columns)
