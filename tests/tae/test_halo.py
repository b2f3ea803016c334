"""Halo tiles against the whole: equal with the counted context, in any chunks, from any place."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kinoflow.tae import TAE
from kinoflow.tae.tiles.blend import SpatialTiling
from kinoflow.tae.tiles.context import Halo, context
from kinoflow.tae.tiles.halo import (
    HaloTiling,
    SpatialHalo,
    decode_stream,
    encode_stream,
    spatial_halo_decoder,
    spatial_halo_encoder,
)
from tests.tae.toys import CONFIGS, MINI, decode_tiled, encode_tiled, random_tae

LENGTHS = range(1, 41)
FACTOR = 8


def tilings(model: TAE, tile: int, spatial_tile: int | None = None) -> tuple[HaloTiling, HaloTiling]:
    """Tilings of encoder and decoder with the whole context."""
    reach, factors = context(model.config), model.config.factors
    both = []
    for time, rows, columns in (reach.encoder, reach.decoder):
        space = None
        if spatial_tile is not None:
            space = SpatialHalo(factors=factors[1:], rows=rows, columns=columns, tile=spatial_tile)
        both.append(HaloTiling(factor=factors[0], halo=time, tile=tile, space=space))
    return both[0], both[1]


def clip(frames: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 3, frames, height, width, generator=generator, dtype=torch.float64)


def mean_of(model: TAE):
    return lambda video: model.encode(video).mean


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Rounding in float64, relative to the largest value."""
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) < 1e-11 * float(expected.abs().max())


@pytest.fixture(scope="module")
def mini() -> TAE:
    return random_tae(MINI)


@pytest.mark.parametrize("frames", LENGTHS)
def test_every_length_equals_the_whole(mini, frames):
    """Tiles of one latent frame: a border after each."""
    encoder, decoder = tilings(mini, tile=1)
    video = clip(frames, 8, 8, seed=frames)
    latent = mini.encode(video).mean
    assert_close(encode_tiled(video, mean_of(mini), encoder), latent)
    assert_close(decode_tiled(latent, mini.decode, decoder, frames=frames), mini.decode(latent, frames))


@pytest.mark.parametrize(("frames", "tile"), [(97, 3), (160, 4), (133, 20), (200, 7)])
@pytest.mark.parametrize("name", CONFIGS)
def test_long_clips_equal_the_whole(name, frames, tile):
    model = random_tae(CONFIGS[name])
    encoder, decoder = tilings(model, tile)
    video = clip(frames, 8, 8)
    latent = model.encode(video).mean
    assert_close(encode_tiled(video, mean_of(model), encoder), latent)
    assert_close(decode_tiled(latent, model.decode, decoder, frames=frames), model.decode(latent, frames))


def test_one_latent_frame_less_of_halo_is_not_enough(mini):
    """The context is as small as it can be, so the tests above see borders that matter."""
    encoder, decoder = tilings(mini, tile=4)
    video = clip(160, 8, 8)
    latent = mini.encode(video).mean
    pixels = mini.decode(latent, 160)
    for tiling in (encoder, decoder):
        for side in ("before", "after"):
            sides = {"before": tiling.halo.before, "after": tiling.halo.after}
            short = HaloTiling(factor=FACTOR, tile=4, halo=Halo(**(sides | {side: sides[side] - 1})))
            if tiling is encoder:
                error, whole = encode_tiled(video, mean_of(mini), short) - latent, latent
            else:
                error, whole = decode_tiled(latent, mini.decode, short, frames=160) - pixels, pixels
            assert float(error.abs().max()) > 1e-9 * float(whole.abs().max())


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 25), (24, 5), (11, 12)])
@pytest.mark.parametrize("name", CONFIGS)
def test_spatial_tiles_equal_the_whole(name, rows, columns):
    model = random_tae(CONFIGS[name])
    encoder, decoder = tilings(model, tile=1, spatial_tile=3)
    assert isinstance(encoder.space, SpatialHalo)
    assert isinstance(decoder.space, SpatialHalo)
    frames = model.config.factors[0]
    _, height, width = model.config.factors
    video = clip(frames, height * rows, width * columns)
    latent = model.encode(video).mean
    assert_close(spatial_halo_encoder(mean_of(model), encoder.space)(video), latent)
    decoded = spatial_halo_decoder(model.decode, decoder.space)(latent, frames)
    assert_close(decoded, model.decode(latent, frames))


def test_tiles_in_time_and_space_equal_the_whole(mini):
    encoder, decoder = tilings(mini, tile=3, spatial_tile=4)
    video = clip(45, 40, 72)
    latent = mini.encode(video).mean
    assert_close(encode_tiled(video, mean_of(mini), encoder), latent)
    assert_close(decode_tiled(latent, mini.decode, decoder, frames=45), mini.decode(latent, 45))


def test_blended_space_inside_halo_time(mini):
    """The kind for models whose tiles in space cannot agree: blended there, and still exact in time."""
    space = SpatialTiling(factors=(8, 8), tile=4, overlap=1)
    _, decoder = tilings(mini, tile=2)
    tiled = HaloTiling(factor=8, halo=decoder.halo, tile=2, space=space)
    untiled_in_time = HaloTiling(factor=8, halo=decoder.halo, tile=99, space=space)
    latent = torch.randn(1, 4, 9, 6, 7, dtype=torch.float64)
    in_time = decode_tiled(latent, mini.decode, tiled, frames=70)
    assert_close(in_time, decode_tiled(latent, mini.decode, untiled_in_time, frames=70))


@pytest.mark.parametrize("length", LENGTHS)
def test_spatial_tiles_are_balanced_and_cover_everything(length):
    tiling = SpatialHalo(
        factors=(8, 8), rows=Halo(before=2, after=1), columns=Halo(before=0, after=0), tile=7
    )
    rows, columns = tiling.tiles(length, length)
    assert [place for tile in rows for place in range(tile.inner.start, tile.inner.stop)] == [*range(length)]
    sizes = [tile.inner.stop - tile.inner.start for tile in rows]
    assert max(sizes) <= 7
    assert max(sizes) - min(sizes) <= 1
    assert all(tile.outer.start == max(0, tile.inner.start - 2) for tile in rows)
    assert all(tile.outer.stop == min(length, tile.inner.stop + 1) for tile in rows)
    assert all(tile.outer == tile.inner for tile in columns)


def pool_time(video: Tensor) -> Tensor:
    """Mean over groups of 8 frames plus the mean of the tile, so that other tiles give other values."""
    missing = -video.shape[2] % 8
    filled = torch.cat((video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2)
    return filled.unflatten(2, (-1, 8)).mean(dim=3) + video.mean(dim=2, keepdim=True)


def repeat_time(latent: Tensor, frames: int) -> Tensor:
    assert 8 * (latent.shape[2] - 1) < frames <= 8 * latent.shape[2]
    return latent.repeat_interleave(8, dim=2)[:, :, :frames] + latent.mean(dim=2, keepdim=True)


SOME = HaloTiling(factor=8, tile=3, halo=Halo(before=2, after=1))


@given(
    frames=st.integers(1, 130),
    cuts=st.lists(st.integers(0, 130), max_size=6),
    tile=st.integers(1, 5),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
)
def test_any_chunks_give_the_same(frames, cuts, tile, before, after):
    tiling = HaloTiling(factor=8, tile=tile, halo=Halo(before=before, after=after))
    video = clip(frames, 1, 2)
    borders = sorted({0, frames, *(cut for cut in cuts if cut < frames)})
    chunks = [video[:, :, a:b] for a, b in itertools.pairwise(borders)]
    latent = encode_tiled(video, pool_time, tiling)
    assert torch.equal(torch.cat(list(encode_stream(chunks, pool_time, tiling, halved)), dim=2), latent)
    whole = decode_tiled(latent, repeat_time, tiling, frames=frames)
    assert whole.shape == video.shape
    length = latent.shape[2]
    borders = sorted({0, length, *(cut for cut in cuts if cut < length)})
    chunks = [latent[:, :, a:b] for a, b in itertools.pairwise(borders)]
    pieces = list(decode_stream(chunks, repeat_time, tiling, halved, frames=frames))
    assert torch.equal(torch.cat(pieces, dim=2), whole)


@given(frames=st.integers(1, 130), data=st.data())
def test_range_equals_slice_of_whole(frames, data):
    start = data.draw(st.integers(0, frames - 1))
    end = data.draw(st.integers(start + 1, frames))
    latent = clip(SOME.latent_frames(frames), 1, 1)
    whole = decode_tiled(latent, repeat_time, SOME, frames=frames)
    part = latent[:, :, SOME.latents_for(frames, start, end).slice]
    pieces = list(decode_stream([part], repeat_time, SOME, halved, frames=frames, start=start, end=end))
    assert torch.equal(torch.cat(pieces, dim=2), whole[:, :, start:end])


def test_an_empty_stream_gives_nothing():
    assert list(encode_stream([], pool_time, SOME, halved)) == []


def test_streams_hold_a_bounded_number_of_frames():
    """A tile comes out as soon as its halo is there, and no chunk is asked for before it is needed."""
    asked: list[int] = []

    def counted(chunks):
        for index, chunk in enumerate(chunks):
            asked.append(index)
            yield chunk

    first = next(iter(encode_stream(counted(clip(400, 1, 1).split(8, dim=2)), pool_time, SOME, halved)))
    assert (first.shape[2], len(asked)) == (3, 4)
    asked.clear()
    latents = counted(clip(50, 1, 1).split(1, dim=2))
    first = next(iter(decode_stream(latents, repeat_time, SOME, halved, frames=400)))
    assert (first.shape[2], len(asked)) == (24, 4)


def test_missing_latents_are_named():
    with pytest.raises(ValueError, match="end at latent frame 3"):
        list(decode_stream([clip(3, 1, 1)], repeat_time, SOME, halved, frames=40))


def test_range_outside_the_clip():
    with pytest.raises(ValueError, match="frames 5:41"):
        SOME.latents_for(40, 5, 41)


@pytest.mark.parametrize("key", ["factor", "tile"])
def test_tiling_names_the_wrong_key(key):
    with pytest.raises(ValueError, match=rf"halo_tiling\.{key}: 0"):
        HaloTiling(**({"factor": 8, "tile": 4, "halo": Halo(before=0, after=0)} | {key: 0}))


def halved(tiling: HaloTiling, failure: Exception) -> HaloTiling:
    if tiling.tile == 1:
        raise failure
    return HaloTiling(factor=tiling.factor, halo=tiling.halo, tile=tiling.tile // 2)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("most", [4, 5, 7])
def test_a_tile_that_failed_is_tried_smaller(mini, error, after, most):
    """After `after` tiles no more than `most` latent frames fit; nothing is lost and nothing twice."""
    calls = itertools.count()

    def scarce_encode(video: Tensor) -> Tensor:
        if next(calls) >= after and video.shape[2] > 8 * most:
            raise error
        return pool_local(video)

    def scarce_decode(latent: Tensor, frames: int) -> Tensor:
        if next(calls) >= after and latent.shape[2] > most:
            raise error
        return repeat_local(latent, frames)

    tiling = HaloTiling(factor=8, tile=8, halo=Halo(before=2, after=1))
    video = clip(301, 1, 1)
    latent = pool_local(video)
    encoded = list(encode_stream(video.split(13, dim=2), scarce_encode, tiling, halved))
    assert torch.equal(torch.cat(encoded, dim=2), latent)
    calls = itertools.count()
    for start, end in ((0, 301), (77, 290)):
        part = latent[:, :, tiling.latents_for(301, start, end).slice].split(3, dim=2)
        pieces = decode_stream(part, scarce_decode, tiling, halved, frames=301, start=start, end=end)
        assert torch.equal(torch.cat(list(pieces), dim=2), repeat_local(latent, 301)[:, :, start:end])


def pool_local(video: Tensor) -> Tensor:
    missing = -video.shape[2] % 8
    filled = torch.cat((video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2)
    return filled.unflatten(2, (-1, 8)).mean(dim=3)


def repeat_local(latent: Tensor, frames: int) -> Tensor:
    return latent.repeat_interleave(8, dim=2)[:, :, :frames]


def test_a_failure_without_a_smaller_tile_is_raised():
    def never(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("none left")

    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        list(encode_stream([clip(20, 1, 1)], never, SOME, halved))


def test_a_source_that_runs_out_of_memory_is_not_taken_for_the_end():
    def source():
        yield clip(40, 1, 1)
        raise MemoryError("while reading")

    with pytest.raises(MemoryError, match="while reading"):
        list(encode_stream(source(), pool_time, SOME, halved))
