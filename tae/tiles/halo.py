"""Tiles that overlap by the context they need, the overlap thrown away: ours, beside the paper's blend.

A tile is computed with a halo around it and only its inside is kept, so every frame is made once and no two
versions of it are mixed. With the halo of `context.context` tiles equal the whole but for rounding; a
shorter one leaves a difference that falls by some 20 dB with each latent frame. At the true borders of a clip
a tile ends where the clip ends, so padding happens where it would without tiles; inside, tiles begin at whole
latent frames, so strides fall on the same frames.

Letters: b batch, c channels, t latent frames, h w latent height and width; frames, height, width in pixels.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from jaxtyping import Float, Shaped
from torch import Tensor

from kinoflow.tae.tiles.blend import (
    Decode,
    Encode,
    SpatialTiling,
    Tile,
    Window,
    check_range,
    spatial_decoder,
    spatial_encoder,
)
from kinoflow.tae.tiles.context import Halo


@dataclass(frozen=True, kw_only=True)
class HaloTile:
    """Positions to keep, and those to compute for their sake."""

    inner: Tile
    outer: Tile

    @property
    def kept(self) -> slice:
        """The inside, counted from the start of what is computed."""
        return slice(self.inner.start - self.outer.start, self.inner.stop - self.outer.start)

    def scaled(self, scale: int) -> "HaloTile":
        """The same tile counted in frames or pixels, `scale` for each position."""
        return HaloTile(inner=self.inner.scaled(scale), outer=self.outer.scaled(scale))


@dataclass(frozen=True, kw_only=True)
class SpatialHalo:
    """Rectangular tiles that keep at most `tile` cells a side, each side cut into equal parts.

    `factors` are (rows, columns) of pixels in a cell.

    Raises:
        ValueError: a tile below one cell.
    """

    factors: tuple[int, int]
    rows: Halo
    columns: Halo
    tile: int = 64

    def __post_init__(self) -> None:
        if self.tile < 1:
            raise ValueError(f"spatial_halo.tile: {self.tile}; use 1 or more")

    def tiles(self, height: int, width: int) -> tuple[list[HaloTile], list[HaloTile]]:
        """Tiles of a picture of height x width cells, along rows and along columns."""
        return _balanced(height, self.tile, self.rows), _balanced(width, self.tile, self.columns)


Space = SpatialTiling | SpatialHalo


@dataclass(frozen=True, kw_only=True)
class HaloTiling:
    """Tiles along time, in latent frames, of an encoder or of a decoder; `factor` frames make one.

    `space`, if any, cuts each of them further; it may blend, for a model whose tiles in space disagree.

    Raises:
        ValueError: a size below one.
    """

    factor: int
    halo: Halo
    tile: int = 8
    space: Space | None = None

    def __post_init__(self) -> None:
        for key in ("factor", "tile"):
            if getattr(self, key) < 1:
                raise ValueError(f"halo_tiling.{key}: {getattr(self, key)}; use 1 or more")

    def at(self, start: int, length: int) -> HaloTile:
        """The tile that begins at latent frame `start` of `length`."""
        return _tile(start, min(start + self.tile, length), length, self.halo)

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip: ceil(frames / factor)."""
        return -(-frames // self.factor)

    def latents_for(self, frames: int, start: int = 0, end: int | None = None) -> Tile:
        """The latent frames that decoding frames start..end-1 of a clip of `frames` frames reads.

        Raises:
            ValueError: a range outside the clip.
        """
        end = frames if end is None else end
        check_range(frames, start, end)
        length, last = self.latent_frames(frames), self.latent_frames(end) - 1
        first, final = (position // self.tile * self.tile for position in (start // self.factor, last))
        return Tile(start=self.at(first, length).outer.start, stop=self.at(final, length).outer.stop)


# Some frames of what Decode gives.
DecodePart = Callable[[Tensor, int, slice], Tensor]

# Given the tiling that failed and why, a smaller one; raises the failure where there is none.
Smaller = Callable[[HaloTiling, Exception], HaloTiling]


def encode_stream(
    videos: Iterable[Shaped[Tensor, "b 3 _ height width"]],
    encode: Encode,
    tiling: HaloTiling,
    smaller: Smaller,
) -> Iterator[Float[Tensor, "b c _ h w"]]:
    """Latents of one tile after another from chunks of any number of frames, in any dtype `encode` takes.

    Holds the frames of one tile with its halo, and a chunk. A tile that fails is tried again from its first
    latent frame with what `smaller` gives.
    """
    window, position = Window(videos, 0), 0
    while True:
        # Outside the try: a source that failed is at its end, and the clip would seem to end there.
        have = window.reach((position + tiling.tile + tiling.halo.after) * tiling.factor)
        length = tiling.latent_frames(have)  # of the clip, once it has ended; enough for the tile before
        if position >= length:
            return
        tile = tiling.at(position, length)
        try:
            latent = _encoded(window, encode, tiling, tile, have)
        except (MemoryError, RuntimeError) as failure:
            tiling = smaller(tiling, failure)
            continue
        position = tile.inner.stop
        yield latent
        del latent  # not held while the next one is made


def decode_stream(
    latents: Iterable[Float[Tensor, "b c _ h w"]],
    decode: Decode,
    tiling: HaloTiling,
    smaller: Smaller,
    *,
    frames: int,
    start: int = 0,
    end: int | None = None,
    decode_part: DecodePart | None = None,
) -> Iterator[Float[Tensor, "b 3 _ height width"]]:
    """Frames start..end-1 of a clip of `frames` frames, piece by piece, from chunks of any number of latents.

    The chunks begin at latent frame `tiling.latents_for(frames, start, end).start`; the pieces are the same
    as those cut from the whole clip. Holds the latents of one tile with its halo, and a chunk. Of a tile of
    which only a part is asked for, `decode_part`, where there is one, saves the rest of the work, and rounds
    in its own way.

    Raises:
        ValueError: a range outside the clip, or chunks that end too early.
    """
    end = frames if end is None else end
    source = Window(latents, tiling.latents_for(frames, start, end).start)
    length, position = tiling.latent_frames(frames), start // tiling.factor // tiling.tile * tiling.tile
    while position * tiling.factor < end:
        tile = tiling.at(position, length)
        first, last = max(start, position * tiling.factor), min(end, tile.inner.stop * tiling.factor)
        if first < last:  # after a failure the first tiles can be too small to reach `start`
            source.reach(tile.outer.stop)
            try:
                span = Tile(start=first, stop=last)
                some = decode_part if span != _inside(tile, tiling, frames) else None
                piece = _decoded(source, decode, some, tiling, tile, span=span, frames=frames)
            except (MemoryError, RuntimeError) as failure:
                tiling = smaller(tiling, failure)
                continue
            yield piece
            del piece
        position = tile.inner.stop


def spatial_halo_encoder(encode: Encode, tiling: SpatialHalo) -> Encode:
    """An encoder that works on spatial tiles with halos and keeps their insides."""

    def tiled(video: Shaped[Tensor, "b 3 frames height width"]) -> Float[Tensor, "b c t h w"]:
        rows, columns = tiling.factors

        def one(top: Tile, left: Tile) -> Tensor:
            return encode(video[..., top.scaled(rows).slice, left.scaled(columns).slice])

        tops, lefts = tiling.tiles(video.shape[3] // rows, video.shape[4] // columns)
        return _mosaic(one, tops, lefts, (1, 1))

    return tiled


def spatial_halo_decoder(decode: Decode, tiling: SpatialHalo) -> Decode:
    """A decoder that works on spatial tiles with halos and keeps their insides."""

    def tiled(latent: Float[Tensor, "b c t h w"], frames: int) -> Float[Tensor, "b 3 _ height width"]:
        def one(top: Tile, left: Tile) -> Tensor:
            return decode(latent[..., top.slice, left.slice], frames)

        return _mosaic(one, *tiling.tiles(*latent.shape[3:]), tiling.factors)

    return tiled


def encoder_in_space(encode: Encode, space: Space | None) -> Encode:
    """`encode` on spatial tiles of either kind, or as it is."""
    if isinstance(space, SpatialHalo):
        return spatial_halo_encoder(encode, space)
    return encode if space is None else spatial_encoder(encode, space)


def decoder_in_space(decode: Decode, space: Space | None) -> Decode:
    """`decode` on spatial tiles of either kind, or as it is."""
    if isinstance(space, SpatialHalo):
        return spatial_halo_decoder(decode, space)
    return decode if space is None else spatial_decoder(decode, space)


def _encoded(window: Window, encode: Encode, tiling: HaloTiling, tile: HaloTile, have: int) -> Tensor:
    first, last = tile.outer.start * tiling.factor, min(tile.outer.stop * tiling.factor, have)
    clip = window.take(Tile(start=first, stop=last))
    # The halo in time goes before tiles in space are joined, so that only what is kept lies in memory.
    return encoder_in_space(lambda part: encode(part)[:, :, tile.kept], tiling.space)(clip)


def _inside(tile: HaloTile, tiling: HaloTiling, frames: int) -> Tile:
    """All frames that a tile is there for."""
    return Tile(start=tile.inner.start * tiling.factor, stop=min(tile.inner.stop * tiling.factor, frames))


def _decoded(
    source: Window,
    decode: Decode,
    decode_part: DecodePart | None,
    tiling: HaloTiling,
    tile: HaloTile,
    *,
    span: Tile,
    frames: int,
) -> Tensor:
    first = tile.outer.start * tiling.factor
    count = min(tile.outer.stop * tiling.factor, frames) - first
    kept = slice(span.start - first, span.stop - first)

    def one(part: Tensor, length: int) -> Tensor:
        return decode(part, length)[:, :, kept] if decode_part is None else decode_part(part, length, kept)

    return decoder_in_space(one, tiling.space)(source.take(tile.outer), count)


def _tile(start: int, stop: int, length: int, halo: Halo) -> HaloTile:
    outer = Tile(start=max(0, start - halo.before), stop=min(length, stop + halo.after))
    return HaloTile(inner=Tile(start=start, stop=stop), outer=outer)


def _balanced(length: int, tile: int, halo: Halo) -> list[HaloTile]:
    """As few tiles of at most `tile` positions as cover `length`, their sizes at most one apart."""
    count = -(-length // tile)
    borders = [length * index // count for index in range(count + 1)]
    return [_tile(start, stop, length, halo) for start, stop in pairwise(borders)]


def _mosaic(
    one: Callable[[Tile, Tile], Tensor],
    tops: list[HaloTile],
    lefts: list[HaloTile],
    scale: tuple[int, int],
) -> Tensor:
    """Put the insides of tiles into one picture; `scale` is output positions for each cell."""
    if len(tops) == len(lefts) == 1:
        return one(tops[0].outer, lefts[0].outer)
    whole: Tensor | None = None
    for top in tops:
        for left in lefts:
            piece = one(top.outer, left.outer)
            if whole is None:
                sides = (tops[-1].inner.stop * scale[0], lefts[-1].inner.stop * scale[1])
                whole = piece.new_empty((*piece.shape[:3], *sides))
            rows, columns = top.scaled(scale[0]), left.scaled(scale[1])
            whole[..., rows.inner.slice, columns.inner.slice] = piece[..., rows.kept, columns.kept]
    assert whole is not None
    return whole
