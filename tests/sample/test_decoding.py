"""From the latent to the file: piece by piece, and what is left when it fails."""

import shlex
import weakref
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import kinoflow.sample.pipeline
from kinoflow.configs.pretrained import fingerprint
from kinoflow.data.latents.kino import read_info, read_latents
from kinoflow.data.video import VideoWriter, read
from kinoflow.sample.generate import sample_latent
from kinoflow.sample.output import Output, finished
from kinoflow.tae.__main__ import main as tae_main
from kinoflow.tae.tiles.tiled import TiledTAE
from tests.sample.test_sample_cli import PROMPT, files, refused


def out_of_memory(tae, latent, frames, memory):
    raise RuntimeError("CUDA out of memory.\nTried to allocate 20 GiB")


@pytest.fixture
def failed(run, monkeypatch):
    """The command that the error line names, after a decoder that ran out of memory."""

    def sample(*argv):
        with monkeypatch.context() as patch:
            patch.setattr(kinoflow.sample.pipeline, "decode_pieces", out_of_memory)
            err = refused(run(*argv))
        assert (
            "decoding failed (CUDA out of memory. Tried to allocate 20 GiB); its latent is kept, run: " in err
        )
        return shlex.split(err.partition("run: ")[2])

    return sample


def test_a_latent_that_was_not_decoded_is_kept_and_decoded_by_the_command_it_names(run, failed, capsys):
    command = failed(PROMPT, "--seed", "3", "--out", "x.mp4")
    assert files() == ["x.kino"]
    info = read_info("x.kino")
    assert (info.frames, info.height, info.width, info.fps) == (16, 32, 32, Fraction(16))
    assert (info.source, info.metadata["seed"], info.metadata["steps"]) == (PROMPT, "3", "2")
    assert command[:5] == ["kinoflow", "tae", "decode", "x.kino", "x.mp4"]
    assert command[-2:] == ["--crf", info.metadata["crf"]] == ["--crf", "18.0"]
    assert tae_main([*command[2:], "--crf", "0"]) == 0
    assert finished(Path("x.mp4"), info.metadata)
    for seed in ("3", "4"):
        assert run(PROMPT, "--seed", seed, "--out", f"{seed}.mp4", "--crf", "0")[0] == 0
    same, plain, other = (read(name).astype(int) for name in ("x.mp4", "3.mp4", "4.mp4"))
    assert np.abs(same - plain).max() <= 2, "the latent was rounded to float16"
    assert np.abs(other - plain).max() > 20
    assert same.shape == (16, 32, 32, 3)


def test_a_kept_latent_is_what_the_autoencoder_gives(tiny_release, failed):
    """Not normalized, as in every latent file: the statistics come back when it is read as training reads."""
    failed(PROMPT, "--out", "x.mp4")
    tae, encoder = tiny_release.tae(), tiny_release.encoder()
    sampling = replace(tiny_release.config.sampling, num_steps=2)
    normalized = sample_latent(
        tiny_release.backbone(), encoder([PROMPT], Fraction(16)), encoder.null(),
        tae.config.latent_shape(16, 32, 32), seed=0, sampling=sampling,
    )  # fmt: skip
    (latent,) = read_latents(Path("x.kino"), 0, 2, (2, 4, 4, 4))
    mean = torch.from_numpy(latent).float().transpose(0, 1)[None]
    torch.testing.assert_close(tae.normalize(mean), normalized, rtol=0, atol=5e-3)
    assert not torch.allclose(mean, normalized, atol=0.05)
    assert read_info("x.kino").tae_sha256 == fingerprint(tae.state_dict())


def test_a_kept_latent_takes_the_place_of_nothing(failed):
    Path("x.kino").write_text("mine")
    assert failed(PROMPT, "--out", "x.mp4")[3:5] == ["x-2.kino", "x.mp4"]
    assert Path("x.kino").read_text() == "mine"
    command = failed(PROMPT, "--frames", "1", "--out", "a still.png")
    assert command[3:5] == ["a still.kino", "a still.mp4"]
    assert files() == ["a still.kino", "x-2.kino", "x.kino"]


def test_too_little_memory_to_decode_does_not_lose_the_latent(run):
    err = refused(run(PROMPT, "--out", "x.mp4", "--memory", "40MiB"))
    assert "memory: 40MiB is too little" in err
    assert files() == ["x.kino"]


def stub_tiles(monkeypatch, log, *, fail_at=None):
    """Tiles of 16 frames that say when they are made; the last is half a tile."""

    def decode_whole(self, latent, frames):
        for index in range(3):
            if index == fail_at:
                raise MemoryError
            log.append(f"made {index}")
            yield torch.full((1, 3, 16 if index < 2 else 8, 32, 48), index - 1.0)

    monkeypatch.setattr(TiledTAE, "decode_whole", decode_whole)
    plain = VideoWriter.write

    def write(self, frames):
        log.append(f"wrote {len(frames)}")
        plain(self, frames)

    monkeypatch.setattr(VideoWriter, "write", write)


def test_a_clip_is_written_while_it_is_decoded(run, monkeypatch):
    log = []
    stub_tiles(monkeypatch, log)
    assert run(PROMPT, "--size", "48x32", "--out", "x.mp4")[0] == 0
    assert log == ["made 0", "wrote 8", "wrote 8", "made 1", "wrote 8", "wrote 8", "made 2", "wrote 8"]
    clip = read("x.mp4").astype(int)
    assert clip.shape == (40, 32, 48, 3)
    assert clip[:16].max() <= 2 and abs(clip[16:32] - 128).max() <= 2 and clip[32:].min() >= 253


def test_decoding_that_fails_half_way_leaves_no_clip(run, monkeypatch):
    log = []
    stub_tiles(monkeypatch, log, fail_at=1)
    assert "decoding failed (MemoryError)" in refused(run(PROMPT, "--size", "48x32", "--out", "x.mp4"))
    assert log == ["made 0", "wrote 8", "wrote 8"]
    assert files() == ["x.kino"]


def test_no_more_than_one_piece_is_held(tmp_path):
    made = []

    def pieces():
        for value in range(5):
            assert not any(piece() is not None for piece in made)
            piece = np.full((8, 32, 48, 3), 50 * value, np.uint8)
            made.append(weakref.ref(piece))
            yield piece
            del piece

    def output(name):
        shape = {"frames": 40, "height": 32, "width": 48, "fps": Fraction(16)}
        return Output(tmp_path / name, **shape, crf=18.0, metadata={"prompt": "grey"})

    output("pieces.mp4").write(pieces())
    assert len(made) == 5
    output("whole.mp4").write([np.concatenate([np.full((8, 32, 48, 3), 50 * i, np.uint8) for i in range(5)])])
    assert (tmp_path / "pieces.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
