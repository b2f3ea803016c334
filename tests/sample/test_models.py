"""Models in memory together, or one after the other where it is short; the frames are the same."""

import gc
import shutil
import weakref
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from kinoflow.configs.errors import UserError
from kinoflow.data.video import read
from kinoflow.dit_video.video_dit import VideoDiT
from kinoflow.sample import pipeline as pipelines
from kinoflow.sample.again import main as again
from kinoflow.sample.generate import decode_pieces
from kinoflow.sample.models import streamed
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.release import Release
from kinoflow.sample.request import ClipRequest
from tests.sample.conftest import HashEncoder, tiny_dit
from tests.sample.test_given import picture

PROMPT = "a red star moves left"
META = torch.device("meta")


@pytest.fixture
def release(whole_release_folder):
    return Release.load(whole_release_folder)


@pytest.fixture(autouse=True)
def _roomy_tiles(monkeypatch):
    """The weights of these releases take less than the smallest tile of a clip: tiles get the default."""
    monkeypatch.setattr(pipelines, "decode_pieces", lambda *args: decode_pieces(*args[:3]))


@pytest.fixture
def alive(monkeypatch):
    """Reads of the parts in their order, and the most bytes of weights that were there at once."""
    models, told = weakref.WeakSet(), {"read": [], "most": 0}

    def watch(name):
        plain = getattr(Release, name)

        def reading(self, *args, **keys):
            model = plain(self, *args, **keys)
            models.add(model)
            gc.collect()
            there = sum(sum(each.nbytes for each in (*m.parameters(), *m.buffers())) for m in models)
            told["read"].append(name)
            told["most"] = max(told["most"], there)
            return model

        monkeypatch.setattr(Release, name, reading)

    for name in ("encoder", "backbone", "decoder"):
        watch(name)
    return told


def sizes(release) -> dict[str, int]:
    return Pipeline(release).bytes()


def test_with_enough_memory_all_are_read_once(release, alive):
    total = sum(sizes(release).values())
    alive["read"].clear()
    pipeline = Pipeline(release, memory=total)
    for _ in range(2):
        pipeline(PROMPT, steps=1)
    assert alive["read"] == ["encoder", "backbone", "decoder"]
    assert not pipeline.models.is_short


def test_with_too_little_they_take_turns_and_the_frames_are_the_same(release, alive):
    want, found = Pipeline(release)(PROMPT, steps=2, seed=5), sizes(release)
    gc.collect()
    alive["read"].clear()
    limit = max(found.values())
    assert limit < sum(found.values())
    pipeline = Pipeline(release, memory=limit)
    alive["most"] = 0
    for _ in range(2):
        made = pipeline(PROMPT, steps=2, seed=5)
        assert np.array_equal(made.frames, want.frames)
    assert pipeline.models.is_short and pipeline.default_batch == 1
    assert alive["read"][:3] == ["encoder", "backbone", "decoder"] and len(alive["read"]) > 3
    assert alive["most"] <= limit
    assert pipeline.bytes() == found


def test_two_that_fit_together_stay(release, alive):
    found = sizes(release)
    alive["read"].clear()
    pipeline = Pipeline(release, memory=found["backbone"] + found["decoder"])
    pipeline(PROMPT, steps=1)
    pipeline.models.backbone()
    pipeline.models.decoder()
    assert alive["read"] == ["encoder", "backbone", "decoder"]


def test_a_list_is_made_one_by_one(release):
    limit = max(sizes(release).values())
    requests = [ClipRequest(prompt=PROMPT, seed=seed, steps=1) for seed in range(3)]
    short = Pipeline(release, memory=limit).batch(requests, at_once=3)
    for one, other in zip(short, Pipeline(release).batch(requests), strict=True):
        assert np.array_equal(one.frames, other.frames)


def test_what_is_given_is_encoded_before_the_backbone_is_read(reading_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Release, "encoder", lambda self, text_cache=None, device="cpu": HashEncoder())
    release, path = Release.load(reading_folder), picture(tmp_path)
    found = sizes(release)
    want = Pipeline(release)(PROMPT, image=path, steps=2)
    made = Pipeline(release, memory=max(found.values()))(PROMPT, image=path, steps=2)
    assert np.array_equal(made.frames, want.frames)


def test_what_does_not_fit_alone_is_one_line(release, monkeypatch):
    with pytest.raises(
        UserError, match=r"^memory: 1MiB do not hold the backbone of \d+MiB; give more, or use"
    ):
        Pipeline(release, memory=1)
    models = Pipeline(release, memory=sizes(release)["backbone"]).models
    models._sizes["decoder"] = 2**30
    with pytest.raises(
        UserError, match=r"^memory: \d+MiB do not hold the autoencoder of 1024MiB; give more$"
    ):
        models.decoder()
    monkeypatch.setattr("kinoflow.sample.models._bytes", lambda *_: 2**30)
    with pytest.raises(
        UserError, match=r"^memory: \d+MiB do not hold the text encoders of 1024MiB; give more$"
    ):
        models.text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_streamed_backbone_gives_the_same_velocities(release, dtype):
    backbone, text = release.backbone("cpu", dtype), release.encoder()([PROMPT], Fraction(16))
    latent, time = torch.randn(1, 4, 2, 4, 4), torch.tensor([0.3])
    with torch.no_grad():
        want = backbone(latent, time, backbone.encode_condition(text))
        kept = streamed(release.backbone("cpu", dtype), torch.device("cpu"))
        got = kept(latent, time, kept.encode_condition(text))
    assert torch.equal(got, want)


def test_a_streamed_backbone_has_all_but_its_blocks_on_the_device(release):
    """On a device without values: where each tensor is, and that a call finds all it needs there."""
    backbone = streamed(release.backbone("cpu"), META)
    blocks = {id(tensor) for tensor in backbone.blocks.parameters()}
    for name, tensor in backbone.named_parameters():
        assert tensor.device.type == ("cpu" if id(tensor) in blocks else "meta"), name
    with torch.no_grad():
        text = tuple(
            embedding.to(torch.empty(0, device="meta"))
            for embedding in release.encoder()([PROMPT], Fraction(16))
        )
        told = backbone.encode_condition(text)
        velocity = backbone(torch.zeros(1, 4, 2, 4, 4, device="meta"), torch.zeros(1, device="meta"), told)
    assert velocity.shape == (1, 4, 2, 4, 4) and velocity.device.type == "meta"
    assert next(backbone.parameters()).device.type == "meta"  # where sampling puts what it gives


def test_a_gpu_that_cannot_hold_the_backbone_streams_it(whole_release_folder, tmp_path):
    folder = Path(shutil.copytree(whole_release_folder, tmp_path / "deep"))
    dit = VideoDiT(replace(tiny_dit().config, depth=4))
    dit.init_weights()
    shutil.rmtree(folder / "dit")
    dit.save_pretrained(folder / "dit")
    release, size = Release.load(folder), sum(each.nbytes for each in dit.parameters())
    found = Pipeline(release, device="cuda", memory=size - 1).models
    assert found.is_streamed and found.is_short
    assert not Pipeline(release, device="cuda", memory=size).models.is_streamed
    with pytest.raises(UserError, match=r"do not hold the backbone of .*, nor two blocks of it at a time"):
        Pipeline(release, device="cuda", memory=1)


def test_the_command_takes_it_and_again_makes_the_clip(run, tiny_release, tmp_path):
    limit = str(max(sizes(tiny_release).values()))
    words = [PROMPT, "--seed", "3"]
    assert run(*words, "--out", "all.mp4")[0] == 0
    assert run(*words, "--memory", limit, "--out", "turns.mp4")[0] == 0
    assert np.array_equal(read(tmp_path / "all.mp4"), read(tmp_path / "turns.mp4"))
    code, out, err = run(*words, "--memory", "1KB", "--out", "none.mp4")
    assert code == 2 and err.startswith("kinoflow sample: memory: 1MiB do not hold the backbone")
    assert not (tmp_path / "none.mp4").exists() and out == ""
    assert again([str(tmp_path / "turns.mp4"), "--weights", str(tiny_release.folder)]) == 0
