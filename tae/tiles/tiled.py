"""An autoencoder on clips of any length and size in a given amount of memory.

Two modes. `halo` (the default) computes each tile with the context it needs and keeps its inside: it stays
closer to the untiled result than the paper's mode by 20 dB and more, for no more work, and no frame is a mix
of two. `blend` is the paper's: encoder tiles of 32 frames side by side, decoder tiles that overlap by half
and fade into each other; it is there to compare with, and for models trained to be used that way.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from kinoflow.configs.errors import UserError
from kinoflow.tae.cpu.heap import pages_given_back
from kinoflow.tae.model.chunks import cut_into
from kinoflow.tae.model.config import require_batch
from kinoflow.tae.model.tae import TAE
from kinoflow.tae.tiles import blend as tiling
from kinoflow.tae.tiles import halo
from kinoflow.tae.tiles.blend import TemporalTiling, Tile
from kinoflow.tae.tiles.memory import Part, format_bytes, ran_out
from kinoflow.tae.tiles.plan import LEAST_CELLS, Mode, TilePlan, TilingRequest, choose, next_smaller

DEFAULT_MEMORY = 4 * 2**30  # bytes

# A short clip never fills the layers of a decoder with chunks. A long one does, so its chunks are smaller:
# the same numbers, slower by 4 to 7 % (22 % at 256x256), which is less than the halos of tiles cost.
_SHORT, _PARTS_OF_LONG = 8, 4

_log = logging.getLogger(__name__)


class TiledTAE:
    """`tae` behind streams of frames and latents.

    Args:
        tae: model in evaluation mode, on the device to work on.
        mode: "halo" or "blend", as above.
        memory: bytes for weights, activations and the frames of a tile. A tile that runs out of memory all
            the same is tried again smaller, and so are those after it.
        spatial_tile: at most so many pixels a side for tiles in space, whatever `memory` allows.
    """

    def __init__(
        self, tae: TAE, *, mode: Mode = "halo", memory: int = DEFAULT_MEMORY, spatial_tile: int | None = None
    ) -> None:
        self._tae, self._config, self._memory = tae, tae.config, memory
        self._mode: Mode = mode
        weight = next(tae.parameters())
        self._dtype, self._device_type = weight.dtype, weight.device.type
        side = max(tae.config.factors[1:])
        self._most_cells = None if spatial_tile is None else max(LEAST_CELLS, spatial_tile // side)
        self._plans: dict[TilingRequest, TilePlan] = {}

    def tile_frames(self, cells: tuple[int, int]) -> int:
        """Frames in one decoder tile of pictures of `cells` (rows, columns) latent cells."""
        return self._plan(self._request("decode", cells)).tile * self._config.factors[0]

    def latents_for(self, frames: int, start: int, end: int, *, cells: tuple[int, int]) -> Tile:
        """The latent frames that decoding frames start..end-1 of a clip of `frames` frames reads.

        Raises:
            ValueError: a range outside the clip.
            UserError: frames too large for the budget.
        """
        return self._tiling(self._request("decode", cells)).latents_for(frames, start, end)

    def encode_stream(
        self, videos: Iterable[Shaped[Tensor, "b 3 _ height width"]]
    ) -> Iterator[Float[Tensor, "b c _ h w"]]:
        """Latents of a clip, tile by tile, from chunks of any number of frames: bytes, or values in [-1, 1].

        Raises:
            ValueError: another shape, or a side that is not a multiple of the spatial factor.
            UserError: frames too large for the budget.
        """
        source = iter(videos)
        first = next(source, None)
        if first is None:
            return
        require_batch("videos", first.shape, 3, "frames, height, width")
        shape = self._config.latent_shape(*first.shape[2:])
        request = self._request("encode", (shape.height, shape.width), first.element_size())
        videos = chain([first], source)
        del first
        tiles = self._tiling(request)
        if isinstance(tiles, TemporalTiling):

            def encode(clip: Tensor) -> Tensor:
                return self._patiently(
                    request, lambda space: halo.encoder_in_space(self._encode, space)(clip)
                )

            yield from tiling.encode_stream(videos, encode, tiles)
        else:
            yield from halo.encode_stream(videos, self._encode, tiles, self._smaller(request))

    def decode_stream(
        self,
        latents: Iterable[Float[Tensor, "b c _ h w"]],
        *,
        frames: int,
        start: int = 0,
        end: int | None = None,
    ) -> Iterator[Float[Tensor, "b 3 _ height width"]]:
        """Frames start..end-1 of a clip of `frames` frames, piece by piece, from chunks of any length.

        The chunks begin at latent frame `latents_for(frames, start, end).start`; the pieces are those of the
        whole clip, but for rounding: of a tile of which some frames are asked for, only what they are made of
        is computed.

        Raises:
            ValueError: another shape, a range outside the clip, or chunks that end too early.
            UserError: frames too large for the budget.
        """
        source = iter(latents)
        first = next(source, None)
        if first is None:
            raise ValueError("latents: there are none; give at least one frame of them")
        require_batch("latents", first.shape, self._config.latent_channels, "t, h, w")
        request = self._request("decode", (first.shape[3], first.shape[4]))
        tiles, latents = self._tiling(request), chain([first], source)
        if isinstance(tiles, TemporalTiling):

            def decode(latent: Tensor, length: int) -> Tensor:
                return self._patiently(
                    request, lambda space: halo.decoder_in_space(self._decode, space)(latent, length)
                )

            yield from tiling.decode_stream(latents, decode, tiles, frames=frames, start=start, end=end)
        else:
            smaller = self._smaller(request)
            yield from halo.decode_stream(
                latents,
                self._decode,
                tiles,
                smaller,
                frames=frames,
                start=start,
                end=end,
                decode_part=self._decode,
            )

    def decode_whole(
        self, latent: Float[Tensor, "b c t h w"], frames: int
    ) -> Iterator[Float[Tensor, "b 3 _ height width"]]:
        """All frames of a latent that is there, piece by piece.

        On a CPU a decoder without attention streams through a clip whose pictures need no cutting: the
        numbers of the untiled decoder, and nothing twice. Elsewhere, and from where memory ran out, in tiles.

        Raises:
            ValueError: another shape.
            UserError: frames too large for the budget.
        """
        require_batch("latents", latent.shape, self._config.latent_channels, "t, h, w")
        request, done = self._request("decode", (latent.shape[3], latent.shape[4])), 0
        if self._streams(request):
            try:
                for piece in self._streamed(latent, frames):
                    done += piece.shape[2]
                    yield piece
                    del piece  # not held while the next one is made
            except (MemoryError, RuntimeError) as failure:
                self._shrink(request, failure)
        if done < frames:
            first = self.latents_for(frames, done, frames, cells=request.cells).start
            yield from self.decode_stream([latent[:, :, first:]], frames=frames, start=done)

    def _streams(self, request: TilingRequest) -> bool:
        plain = self._mode == "halo" and self._device_type == "cpu" and not self._config.attention
        return plain and self._plan(request).space is None

    def _streamed(self, latent: Tensor, frames: int) -> Iterator[Tensor]:
        pieces = self._tae.decode_pieces(latent.to(self._dtype), frames)
        parts = 1 if latent.shape[2] <= _SHORT else _PARTS_OF_LONG
        with pages_given_back():
            while True:
                with torch.inference_mode(), cut_into(parts):
                    piece = next(pieces, None)
                if piece is None:
                    return
                yield piece
                del piece  # not held while the next one is made

    @torch.inference_mode()
    def _encode(self, clip: Tensor) -> Tensor:
        with pages_given_back():
            return self._tae.encode(clip.to(self._dtype) if clip.is_floating_point() else clip).mean

    @torch.inference_mode()
    def _decode(self, part: Tensor, frames: int, wanted: slice | None = None) -> Tensor:
        only = {} if wanted is None else {"wanted": wanted}
        with pages_given_back():
            return self._tae.decode(part.to(self._dtype), frames, **only)

    def _request(self, part: Part, cells: tuple[int, int], frame_bytes: int = 4) -> TilingRequest:
        return TilingRequest(
            config=self._config,
            part=part,
            mode=self._mode,
            cells=cells,
            dtype=self._dtype,
            device_type=self._device_type,
            frame_bytes=frame_bytes,
            most_cells=self._most_cells,
        )

    def _plan(self, request: TilingRequest) -> TilePlan:
        """The plan in use: what the budget allows, or what was left after memory ran out."""
        if request not in self._plans:
            self._plans[request] = choose(request, self._memory)
        return self._plans[request]

    def _tiling(self, request: TilingRequest) -> halo.HaloTiling | TemporalTiling:
        plan, factor = self._plan(request), self._config.factors[0]
        if self._mode == "blend":
            return TemporalTiling(factor=factor)
        return halo.HaloTiling(factor=factor, halo=request.halos[0], tile=plan.tile, space=plan.space)

    def _smaller(self, request: TilingRequest) -> halo.Smaller:
        def smaller(_tiles: halo.HaloTiling, failure: Exception) -> halo.HaloTiling:
            self._shrink(request, failure)
            tiles = self._tiling(request)
            assert isinstance(tiles, halo.HaloTiling)
            return tiles

        return smaller

    def _shrink(self, request: TilingRequest, failure: Exception) -> None:
        if not ran_out(failure):
            raise failure
        failed = self._plan(request)
        plan = next_smaller(request, failed)
        if plan is None:
            raise UserError(
                f"memory: ran out with the smallest tiles, which take about {format_bytes(failed.bytes)}; "
                "free some, or make the frames smaller"
            ) from failure
        self._plans[request] = plan
        _log.warning(
            "memory ran out with tiles of about %s; going on with %s",
            format_bytes(failed.bytes),
            format_bytes(plan.bytes),
        )

    def _patiently(self, request: TilingRequest, run: Callable[[halo.Space | None], Tensor]) -> Tensor:
        """One tile in time, which stays as the paper has it, cut smaller in space until it fits."""
        while True:
            try:
                return run(self._plan(request).space)
            except (MemoryError, RuntimeError) as failure:
                self._shrink(request, failure)
