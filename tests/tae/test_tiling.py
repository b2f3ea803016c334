"""Tiles against the whole, with codecs simple enough to know the answer."""

import itertools

import pytest
import torch
from torch import Tensor

from kinoflow.tae.tiles.blend import (
    SpatialTiling,
    TemporalTiling,
    Tile,
    Window,
    decode_stream,
    encode_stream,
    fade,
    spatial_decoder,
    spatial_encoder,
    split,
)
from tests.tae.toys import decode_tiled, encode_tiled

PAPER = TemporalTiling(factor=8)
LENGTHS = range(1, 41)


def pool_time(video: Tensor) -> Tensor:
    """Mean over groups of 8 frames; the last frame repeats to fill the last group."""
    missing = -video.shape[2] % 8
    filled = torch.cat((video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2)
    return filled.unflatten(2, (-1, 8)).mean(dim=3)


def repeat_time(latent: Tensor, frames: int) -> Tensor:
    assert 8 * (latent.shape[2] - 1) < frames <= 8 * latent.shape[2]
    return latent.repeat_interleave(8, dim=2)[:, :, :frames]


def wide_decode(latent: Tensor, frames: int) -> Tensor:
    """A decoder that looks at its whole tile, so that tiles disagree."""
    return repeat_time(latent, frames) + latent.mean(dim=2, keepdim=True)


def clip(frames: int, height: int = 2, width: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 3, frames, height, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("frames", LENGTHS)
def test_local_codec_is_not_changed_by_tiles(frames):
    video = clip(frames)
    latent = encode_tiled(video, pool_time, PAPER)
    assert latent.shape[2] == PAPER.latent_frames(frames)
    assert torch.equal(latent, pool_time(video))
    assert torch.equal(decode_tiled(latent, repeat_time, PAPER, frames=frames), repeat_time(latent, frames))


def test_encoder_tiles_are_32_frames_without_overlap():
    seen: list[Tensor] = []
    video = clip(75)
    encode_tiled(video, lambda tile: seen.append(tile) or pool_time(tile), PAPER)
    assert [tile.shape[2] for tile in seen] == [32, 32, 11]
    assert torch.equal(torch.cat(seen, dim=2), video)


@pytest.mark.parametrize("frames", [33, 40, 48, 49, 64, 75, 128])
def test_decoder_tiles_are_4_latent_frames_and_share_2(frames):
    tiles = PAPER.decoder_tiles(frames)
    assert all(tile.stop - tile.start == 4 for tile in tiles[:-1])
    assert 2 < tiles[-1].stop - tiles[-1].start <= 4
    assert all(before.stop - after.start == 2 for before, after in itertools.pairwise(tiles))
    assert tiles[-1].stop == PAPER.latent_frames(frames)


@pytest.mark.parametrize("frames", [40, 64, 75])
def test_earlier_tile_fades_out_as_one_minus_j_over_n(frames):
    calls = itertools.count()

    def numbered(latent: Tensor, length: int) -> Tensor:
        return torch.full((1, 3, length, 1, 1), float(next(calls)), dtype=torch.float64)

    latent = torch.zeros(1, 1, PAPER.latent_frames(frames), 1, 1, dtype=torch.float64)
    decoded = decode_tiled(latent, numbered, PAPER, frames=frames)[0, 0, :, 0, 0]
    last = len(PAPER.decoder_tiles(frames)) - 1
    # Frame 16k + j lies in tile k - 1 (weight 1 - j/16) and tile k (weight j/16).
    expected = [min(max(0.0, f // 16 - 1 + (f % 16) / 16), last) for f in range(frames)]
    assert decoded.tolist() == expected


@pytest.mark.parametrize("frames", [*LENGTHS, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blend_weights_sum_to_one(frames, dtype):
    """A constant clip stays exactly constant, also for values that no power of two divides."""
    video = torch.full((1, 3, frames, 1, 1), 0.7, dtype=dtype)
    latent = torch.full((1, 3, PAPER.latent_frames(frames), 1, 1), 0.7, dtype=dtype)
    assert torch.equal(decode_tiled(latent, repeat_time, PAPER, frames=frames), video)


def test_fade_is_a_straight_line():
    earlier, later = torch.zeros(1, 5, dtype=torch.float64), torch.ones(1, 5, dtype=torch.float64)
    assert torch.allclose(
        fade(earlier, later, 1), torch.arange(5, dtype=torch.float64)[None] / 5, rtol=0, atol=1e-15
    )


def chunked(whole: Tensor, sizes: list[int]) -> list[Tensor]:
    return [part for part in whole.split(sizes, dim=2)]


@pytest.mark.parametrize("frames", [1, 7, 32, 33, 40, 70, 97])
@pytest.mark.parametrize("size", [1, 3, 8, 50])
def test_stream_equals_whole(frames, size):
    video = clip(frames)
    sizes = [size] * (frames // size) + ([frames % size] if frames % size else [])
    latents = list(encode_stream(chunked(video, sizes), pool_time, PAPER))
    latent = encode_tiled(video, pool_time, PAPER)
    assert torch.equal(torch.cat(latents, dim=2), latent)
    pieces = decode_stream(latent.split(1, dim=2), wide_decode, PAPER, frames=frames)
    assert torch.equal(
        torch.cat(list(pieces), dim=2), decode_tiled(latent, wide_decode, PAPER, frames=frames)
    )


@pytest.mark.parametrize("frames", [20, 40, 83])
def test_range_equals_slice_of_whole(frames):
    latent = pool_time(clip(frames))
    whole = decode_tiled(latent, wide_decode, PAPER, frames=frames)
    for start, end in itertools.combinations(range(0, frames + 1, 9), 2):
        tiles = PAPER.decoder_tiles(frames, start, end)
        part = latent[:, :, tiles[0].start : tiles[-1].stop]
        pieces = list(decode_stream([part], wide_decode, PAPER, frames=frames, start=start, end=end))
        assert torch.equal(torch.cat(pieces, dim=2), whole[:, :, start:end])


def test_range_decodes_only_the_tiles_it_needs():
    latent, calls = pool_time(clip(320)), []

    def counted(tile: Tensor, frames: int) -> Tensor:
        calls.append(frames)
        return repeat_time(tile, frames)

    tiles = PAPER.decoder_tiles(320, 200, 201)
    list(decode_stream([latent[:, :, tiles[0].start :]], counted, PAPER, frames=320, start=200, end=201))
    assert len(calls) == 2


def test_stream_holds_a_bounded_number_of_frames():
    """Frames come out while later latents have not been asked for yet."""
    asked = []

    def latents():
        for index in range(100):
            asked.append(index)
            yield torch.zeros(1, 3, 1, 1, 1)

    first = next(iter(decode_stream(latents(), repeat_time, PAPER, frames=800)))
    assert first.shape[2] == 16
    assert len(asked) == 4


def test_missing_latents_are_named():
    with pytest.raises(ValueError, match="end at latent frame 3"):
        list(decode_stream([torch.zeros(1, 3, 3, 1, 1)], repeat_time, PAPER, frames=40))


def test_range_outside_the_clip():
    with pytest.raises(ValueError, match="frames 5:41"):
        PAPER.decoder_tiles(40, 5, 41)


@pytest.mark.parametrize(("key", "value"), [("tile", 0), ("overlap", 3), ("overlap", -1), ("factor", 0)])
def test_tiling_names_the_wrong_key(key, value):
    with pytest.raises(ValueError, match=rf"tiling\.{key}"):
        TemporalTiling(**{"factor": 8, key: value})


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("tile", "overlap"), [(4, 2), (4, 0), (5, 1), (1, 0)])
def test_split_covers_everything(length, tile, overlap):
    tiles = split(length, tile, overlap)
    assert tiles[0].start == 0
    assert tiles[-1].stop == length
    assert all(before.stop - after.start == overlap for before, after in itertools.pairwise(tiles))
    assert len(tiles) == 1 or tiles[-1].stop - tiles[-1].start > overlap


def pool_space(video: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool3d(video, (1, 8, 8))


def repeat_space(latent: Tensor, frames: int) -> Tensor:
    return latent.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)[:, :, :frames]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 4), (4, 5), (7, 9), (2, 13)])
def test_spatial_tiles_do_not_change_a_local_codec(rows, columns):
    tiling = SpatialTiling(factors=(8, 8), tile=4, overlap=2)
    video = clip(2, 8 * rows, 8 * columns)
    latent = spatial_encoder(pool_space, tiling)(video)
    assert torch.allclose(latent, pool_space(video), rtol=0, atol=1e-15)
    assert torch.equal(spatial_decoder(repeat_space, tiling)(latent, 2), repeat_space(latent, 2))


def test_spatial_blend_is_linear_in_pixels():
    tiling = SpatialTiling(factors=(8, 8), tile=4, overlap=2)
    calls = itertools.count()

    def numbered(latent: Tensor, frames: int) -> Tensor:
        height, width = latent.shape[3] * 8, latent.shape[4] * 8
        return torch.full((1, 3, frames, height, width), float(next(calls)), dtype=torch.float64)

    row = spatial_decoder(numbered, tiling)(torch.zeros(1, 1, 1, 1, 6), 1)[0, 0, 0, 0]
    expected = [min(max(0.0, (x - 16) / 16), 1.0) for x in range(48)]
    assert row.tolist() == expected


def test_a_window_joins_only_what_a_tile_reaches():
    """Each tile's storage holds its own positions and those after it in the last chunk: none before it."""
    whole = torch.arange(40.0).view(1, 1, 40, 1, 1)
    window = Window(iter(chunk.clone() for chunk in whole.split(4, dim=2)), 0)
    for start, stop in ((0, 10), (6, 18), (14, 26), (30, 40)):
        tile = window.take(Tile(start=start, stop=stop))
        assert torch.equal(tile, whole[:, :, start:stop])
        assert tile.untyped_storage().nbytes() <= 4 * (stop - start + 4)
