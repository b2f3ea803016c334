"""The tiled autoencoder: both modes against the untiled model, budgets, and memory that runs out."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kinoflow.configs.errors import UserError
from kinoflow.tae import TAE
from kinoflow.tae.model import chunks
from kinoflow.tae.tiles.memory import _LiveBytes
from kinoflow.tae.tiles.tiled import TiledTAE
from tests.tae.toys import CONFIGS, MINI, decode_whole, encode_whole, random_tae

MIB = 2**20


@pytest.fixture(scope="module")
def mini() -> TAE:
    return random_tae(MINI)


def clip(frames: int, height: int = 16, width: int = 24) -> Tensor:
    return torch.randint(0, 256, (1, 3, frames, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("frames", range(1, 41))
@pytest.mark.parametrize("mode", ["halo", "blend"])
def test_every_length_comes_back(mini, mode, frames):
    tiled = TiledTAE(mini, mode=mode)
    video = clip(frames)
    latent = encode_whole(tiled, video)
    assert latent.shape == (1, 4, -(-frames // 8), 2, 3)
    assert decode_whole(tiled, latent, frames).shape == video.shape


def test_bytes_and_values_encode_the_same(mini):
    """Bytes become values tile by tile, in float32, and then take the model's type."""
    video, tiled = clip(30), TiledTAE(mini)
    latent = encode_whole(tiled, video)
    assert latent.dtype == torch.float64
    assert torch.equal(latent, encode_whole(tiled, video.float() / 127.5 - 1))
    assert torch.allclose(latent, mini.encode(video.double() / 127.5 - 1).mean, rtol=1e-4, atol=1e-4)


@settings(max_examples=15)
@given(data=st.data(), frames=st.integers(1, 150))
@pytest.mark.parametrize("mode", ["halo", "blend"])
def test_ranges_and_chunks_change_nothing(mini, mode, data, frames):
    tiled = TiledTAE(mini, mode=mode)
    start = data.draw(st.integers(0, frames - 1))
    end = data.draw(st.integers(start + 1, frames))
    size = data.draw(st.integers(1, 40))
    video = clip(frames, 8, 8).double() / 127.5 - 1
    latent = encode_whole(tiled, video)
    assert torch.equal(torch.cat(list(tiled.encode_stream(video.split(size, dim=2))), dim=2), latent)
    part = latent[:, :, tiled.latents_for(frames, start, end, cells=(1, 1)).slice]
    pieces = tiled.decode_stream(part.split(size, dim=2), frames=frames, start=start, end=end)
    whole, some = decode_whole(tiled, latent, frames), torch.cat(list(pieces), dim=2)
    if mode == "blend":
        assert torch.equal(some, whole[:, :, start:end])
    # A part of a tile is computed in chunks of its own, which round in their own way: nothing else differs.
    assert float((some - whole[:, :, start:end]).abs().max()) < 1e-13 * float(whole.abs().max())


ATTENTIVE = replace(MINI, channels=32, norm="group", attention=True)


@settings(max_examples=25)
@given(data=st.data(), frames=st.integers(1, 70))
@pytest.mark.parametrize("name", [*CONFIGS, "attentive"])
def test_wanted_frames_are_those_of_the_whole(models, name, data, frames):
    model = models[name]
    latent = torch.randn(1, 4, -(-frames // model.config.factors[0]), 2, 1, dtype=torch.float64)
    start = data.draw(st.integers(0, frames - 1))
    wanted = slice(start, data.draw(st.integers(start + 1, frames)))
    whole = model.decode(latent, frames)
    with torch.inference_mode():
        part = model.decode(latent, frames, wanted)
    assert part.shape[2] == wanted.stop - wanted.start
    assert float((part - whole[:, :, wanted]).abs().max()) < 1e-11 * float(whole.abs().max())
    with torch.enable_grad():
        assert torch.equal(model.decode(latent, frames, wanted), model.decode(latent, frames)[:, :, wanted])


@pytest.fixture(scope="module")
def models() -> dict[str, TAE]:
    return {name: random_tae(config) for name, config in (CONFIGS | {"attentive": ATTENTIVE}).items()}


def test_a_part_of_a_clip_costs_what_a_part_costs(mini):
    """Frames that go through the coarsest and the finest level, of a clip of 24 latent frames."""
    latent, passed = torch.randn(1, 4, 24, 1, 1, dtype=torch.float64), {}

    def counted(name):
        def count(_module, inputs):
            passed[name] = passed.get(name, 0) + inputs[0].shape[2]

        return count

    parts = {"coarse": mini.decoder.conv_in.spatial, "fine": mini.decoder.conv_out.spatial}
    hooks = [part.register_forward_pre_hook(counted(name)) for name, part in parts.items()]
    tiled = TiledTAE(mini)
    for start, end, coarse, fine in ((0, 190, 19 + 11, 4 * (19 + 11)), (40, 41, 11, 3), (189, 190, 6, 3)):
        passed.clear()
        part = latent[:, :, tiled.latents_for(190, start, end, cells=(1, 1)).slice]
        pieces = torch.cat(list(tiled.decode_stream([part], frames=190, start=start, end=end)), dim=2)
        assert pieces.shape[2] == end - start
        assert passed["coarse"] <= coarse and passed["fine"] <= fine, (start, end, passed)
    for hook in hooks:
        hook.remove()


class Scarce(TAE):
    """Raises when a tile holds more than `most` numbers; counts what it was given."""

    def __init__(self, most: float) -> None:
        super().__init__(MINI)
        self.most, self.failures = most, 0

    def _check(self, tile: Tensor) -> None:
        if tile.numel() > self.most:
            self.failures += 1
            raise torch.OutOfMemoryError("none left")

    def encode(self, video):
        self._check(video)
        return super().encode(video)

    def decode(self, latent, frames):
        self._check(latent)
        return super().decode(latent, frames)


@pytest.mark.parametrize(
    ("mode", "frames_fit", "latents_fit"),
    [("halo", 45 * 64 * 96, 6 * 8 * 12), ("blend", 20 * 64 * 96, 2.5 * 8 * 12)],
)
def test_smaller_tiles_when_memory_runs_out(mini, mode, frames_fit, latents_fit, caplog):
    """Less than the count promises: fewer at a time, the same clip, and remembered for the next one."""
    video = clip(75, 64, 96).double() / 127.5 - 1
    reference = TiledTAE(mini, mode=mode)
    latent = encode_whole(reference, video)
    decoded = decode_whole(reference, latent, 75)
    scarce = Scarce(most=3 * frames_fit).double()
    scarce.load_state_dict(mini.state_dict())
    tiled = TiledTAE(scarce, mode=mode)
    with caplog.at_level(logging.WARNING, logger="kinoflow.tae.tiles.tiled"):
        encoded = encode_whole(tiled, video)
        assert scarce.failures > 0
        assert "memory ran out" in caplog.text
        failures = scarce.failures
        encode_whole(tiled, video)
        assert scarce.failures == failures
        scarce.most = 4 * latents_fit
        again = decode_whole(tiled, latent, 75)
    assert scarce.failures > failures
    assert encoded.shape == latent.shape
    assert again.shape == decoded.shape
    # What is lost by tiles in space is what the mode loses; nothing is out of place.
    assert float((encoded - latent).std()) < 0.2 * float(latent.std())
    assert float((again - decoded).std()) < 0.2 * float(decoded.std())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("frames", [1, 13, 70, 149])
def test_a_whole_clip_is_what_the_untiled_decoder_gives(config, frames):
    tae = random_tae(config)
    latent = torch.randn(1, 4, -(-frames // tae.config.factors[0]), 2, 3, dtype=torch.float64)
    pieces = list(TiledTAE(tae).decode_whole(latent, frames))
    with torch.no_grad():
        whole = tae.decode(latent, frames)
    torch.testing.assert_close(torch.cat(pieces, dim=2), whole, rtol=0, atol=1e-12)


def test_a_whole_clip_goes_on_in_tiles_where_memory_ran_out(mini, monkeypatch, caplog):
    latent = torch.randn(1, 4, 20, 2, 3, dtype=torch.float64)
    whole = torch.cat(list(TiledTAE(mini).decode_whole(latent, 157)), dim=2)
    pieces = mini.decode_pieces(latent, 157)

    def scarce(_latent: Tensor, _frames: int) -> Iterator[Tensor]:
        yield from itertools.islice(pieces, 3)
        raise MemoryError

    monkeypatch.setattr(mini, "decode_pieces", scarce)
    with caplog.at_level(logging.WARNING, logger="kinoflow.tae.tiles.tiled"):
        again = torch.cat(list(TiledTAE(mini).decode_whole(latent, 157)), dim=2)
    assert "memory ran out" in caplog.text
    assert again.shape == whole.shape
    assert float((again - whole).abs().max()) < 0.05 * float(whole.std())


def test_a_long_clip_holds_no_more_than_a_short_one(mini, monkeypatch):
    """Bytes alive at once while pieces are made and dropped, beside the latent; no allocator has a say."""
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 64 << 10)
    tiled, peaks = TiledTAE(mini), []
    tiled.tile_frames((8, 8))  # counted before, with tensors that hold nothing
    for count in (8, 60, 120):
        latent = torch.zeros(1, 4, count, 8, 8, dtype=torch.float64)
        with _LiveBytes() as live, torch.no_grad():
            made = 0
            for piece in tiled.decode_whole(latent, 8 * count):
                made += piece.shape[2]
                del piece
        assert made == 8 * count
        peaks.append(live.peak - 2 * latent.nbytes)
    frames = 3 * 8 * 60 * 64 * 64 * 8  # of the clip of 60
    assert peaks[1] < min(1.1 * peaks[0], 0.1 * frames)
    assert peaks[2] < 1.02 * peaks[1]


def test_no_tile_is_small_enough(mini):
    scarce = Scarce(most=10).double()
    scarce.load_state_dict(mini.state_dict())
    with pytest.raises(UserError, match="memory: ran out with the smallest tiles"):
        encode_whole(TiledTAE(scarce), clip(9).double())


def test_other_failures_are_not_retried(mini, monkeypatch):
    calls = itertools.count()

    def broken(_latent: Tensor, _frames: int) -> Tensor:
        next(calls)
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(mini, "decode", broken)
    for mode in ("halo", "blend"):
        with pytest.raises(RuntimeError, match="shapes do not match"):
            decode_whole(TiledTAE(mini, mode=mode), torch.zeros(1, 4, 1, 1, 1, dtype=torch.float64), 8)
    assert next(calls) == 2


def test_a_small_budget_gives_small_tiles(mini):
    roomy, tight = TiledTAE(mini), TiledTAE(mini, memory=100 * MIB)
    assert tight.tile_frames((16, 16)) < roomy.tile_frames((16, 16)) == 128
    with pytest.raises(UserError, match="is too little for frames of 128x128"):
        TiledTAE(mini, memory=MIB).tile_frames((16, 16))


def test_nothing_in(mini):
    assert list(TiledTAE(mini).encode_stream([])) == []
    with pytest.raises(ValueError, match="latents: there are none"):
        next(TiledTAE(mini).decode_stream([], frames=8))


def test_sides_that_do_not_divide(mini):
    with pytest.raises(ValueError, match="height: 12 is not a positive multiple of 8"):
        encode_whole(TiledTAE(mini), clip(8, 12, 16))
