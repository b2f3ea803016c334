"""Sets mixed by weight: who has how many of the draws, one set as without any, folders and lists as one."""

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kinoflow.configs.errors import UserError
from kinoflow.data.clips import manifest
from kinoflow.data.clips.buckets import parse as bucket_of
from kinoflow.data.clips.manifest import ClipEntry
from kinoflow.data.clips.order import Sampler
from kinoflow.data.clips.sets import ClipSets, locate, parse
from kinoflow.data.latents import shards
from kinoflow.data.latents.index import LatentIndex
from kinoflow.data.latents.sets import LatentSets
from kinoflow.data.latents.shards import LatentDataset, Shard

BUCKET = bucket_of("1x16x16@16")


def sampler(lengths, weights=None, seed=7):
    count = len(lengths)
    return Sampler(lengths, weights=[1.0] * count, batch_sizes=[8] * count, seed=seed, set_weights=weights)


def drawn(order, steps, bucket=0):
    draws = [draw for draw in map(order.draw, range(steps)) if draw.bucket == bucket]
    return (np.concatenate([getattr(draw, key) for draw in draws]) for key in ("indices", "epochs"))


def test_one_set_is_drawn_as_before_there_were_sets():
    """The numbers are of the version before: what runs have learned from must not move."""
    order = Sampler(
        [[101], [1000], [7]], weights=[0.3, 0.6, 0.1], batch_sizes=[4, 8, 12], seed=5, set_weights=[3.0]
    )
    draw = order.draw(12345)
    assert (draw.bucket, draw.indices.tolist()) == (1, [570, 104, 507, 197, 81, 934, 444, 183])
    for weights in (None, [2.0, 1.0]):
        beside = Sampler(
            [[101, 0], [0, 1000], [7, 0]], weights=[0.3, 0.6, 0.1], batch_sizes=[4, 8, 12], seed=5,
            set_weights=weights,
        )  # fmt: skip
        assert beside.draw(12345).indices.tolist() == draw.indices.tolist(), "the only one with the bucket"


def test_without_weights_all_clips_are_one_heap():
    heap, sets = sampler([[60]]), sampler([[10, 0, 50]])
    for ours, theirs in zip(drawn(sets, 40), drawn(heap, 40), strict=True):
        assert np.array_equal(ours, theirs)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.05, 20), min_size=4, max_size=4),
    seed=st.integers(0, 2**40),
)
def test_a_set_has_its_share_and_no_clip_comes_twice_in_its_epoch(lengths, weights, seed):
    weights, steps = weights[: len(lengths)], 24
    indices, epochs = drawn(sampler([lengths], weights, seed), steps)
    first = np.cumsum([0, *lengths])
    shares = np.array(weights) / sum(weights)
    for number, length in enumerate(lengths):
        own = (indices >= first[number]) & (indices < first[number + 1])
        # 192 draws are three blocks: each has its share within one.
        assert abs(own.sum() - shares[number] * 8 * steps) <= 3 + 1e-6
        taken = list(zip(epochs[own].tolist(), indices[own].tolist(), strict=True))
        assert len(set(taken)) == len(taken)
        whole = epochs[own] < own.sum() // length
        assert sorted(indices[own][whole]) == sorted(
            [*range(*first[number : number + 2])] * (own.sum() // length)
        )


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_mixed_batch_of_one_process(world_size):
    order = sampler([[30, 5], [8, 9]], [3.0, 1.0])
    for step in (0, 7, 64, 12345):
        parts = [sampler([[30, 5], [8, 9]], [3.0, 1.0]).draw(step, r, world_size) for r in range(world_size)]
        whole = order.draw(step)
        assert np.concatenate([part.indices for part in parts]).tolist() == whole.indices.tolist()
        assert np.concatenate([part.epochs for part in parts]).tolist() == whole.epochs.tolist()


def test_places_and_weights():
    assert parse(["a folder"], "data.latents").weights is None
    sets = parse(["a folder weight=2.5", "b"], "data.latents")
    assert sets.places == ("a folder", "b") and sets.weights == (2.5, 1.0)
    for texts, line in (
        ([], "is empty"),
        (["a", "a weight=2"], "a is named twice"),
        (["a weight=x"], "weight=x is no number above 0"),
        (["a weight=0"], "weight=0 is no number above 0"),
        (["a weight=inf"], "weight=inf is no number above 0"),
    ):
        with pytest.raises(UserError, match=f"^data.latents: {line}"):
            parse(texts, "data.latents")


def test_locate():
    assert [locate(i, [2, 0, 3]) for i in range(5)] == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
    with pytest.raises(IndexError):
        locate(5, [2, 0, 3])


INDEX = LatentIndex(
    buckets={"1x16x16@16 weight=3": 5, "2x16x16@16": 2}, shard_size=2, captions_per_clip=2, widths=(3,),
    made_from={"tae": "t", "text": "e"}, latent_mean=(1.0,), latent_std=(2.0,),
)  # fmt: skip


def write(folder, index, value):
    """A folder whose clip i has the latent value + i and captions that say so; texts hold caption numbers."""
    shards.begin(folder, index, [np.full((1, 3), -1.0)])
    for bucket in index.buckets:
        for number in range(index.num_shards(bucket)):
            clips, each = index.shard_clips(bucket, number), range(index.captions_per_clip)
            latent = np.stack([np.full((1, 1, 2, 2), value + clip, np.float16) for clip in clips])
            texts = [[np.full((1 + choice, 3), float(choice)) for _ in clips for choice in each]]
            captions = [[f"{value + clip} {choice}" for choice in each] for clip in clips]
            shards.write_shard(folder, bucket, number, Shard(latent=latent, texts=texts, captions=captions))
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    other = replace(INDEX, buckets={"4x16x16@16": 1, "1x16x16@16": 3}, captions_per_clip=3)
    return write(tmp_path / "a", INDEX, 100), write(tmp_path / "b", other, 200)


def test_folders_are_counted_one_after_the_other(folders):
    data = LatentSets([f"{folders[0]} weight=3", folders[1]])
    assert data.buckets == ("1x16x16@16 weight=3", "2x16x16@16", "4x16x16@16") and data.weights == (3, 1)
    assert [data.lengths(name) for name in data.buckets] == [[5, 3], [2, 0], [0, 1]]
    assert data.num_clips(data.buckets[0]) == 8 and data.index.captions_per_clip == 6
    batch = data.get(data.buckets[0], np.array([4, 5, 7]), np.array([[5], [5], [-1]]))
    assert (batch.latent[:, 0, 0, 0, 0] * 2 + 1).tolist() == [104, 200, 202]
    assert [hidden[mask][0, 0].item() for hidden, mask in zip(batch.texts[0].hidden, batch.texts[0].mask,
            strict=True)] == [1, 2, -1]  # fmt: skip
    assert data.captions(data.buckets[0], 6) == ["201 0", "201 1", "201 2"]
    assert data.place(data.buckets[0], 6) == f"{folders[1]}/1x16x16@16/00000 clip 1"
    assert data.place(data.buckets[2], 0) == f"{folders[1]}/4x16x16@16/00000 clip 0"


def test_one_folder_alone_is_what_it_is(folders):
    data, alone = LatentSets([folders[0]]), LatentDataset(folders[0])
    assert (data.index, data.fingerprint, data.buckets) == (alone.index, alone.fingerprint, alone.buckets)
    where = alone.buckets[0], np.array([1, 4]), np.array([1, -1])
    assert data.get(*where).latent.equal(alone.get(*where).latent)
    assert data.get(*where).texts[0].hidden.equal(alone.get(*where).texts[0].hidden)


def test_the_fingerprint_is_of_all_folders_and_weights(folders, tmp_path):
    a, b = folders
    names = {LatentSets(texts).fingerprint for texts in ([a], [b], [a, b], [b, a], [f"{a} weight=2", b])}
    assert len(names) == 5
    (tmp_path / "a").rename(tmp_path / "moved")
    assert LatentSets([str(tmp_path / "moved"), b]).fingerprint in names
    assert LatentSets([str(tmp_path / "moved"), b]).holds(LatentDataset(b))
    assert not LatentSets([b]).holds(LatentDataset(tmp_path / "moved"))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"made_from": {"tae": "u", "text": "e"}}, "another autoencoder"),
        ({"made_from": {"tae": "t", "text": "f"}}, "other text encoders"),
        ({"latent_std": (3.0,)}, "other latent statistics"),
    ],
)
def test_folders_of_other_encoders_are_refused(folders, tmp_path, change, line):
    other = write(tmp_path / "c", replace(INDEX, **change), 300)
    with pytest.raises(UserError, match=rf"^data.latents: .*/c was made with {line} than .*/a; precompute"):
        LatentSets([folders[0], other])


def test_a_folder_that_is_not_there_is_named(folders, tmp_path):
    with pytest.raises(UserError, match=r"^.*/away/index.json is missing: write it with"):
        LatentSets([folders[0], f"{tmp_path / 'away'} weight=2"])


def test_latents_of_single_frames_are_left_out_where_a_folder_has_none(folders, tmp_path):
    index, keyframes = replace(INDEX, keyframes=True), np.zeros((1, 2, 1, 2, 2), np.float16)
    shards.begin(tmp_path / "d", index, [np.full((1, 3), -1.0)])
    latent, texts = np.full((1, 1, 2, 2, 2), 300, np.float16), [[np.zeros((1, 3))] * 2]
    for bucket in index.buckets:
        for number in range(index.num_shards(bucket)):
            count = len(index.shard_clips(bucket, number))
            content = Shard(latent=latent.repeat(count, 0), texts=[texts[0] * count],
                            captions=[["a", "b"]] * count, keyframes=keyframes.repeat(count, 0))  # fmt: skip
            shards.write_shard(tmp_path / "d", bucket, number, content)
    where = "2x16x16@16", np.array([0, 1]), np.array([0, 0])
    alone, mixed = LatentSets([str(tmp_path / "d")]), LatentSets([str(tmp_path / "d"), folders[0]])
    assert alone.index.keyframes and alone.get(*where).keyframes is not None
    assert not mixed.index.keyframes and mixed.get(*where).keyframes is None


def test_latents_are_local():
    with pytest.raises(UserError, match=r"^data.latents: s3://bucket/a is a URL.*copy it to a disk"):
        LatentSets(["s3://bucket/a weight=2"])


@pytest.fixture
def lists(tmp_path):
    """Two lists whose clips have the same names: grays from 10 and from 100 on."""
    known = {"frames": 1, "fps": Fraction(16), "width": 16, "height": 16}
    for name, first, count in (("a", 10, 3), ("b", 100, 5)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (16, 16), (first + i,) * 3).save(tmp_path / name / f"{i}.png")
        entries = [ClipEntry(path=f"{i}.png", caption=f"{name}{i}", **known) for i in range(count)]
        manifest.write(tmp_path / name / "clips.jsonl", entries)
    return [str(tmp_path / name / "clips.jsonl") for name in "ab"]


def clips(texts, folder):
    return ClipSets(texts, "data.manifest", [BUCKET], seed=0, quarantine=folder / "quarantine.jsonl")


def test_lists_are_counted_one_after_the_other(lists, tmp_path):
    both = clips([f"{lists[0]} weight=3", lists[1]], tmp_path)
    assert both.lengths(BUCKET) == [3, 5] and both.count(BUCKET) == 8 and both.weights == (3, 1)
    assert [both.get(i, BUCKET).caption for i in range(9)] == ["a0", "a1", "a2", *(f"b{i}" for i in range(5)),
                                                               "a0"]  # fmt: skip
    alone = clips([lists[0]], tmp_path)
    assert alone.stamp(5, BUCKET) == both.stamp(10, BUCKET), "the same clip of the second round"
    assert alone.fingerprint == manifest.read(lists[0]).fingerprint
    assert len({alone.fingerprint, both.fingerprint, clips(lists, tmp_path).fingerprint}) == 3


def test_a_bad_clip_of_one_list_is_none_of_another(lists, tmp_path):
    (tmp_path / "b" / "1.png").write_bytes(b"no picture")
    for _ in range(2):  # found, and known
        both = clips(lists, tmp_path)
        assert [both.get(i, BUCKET).caption for i in (1, 4)] == ["a1", "b2"]
    (line,) = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert (line["list"], line["path"]) == (lists[1], "1.png")
