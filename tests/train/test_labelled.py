"""Labelled pictures become shards: pixels or latents, a label each, no text."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from kinoflow.configs.errors import UserError
from kinoflow.configs.pretrained import fingerprint
from kinoflow.configs.schema import load
from kinoflow.data.latents import contents
from kinoflow.data.latents.shards import LatentDataset
from kinoflow.tae.model.pixels import from_bytes
from kinoflow.train.tasks import precompute as module
from kinoflow.train.tasks.precompute import NoText, PrecomputeConfig, load_encoders, precompute
from tests.train.tiny import tiny_encoders

NAME = "1x8x8@1"
CHOICE = np.zeros(1, np.int64)


@pytest.fixture
def table(tmp_path):
    """Forty grey pictures of 6 x 6 on black, labels 5 and 9."""
    rng = np.random.default_rng(0)
    pictures = np.zeros((40, 6, 6), np.uint8)
    pictures[:, 1:5, 1:5] = rng.integers(0, 256, (40, 4, 4))
    labels = rng.choice(np.array([5, 9]), 40)
    np.savez(tmp_path / "digits.npz", images=pictures, labels=labels)
    return pictures, labels


def make(tmp_path, *more, source="digits.npz", out="out", encoders=None):
    sources = [f"source=images:{tmp_path / source}", f"buckets=[{NAME}]", f"out={tmp_path / out}",
               "shard_size=16", "batch_size=5", "workers=0", *more]  # fmt: skip
    config = load(PrecomputeConfig, sources)
    precompute(config, encoders)
    return LatentDataset(tmp_path / out)


def test_pixels_are_stored_with_their_labels(table, tmp_path):
    pictures, labels = table
    data = make(tmp_path, "fit=pad")
    held = make(tmp_path, "fit=pad", source="digits.npz:heldout", out="held")
    assert data.index.classes == ("5", "9") and data.index.widths == ()
    assert (data.index.latent_mean, data.index.latent_std) == ((0.0,), (1.0,))
    assert (data.index.made_from["tae"], data.index.made_from["text"]) == ("pixels", "labels")
    known = {picture.tobytes(): label for picture, label in zip(pictures, labels, strict=True)}
    assert data.num_clips(NAME) + held.num_clips(NAME) == 40
    for each in (data, held):
        for clip in range(each.num_clips(NAME)):
            batch = each.get(NAME, np.array([clip]), CHOICE)
            assert batch.latent.shape == (1, 1, 1, 8, 8) and batch.texts == ()
            found = ((batch.latent[0, 0, 0] + 1) * 127.5).round().byte().numpy()
            want = torch.from_numpy(found).float() / 127.5 - 1
            assert (batch.latent[0, 0, 0] - want).abs().max() <= 2**-12 + 1e-6, "what float16 rounds"
            name = each.index.classes[int(batch.labels[0])]
            assert str(known.pop(found[1:7, 1:7].tobytes())) == name == each.captions(NAME, clip)[0]
            assert not found[0].any() and not found[:, 7].any()
    assert not known


def test_cropping_is_the_default_and_colours_are_kept(tmp_path):
    rgb = np.random.default_rng(1).integers(0, 256, (30, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "digits.npz", x=rgb, y=np.arange(30) % 3)
    data, grey = make(tmp_path), make(tmp_path, "channels=1", out="grey")
    seen = {picture.tobytes() for picture in rgb}
    for clip in range(data.num_clips(NAME)):
        (found,) = data.get(NAME, np.array([clip]), CHOICE).latent
        shown = ((found[:, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous().numpy()
        assert shown.tobytes() in seen
        luma = torch.tensor((0.299, 0.587, 0.114)) @ from_bytes(torch.from_numpy(shown)[None])[:, 0].flatten(
            1
        )
        stored = grey.get(NAME, np.array([clip]), CHOICE).latent
        assert stored.shape == (1, 1, 1, 8, 8) and (stored.flatten() - luma).abs().max() < 2**-11


def test_an_autoencoder_encodes_them(tmp_path):
    rng = np.random.default_rng(2)
    np.savez(tmp_path / "digits.npz", x=rng.integers(0, 256, (12, 8, 8), np.uint8), y=np.arange(12) % 2)
    tae = tiny_encoders().tae
    tae.save_pretrained(tmp_path / "release" / "tae")
    config = load(PrecomputeConfig, [f"source=images:{tmp_path}/digits.npz", f"release={tmp_path}/release"])
    encoders = load_encoders(config)
    assert isinstance(encoders.text, NoText), "no text encoder is loaded: there is none"
    data = make(tmp_path, f"release={tmp_path / 'release'}", encoders=encoders)
    pixels = make(tmp_path, "channels=3", out="pixels")
    assert data.index.made_from["tae"] == fingerprint(tae.state_dict()) and data.index.classes == ("0", "1")
    for clip in range(data.num_clips(NAME)):
        one, other = (each.get(NAME, np.array([clip]), CHOICE) for each in (data, pixels))
        with torch.no_grad():
            exact = ((other.latent + 1) * 127.5).round() / 127.5 - 1
            want = tae.normalize(tae.encode(exact).mean)
        assert (one.latent - want).abs().max() < 2e-3 and torch.equal(one.labels, other.labels)


@pytest.fixture
def folder(tmp_path):
    """Twenty-four pictures of two sizes in two folders."""
    rng = np.random.default_rng(3)
    for i in range(24):
        place = tmp_path / "pets" / ("cat", "dog")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        size = (8, 8) if i % 3 else (20, 24)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(place / f"{i}.png")
    return tmp_path / "pets"


def test_a_folder_of_several_sizes_and_a_bad_picture(folder, tmp_path, capsys):
    (folder / "cat" / "bad.png").write_bytes(b"no picture")
    data = make(tmp_path, source="pets")
    assert data.index.classes == ("cat", "dog") and data.index.latent_mean == (0.0,) * 3
    for clip in range(data.num_clips(NAME)):
        batch = data.get(NAME, np.array([clip]), CHOICE)
        assert data.captions(NAME, clip) == [("cat", "dog")[int(batch.labels[0])]]
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["path"] for line in listed] == ["pets/cat/bad.png"]
    capsys.readouterr()
    make(tmp_path, source="pets")
    assert "0 of 2 shards to make" in capsys.readouterr().out
    (shard,) = [path for path in (tmp_path / "out" / "1x8x8@1").iterdir() if path.name == "00001"]
    before = shard.stat().st_ino
    shard.rename(tmp_path / "away")
    make(tmp_path, source="pets")
    assert "1 of 2 shards to make" in capsys.readouterr().out and shard.stat().st_ino != before


def test_a_table_that_changed_is_another_source(table, tmp_path):
    pictures, labels = table
    make(tmp_path)
    with pytest.raises(UserError, match="made_from was"):
        make(tmp_path, "fit=pad")
    np.savez(tmp_path / "digits.npz", images=pictures, labels=np.where(labels == 5, 9, 5))
    with pytest.raises(UserError, match=r"out: made_from was .* choose another out= or delete the folder"):
        make(tmp_path)


def test_few_pictures_are_a_mixed_few(table, tmp_path):
    data = make(tmp_path, "clips=12")
    assert data.num_clips(NAME) == 12 and {data.label(NAME, i) for i in range(12)} == {0, 1}
    assert make(tmp_path, "clips=1000", out="all").num_clips(NAME) > 12


def test_a_command_needs_no_release(table, tmp_path, monkeypatch):
    words = [f"source=images:{tmp_path / 'digits.npz'}", f"buckets=[{NAME}]", f"out={tmp_path / 'out'}"]
    assert module.main([*words, "workers=0"]) == 0
    assert contents.describe(tmp_path / "out")["classes"] == ["5", "9"]
    with pytest.raises(UserError, match="out: holds pixels, which nothing has to decode"):
        contents.export(tmp_path / "out", tmp_path / "a.kino", 0)
    with pytest.raises(UserError, match="release: name the release folder"):
        module.main(["source=clips.jsonl", *words[1:]])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["source=world", "fit=pad"], "fit: clips are cropped, only labelled images"),
        (["source=world", "channels=1"], "channels: an autoencoder takes three"),
        (["source=images:a.npz", "release=a", "channels=1"], "channels: an autoencoder takes three"),
        (["source=images:a.npz", "channels=2"], "channels: 2 is neither 1 nor 3"),
        (["source=images:a.npz", "captions_per_clip=2"], "captions_per_clip"),
    ],
)
def test_keys_that_do_not_go_together(words, message):
    with pytest.raises(UserError, match=message):
        load(PrecomputeConfig, words)


def test_a_bucket_that_no_picture_fills(table, tmp_path):
    for bucket in ("4x8x8@1", "1x8x64@1"):
        with pytest.raises(UserError, match=rf"no clip of images:.* fills {bucket}, remove it"):
            make(tmp_path, f"buckets=[1x8x8@1,{bucket}]")
