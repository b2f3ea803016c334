"""Latent folders: round trip, damage, resume, several writers."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from kinoflow.configs.errors import UserError
from kinoflow.data.latents import contents, kino, stored
from kinoflow.data.latents import shards as latents
from kinoflow.data.latents.index import LatentIndex
from kinoflow.data.latents.shards import LatentDataset, Shard
from kinoflow.data.prefetch import prefetch

NAMES = ("4x16x16@24000/1001 weight=0.7", "1x16x16@16")
INDEX = LatentIndex(
    buckets={NAMES[0]: 10, NAMES[1]: 3},
    shard_size=4,
    captions_per_clip=2,
    widths=(6, 3),
    made_from={"tae": "a"},
    latent_mean=(0.25, -1.0),
    latent_std=(0.5, 2.0),
)
NULL = [np.full((1, 6), 0.5), np.full((2, 3), -0.5)]


def content(bucket, clips):
    """Values that name their clip, ragged texts of one token more per caption."""
    rng = np.random.default_rng(len(bucket))
    frames = int(bucket[0])
    latent = np.stack([np.full((2, frames, 2, 2), clip + 0.25, np.float16) for clip in clips])
    texts = [
        [rng.random((1 + (clip + choice) % 5, width)) + clip for clip in clips for choice in range(2)]
        for width in INDEX.widths
    ]
    captions = [[f"{clip} “a”\u2028\x85", f"{clip} b"] for clip in clips]
    return Shard(latent=latent, texts=texts, captions=captions)


@pytest.fixture
def folder(tmp_path):
    latents.begin(tmp_path, INDEX, NULL)
    for bucket in INDEX.buckets:
        for shard in range(INDEX.num_shards(bucket)):
            latents.write_shard(tmp_path, bucket, shard, content(bucket, INDEX.shard_clips(bucket, shard)))
    return tmp_path


def test_round_trip(folder):
    data = LatentDataset(folder)
    assert data.buckets == NAMES and [data.num_clips(name) for name in NAMES] == [10, 3]
    batch = data.get(NAMES[0], np.array([9, 0, 5]), np.array([1, 0, 1]))
    assert batch.latent.shape == (3, 2, 4, 2, 2) and batch.latent.dtype == torch.float32
    assert batch.latent[:, 0, 0, 0, 0].tolist() == [18, 0, 10], "(value - 0.25) / 0.5"
    assert batch.latent[:, 1, 0, 0, 0].tolist() == [5.125, 0.625, 3.125], "(value + 1) / 2"
    for encoder, text in enumerate(batch.texts):
        assert text.mask.sum(dim=1).tolist() == [1 + 10 % 5, 1, 1 + 6 % 5]
        assert not text.hidden[~text.mask].any(), "padding is zero"
        want = content(NAMES[0], range(8, 10)).texts[encoder][3].astype(np.float16)
        assert np.array_equal(text.hidden[0][text.mask[0]].numpy(), want)
    assert data.captions(NAMES[0], 9) == ["9 “a”\u2028\x85", "9 b"]


def test_null_prompt_for_one_encoder_or_all(folder):
    data = LatentDataset(folder)
    some = data.get(NAMES[1], np.array([1, 1]), np.array([[0, -1], [-1, -1]])).texts
    assert some[0].hidden[1][some[0].mask[1]].tolist() == NULL[0].tolist()
    assert some[1].hidden[0][some[1].mask[0]].tolist() == NULL[1].tolist()
    assert some[0].hidden[0, 0, 0] >= 1
    for alone, read in zip(data.null(3), data.get(NAMES[0], np.arange(3), np.full(3, -1)).texts, strict=True):
        assert alone.hidden.equal(read.hidden) and alone.mask.equal(read.mask)


def test_missing_shard_and_index(folder):
    (folder / "1x16x16@16" / "00000").rename(folder / "away")
    with pytest.raises(UserError, match=r"1x16x16@16/00000 is missing: run the same precompute command"):
        LatentDataset(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        LatentDataset(folder)
    (folder / "index.json").unlink()
    with pytest.raises(UserError, match=r"index\.json is missing"):
        LatentDataset(folder)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts the open files of a process")
def test_many_shards_are_few_open_files(tmp_path):
    """A mapped file is an open one, and a process may have 1,024 where nobody raised that."""
    index = replace(INDEX, buckets={NAMES[1]: 400})
    latents.begin(tmp_path, index, NULL)
    for shard in range(100):
        latents.write_shard(tmp_path, NAMES[1], shard, content(NAMES[1], index.shard_clips(NAMES[1], shard)))
    data, before = LatentDataset(tmp_path), len(list(Path("/proc/self/fd").iterdir()))
    values = [data.get(NAMES[1], np.array([clip]), np.array([0])).latent.flatten()[0] for clip in range(400)]
    assert [float(value) for value in values] == [2 * clip for clip in range(400)]
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 256


def test_truncated_file_is_named(folder):
    path = folder / "1x16x16@16" / "00000" / "latent.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"00000/latent\.npy is unreadable"):
        LatentDataset(folder).get(NAMES[1], np.array([0]), np.array([0]))


def test_labels(tmp_path):
    """Beside latents, without texts; folders of texts have no word of them."""
    index = replace(INDEX, widths=(), captions_per_clip=1, classes=("cat", "dog"))
    latents.begin(tmp_path, index, [])
    for bucket in index.buckets:
        for shard in range(index.num_shards(bucket)):
            clips = index.shard_clips(bucket, shard)
            made = replace(content(bucket, clips), texts=[], labels=[clip % 2 for clip in clips])
            latents.write_shard(tmp_path, bucket, shard, made)
    data = LatentDataset(tmp_path)
    assert data.index == index
    batch = data.get(NAMES[0], np.array([9, 0, 5]), np.zeros(3, np.int64))
    assert batch.labels.tolist() == [1, 0, 1] and batch.labels.dtype == torch.int64 and batch.texts == ()
    assert contents.describe(tmp_path)["classes"] == ["cat", "dog"]
    with pytest.raises(UserError, match="classes was"):
        latents.begin(tmp_path, replace(index, classes=("dog", "cat")), [])


def test_folders_of_texts_are_as_before_there_were_labels(folder):
    assert "classes" not in json.loads((folder / "index.json").read_text())
    data = LatentDataset(folder)
    assert data.index.classes == () and data.get(NAMES[0], np.array([1]), np.array([0])).labels is None
    assert data.fingerprint == "3d82ed0a3b985797972fc75f39df54a23dbc086186716eee1649a0113dbc86a1"
    with pytest.raises(UserError, match="is unreadable"):
        data.label(NAMES[0], 0)


def test_begin_again(folder):
    latents.begin(folder, INDEX, NULL)
    other = LatentIndex(**{**vars(INDEX), "made_from": {"tae": "b"}})
    with pytest.raises(UserError, match=r"made_from was .* choose another out="):
        latents.begin(folder, other, NULL)
    other = LatentIndex(**{**vars(INDEX), "latent_std": (0.5, 3.0)})
    with pytest.raises(UserError, match=r"latent_std was \(0\.5, 2\.0\) and is \(0\.5, 3\.0\) now"):
        latents.begin(folder, other, NULL)


def test_normalized_latents_of_before_are_refused(folder):
    index = json.loads((folder / "index.json").read_text()) | {"format": 1}
    del index["latent_mean"], index["latent_std"]
    (folder / "index.json").write_text(json.dumps(index))
    for use in (LatentDataset, lambda _: latents.begin(folder, INDEX, NULL)):
        with pytest.raises(UserError, match=r"has format 1, this kinoflow reads 2; .* run precompute again"):
            use(folder)


@pytest.mark.parametrize("change", [{"latent_mean": ()}, {"latent_std": (1.0,)}, {"latent_std": (1.0, 0.0)}])
def test_an_autoencoder_without_statistics_is_refused(change):
    with pytest.raises(UserError, match=r"tae\.latent_mean: not measured"):
        LatentIndex(**{**vars(INDEX), **change})


def test_what_float16_cannot_hold_is_not_stored():
    assert stored(torch.tensor([65504.0, 1 / 3]), "tae").tolist() == [65504, np.float16(1 / 3)]
    for value in (65520.0, float("nan"), -float("inf")):
        with pytest.raises(UserError, match="release/tae: gives latents beyond float16"):
            stored(torch.tensor([0.0, value]), "release/tae")


def test_description(folder):
    (folder / "4x16x16@24000_1001" / "00001").rename(folder / "away")
    said = contents.describe(folder)
    assert (said["clips"], said["captions_per_clip"]) == (13, 2)
    assert said["buckets"] == INDEX.buckets and said["made_from"] == INDEX.made_from
    assert said["text_widths"] == {"text_0": 6, "text_1": 3}
    assert (said["shards"], said["shards_missing"]) == (4, 1)


def test_a_clip_as_a_latent_file(folder, tmp_path):
    contents.export(folder, tmp_path / "a.kino", 9)
    info = kino.read_info(tmp_path / "a.kino")
    assert (info.frames, info.height, info.width, info.fps) == (4, 16, 16, Fraction(24000, 1001))
    assert (info.source, info.tae_sha256) == ("9 “a”\u2028\x85", "a")
    assert info.metadata == {"caption_0": "9 “a”\u2028\x85", "caption_1": "9 b"}
    (latent,) = kino.read_latents(tmp_path / "a.kino", 0, 4, (4, 2, 2, 2))
    assert np.array_equal(latent, np.full((4, 2, 2, 2), 9.25))
    contents.export(folder, tmp_path / "b.kino", 2, "1x16x16@16")
    assert kino.read_info(tmp_path / "b.kino").frames == 1
    with pytest.raises(UserError, match=r"clip: 3 is not in .* from 0 to 2 of 1x16x16@16"):
        contents.export(folder, tmp_path / "c.kino", 3, "1x16x16@16")
    with pytest.raises(UserError, match=r"bucket: 2x8x8@1 is not in .* 4x16x16@24000/1001, 1x16x16@16"):
        contents.export(folder, tmp_path / "c.kino", 0, "2x8x8@1")


def test_failed_shard_leaves_nothing(tmp_path):
    latents.begin(tmp_path, INDEX, NULL)
    broken = Shard(latent=np.zeros((1, 2, 1, 2, 2), np.float16), texts=[[], []], captions=[["a", "b"]])
    with pytest.raises(ValueError, match="concatenate"):
        latents.write_shard(tmp_path, NAMES[1], 0, broken)
    assert list((tmp_path / "1x16x16@16").iterdir()) == []


def test_bucket_listed_twice():
    with pytest.raises(UserError, match="1x16x16@16 is listed twice"):
        LatentIndex(**{**vars(INDEX), "buckets": {"1x16x16@16": 1, "1x16x16@16 weight=2": 1}})


def test_index_is_plain_json(folder):
    assert json.loads((folder / "index.json").read_text())["buckets"] == dict(INDEX.buckets)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetch_keeps_order_and_raises_where_it_happened(workers):
    def make(step):
        if step == 5:
            raise OSError("bad clip")
        return step * step

    got = []
    with pytest.raises(OSError, match="bad clip"):
        got.extend(prefetch(make, range(9), workers))
    assert list(prefetch(make, range(4), workers)) == [0, 1, 4, 9]


def test_prefetch_stops_when_closed():
    made = []
    batches = prefetch(lambda step: made.append(step) or step, range(1000), workers=1)
    assert next(batches) == 0
    batches.close()
    assert len(made) < 10
