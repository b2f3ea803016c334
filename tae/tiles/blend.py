"""Long clips and large frames in bounded memory: tiles in time and space, joined by a linear blend.

Movie Gen, section 3.1.1 (temporal tiling): the encoder cuts the clip into tiles of 32 frames without overlap;
the decoder's tiles of 4 latent frames overlap by 2, and over the 16 shared frames the earlier tile fades out
as 1 - j / 16. Every function takes the encoder or decoder as a callable, so it serves any codec whose latent
frame stands for `factor` frames and whose last latent frame may stand for fewer.

Letters: b batch, c channels, t latent frames, h w latent height and width; frames, height, width in pixels.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

Encode = Callable[[Tensor], Tensor]
Decode = Callable[[Tensor, int], Tensor]

_TIME = 2


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Positions start..stop-1 along one axis."""

    start: int
    stop: int

    @property
    def slice(self) -> slice:
        """To index a tensor with."""
        return slice(self.start, self.stop)

    def scaled(self, scale: int) -> "Tile":
        """The same positions counted in smaller units, `scale` in each."""
        return Tile(start=self.start * scale, stop=self.stop * scale)


@dataclass(frozen=True, kw_only=True)
class TemporalTiling:
    """Tile sizes along time, in latent frames; `factor` frames make one latent frame (lecture notes, 1.3.2).

    Raises:
        ValueError: a size below one, or an overlap above half a tile (more than two tiles would meet).
    """

    factor: int
    tile: int = 4
    overlap: int = 2

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"tiling.factor: {self.factor}; use 1 or more frames for each latent frame")
        _check("tiling", self.tile, self.overlap)

    @property
    def frames(self) -> int:
        """Frames in one encoder tile."""
        return self.tile * self.factor

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip: ceil(frames / factor)."""
        return -(-frames // self.factor)

    def decoder_tiles(self, frames: int, start: int = 0, end: int | None = None) -> list[Tile]:
        """Tiles, in latent frames, of a clip of `frames` frames that its frames start..end-1 need."""
        end = frames if end is None else end
        check_range(frames, start, end)
        tiles = split(self.latent_frames(frames), self.tile, self.overlap)
        return [tile for tile in tiles if tile.start * self.factor < end and tile.stop * self.factor > start]

    def latents_for(self, frames: int, start: int = 0, end: int | None = None) -> Tile:
        """The latent frames that decoding frames start..end-1 of a clip of `frames` frames reads."""
        tiles = self.decoder_tiles(frames, start, end)
        return Tile(start=tiles[0].start, stop=tiles[-1].stop)


@dataclass(frozen=True, kw_only=True)
class SpatialTiling:
    """Square tiles, in latent cells of `factors` (rows, columns) pixels.

    Raises:
        ValueError: a size below one, or an overlap above half a tile.
    """

    factors: tuple[int, int]
    tile: int = 64
    overlap: int = 16

    def __post_init__(self) -> None:
        _check("spatial_tiling", self.tile, self.overlap)


def check_range(frames: int, start: int, end: int) -> None:
    """Raise ValueError unless start..end-1 are frames of a clip of `frames` frames."""
    if not 0 <= start < end <= frames:
        raise ValueError(f"frames {start}:{end}: outside a clip with frames 0:{frames}")


def split(length: int, tile: int, overlap: int) -> list[Tile]:
    """Tiles that cover `length` positions, `overlap` of them shared by neighbours; the last may be short."""
    count = 1 + max(0, -(-(length - tile) // (tile - overlap)))
    starts = (index * (tile - overlap) for index in range(count))
    return [Tile(start=start, stop=min(start + tile, length)) for start in starts]


def fade(earlier: Tensor, later: Tensor, dim: int) -> Tensor:
    """Blend N positions along `dim`: the earlier tile weighs 1 - j / N, the later one j / N, j = 0 .. N-1."""
    size = earlier.shape[dim]
    shape = [size if axis == dim % earlier.ndim else 1 for axis in range(earlier.ndim)]
    weight = torch.arange(size, dtype=earlier.dtype, device=earlier.device).div(size).view(shape)
    # In this form equal tiles stay exactly equal, however the weight is rounded.
    return torch.addcmul(earlier, weight, later - earlier)


def encode_stream(
    videos: Iterable[Shaped[Tensor, "b 3 _ height width"]], encode: Encode, tiling: TemporalTiling
) -> Iterator[Float[Tensor, "b c _ h w"]]:
    """Latents of one tile after another from chunks of any number of frames; the last may be short."""
    for tile in regrouped(videos, tiling.frames):
        yield encode(tile)


def decode_stream(
    latents: Iterable[Float[Tensor, "b c _ h w"]],
    decode: Decode,
    tiling: TemporalTiling,
    *,
    frames: int,
    start: int = 0,
    end: int | None = None,
) -> Iterator[Float[Tensor, "b 3 _ height width"]]:
    """Frames start..end-1 of a clip of `frames` frames, piece by piece, from chunks of any number of latents.

    The chunks begin at latent frame `tiling.decoder_tiles(frames, start, end)[0].start`; the pieces are the
    same as those cut from the whole clip. Holds one tile of latents and one and a half of frames.

    Raises:
        ValueError: a range outside the clip, or chunks that end too early.
    """
    end = frames if end is None else end
    tiles = tiling.decoder_tiles(frames, start, end)
    source = Window(latents, tiles[0].start)
    tail: Tensor | None = None
    for index, tile in enumerate(tiles):
        begin = tile.start * tiling.factor
        clip = decode(source.take(tile), min(tile.stop * tiling.factor, frames) - begin)
        if tail is not None:
            shared = tail.shape[_TIME]
            clip = torch.cat((fade(tail, clip[:, :, :shared], _TIME), clip[:, :, shared:]), dim=_TIME)
        last = index + 1 == len(tiles)
        done = clip.shape[_TIME] if last else (tiles[index + 1].start - tile.start) * tiling.factor
        tail = clip[:, :, done:]
        piece = clip[:, :, max(0, start - begin) : min(done, end - begin)]
        if piece.shape[_TIME]:
            yield piece


def spatial_encoder(encode: Encode, tiling: SpatialTiling) -> Encode:
    """An encoder that works on overlapping spatial tiles and blends their latents."""

    def tiled(video: Shaped[Tensor, "b 3 frames height width"]) -> Float[Tensor, "b c t h w"]:
        rows, columns = tiling.factors
        height, width = video.shape[3] // rows, video.shape[4] // columns

        def one(top: Tile, left: Tile) -> Tensor:
            return encode(video[..., top.scaled(rows).slice, left.scaled(columns).slice])

        return _mosaic(one, (height, width), tiling, (1, 1))

    return tiled


def spatial_decoder(decode: Decode, tiling: SpatialTiling) -> Decode:
    """A decoder that works on overlapping spatial tiles and blends their pixels."""

    def tiled(latent: Float[Tensor, "b c t h w"], frames: int) -> Float[Tensor, "b 3 frames height width"]:
        def one(top: Tile, left: Tile) -> Tensor:
            return decode(latent[..., top.slice, left.slice], frames)

        return _mosaic(one, (latent.shape[3], latent.shape[4]), tiling, tiling.factors)

    return tiled


def _check(name: str, tile: int, overlap: int) -> None:
    if tile < 1:
        raise ValueError(f"{name}.tile: {tile}; use 1 or more")
    if not 0 <= 2 * overlap <= tile:
        raise ValueError(f"{name}.overlap: {overlap}; use 0 to half of the tile, {tile // 2}")


def _mosaic(
    one: Callable[[Tile, Tile], Tensor], cells: tuple[int, int], tiling: SpatialTiling, scale: tuple[int, int]
) -> Tensor:
    """Join tiles into rows, rows into pictures; `scale` is output positions for each cell."""
    tops, lefts = (split(length, tiling.tile, tiling.overlap) for length in cells)
    rows = (_joined((one(top, left) for left in lefts), tiling.overlap * scale[1], dim=4) for top in tops)
    return _joined(rows, tiling.overlap * scale[0], dim=3)


def _joined(pieces: Iterable[Tensor], overlap: int, dim: int) -> Tensor:
    parts: list[Tensor] = []
    for piece in pieces:
        if parts and overlap:
            before = parts.pop()
            rest = before.shape[dim] - overlap
            blend = fade(before.narrow(dim, rest, overlap), piece.narrow(dim, 0, overlap), dim)
            parts.append(before.narrow(dim, 0, rest))
            parts.append(torch.cat((blend, piece.narrow(dim, overlap, piece.shape[dim] - overlap)), dim=dim))
        else:
            parts.append(piece)
    return torch.cat(parts, dim=dim)


def regrouped(chunks: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The same positions in groups of `size`; the last group may be short."""
    held: list[Tensor] = []
    for chunk in chunks:
        rest = chunk
        while rest.shape[_TIME]:
            room = size - _length(held)
            held.append(rest[:, :, :room])
            rest = rest[:, :, room:]
            if _length(held) == size:
                yield torch.cat(held, dim=_TIME)
                held = []
    if held:
        yield torch.cat(held, dim=_TIME)


def _length(chunks: Sequence[Tensor]) -> int:
    return sum(chunk.shape[_TIME] for chunk in chunks)


class Window:
    """A moving view, along time, of chunks of any length that begin at position `start`."""

    def __init__(self, chunks: Iterable[Tensor], start: int) -> None:
        self._chunks, self._start = iter(chunks), start
        self._held: list[Tensor] = []

    def reach(self, stop: int) -> int:
        """Ask for chunks until position `stop` is there; the position where what is there ends."""
        while (end := self._start + _length(self._held)) < stop:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            self._held.append(chunk)
        return end

    def take(self, tile: Tile) -> Tensor:
        """Positions of `tile`; those before it are given up, so a later tile must not start earlier."""
        if (end := self.reach(tile.stop)) < tile.stop:
            raise ValueError(f"latents: end at latent frame {end}, before {tile.stop}; give all of them")
        assert tile.start >= self._start
        self._forget(tile.start)
        if len(self._held) > 1:
            self._held = [torch.cat(self._held, dim=_TIME)]
        return self._held[0][:, :, : tile.stop - tile.start]

    def _forget(self, before: int) -> None:
        """Let go of what lies before a position; joined with what comes, it would be kept for a tile more."""
        while self._start + self._held[0].shape[_TIME] <= before:
            self._start += self._held.pop(0).shape[_TIME]
        self._held[0], self._start = self._held[0][:, :, before - self._start :], before
