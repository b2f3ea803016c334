"""Latents and text states of world clips: what is on disk equals encoding one clip at a time."""

import copy
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kinoflow.conditioning.prompt_encoder
from kinoflow.conditioning.encoders import quiet
from kinoflow.configs.errors import UserError
from kinoflow.configs.pretrained import fingerprint
from kinoflow.configs.schema import load
from kinoflow.data import video
from kinoflow.data.clips import manifest
from kinoflow.data.clips.buckets import parse
from kinoflow.data.latents.shards import LatentDataset
from kinoflow.data.world import sample_scene
from kinoflow.train.tasks import precompute as module
from kinoflow.train.tasks.clips import describe, draw, to_tensor
from kinoflow.train.tasks.precompute import PrecomputeConfig, precompute
from tests.conditioning.writing import write_byt5, write_metaclip, write_ul2
from tests.train.tiny import tiny_encoders

ROOT = Path(__file__).parents[2]
WORLD = ["source=world", f"release={ROOT / 'sample' / 'mini'}"]


@pytest.fixture(scope="module")
def encoders():
    return tiny_encoders()


def config(folder, *more):
    buckets = "buckets=[8x16x16@16,1x16x16@24 weight=0.5]"
    sources = [
        "workers=0",
        buckets,
        "clips=9",
        "captions_per_clip=2",
        "shard_size=4",
        "batch_size=3",
        "seed=1",
    ]
    return load(PrecomputeConfig, [*WORLD, *sources, f"out={folder}", *more])


def test_shards_equal_single_encodings(encoders, tmp_path):
    precompute(config(tmp_path), encoders)
    data = LatentDataset(tmp_path)
    assert [data.num_clips(name) for name in data.buckets] == [6, 3]
    for i, name in enumerate(data.buckets):
        bucket = parse(name)
        for clip in range(data.num_clips(name)):
            scene = (1000 + i) * 10**9 + clip
            batch = data.get(name, np.array([clip]), np.array([1]))
            with torch.no_grad():
                mean = encoders.tae.encode(to_tensor([draw(scene, bucket)])).mean
            want = encoders.tae.normalize(mean)
            assert (batch.latent - want).abs().max() < 2e-3
            rounding = mean.abs().max() * 2**-11 / min(encoders.tae.config.latent_std)
            assert (batch.latent - want).abs().max() <= 1.01 * rounding + 1e-6, "that of float16, no more"
            kept = torch.from_numpy(np.array(data.stored(name, clip)))[None]
            assert (kept - mean).abs().max() <= 1.01 * mean.abs().max() * 2**-11, "as the encoder gave it"
            assert torch.equal(batch.latent, encoders.tae.normalize(kept.float()))
            caption = describe(sample_scene(scene), scene, bucket, 1)
            assert data.captions(name, clip)[1] == caption
            assert batch.texts[1].hidden[0, :, 0].tolist() == [ord(letter) for letter in caption]
            assert batch.texts[1].hidden[0, 0, 1] == float(bucket.fps)


def test_keyframes_are_the_ends_of_latent_frames_encoded_alone(encoders, tmp_path):
    precompute(config(tmp_path, "keyframes=true", "buckets=[12x16x16@16,1x16x16@24 weight=0.5]"), encoders)
    data = LatentDataset(tmp_path)
    moving, still = data.buckets
    assert data.index.keyframes and data.get(still, np.array([0]), np.array([0])).keyframes is None
    for clip in range(data.num_clips(moving)):
        frames = draw(1000 * 10**9 + clip, parse(moving))
        with torch.no_grad():
            means = encoders.tae.encode(to_tensor([frames[:1], frames[7:8], frames[-1:]])).mean
        want = encoders.tae.normalize(means)[:, :, 0]
        found = data.get(moving, np.array([clip]), np.array([1])).keyframes
        assert found is not None and torch.allclose(found[0], want, atol=2e-3)
        assert not torch.allclose(found[0, 0], found[0, 1], atol=2e-3), "the clip moves"


def test_an_upsampler_has_each_frame_alone_and_its_smaller_twin(encoders, tmp_path):
    """Against frames one by one: every twin is half as large, some as the autoencoder gives them."""
    precompute(config(tmp_path, "upsample=2", "buckets=[8x32x32@16]", "clips=6"), encoders)
    data = LatentDataset(tmp_path)
    (name,) = data.buckets
    reconstructed = 0
    for clip in range(6):
        frames = to_tensor([draw(1000 * 10**9 + clip, parse(name))])
        small = F.interpolate(frames[0].transpose(0, 1), (16, 16), mode="bilinear", antialias=True)
        with torch.no_grad():
            again = encoders.tae.decode(encoders.tae.encode(small.transpose(0, 1)[None]).mean, 8)
        passed = again[0].transpose(0, 1).clamp(-1, 1)
        batch = data.get(name, np.array([clip]), np.array([0]))
        assert batch.latent.shape == (1, 2, 8, 4, 4)
        found = [_alone(encoders.tae, frames)]
        for twin in (small, passed):
            byte = ((twin + 1) * 127.5).round() / 127.5 - 1
            large = F.interpolate(byte, (32, 32), mode="bilinear").transpose(0, 1)[None]
            found.append(_alone(encoders.tae, large))
        assert torch.allclose(batch.latent, found[0], atol=2e-3)
        near = [torch.allclose(batch.smaller, each, atol=2e-3) for each in found[1:]]
        assert any(near)
        reconstructed += near[1]
    assert 0 < reconstructed < 6


def _alone(tae, video):
    with torch.no_grad():
        return torch.cat([tae.normalize(tae.encode(frame).mean) for frame in video.split(1, dim=2)], dim=2)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (["upsample=1"], "upsample: 1 times is not larger"),
        (["upsample=2", "keyframes=true"], "leave keyframes out"),
        (["upsample=3"], "upsample: 3 does not divide the sides of 8x16x16@16"),
    ],
)
def test_twins_that_cannot_be(tmp_path, keys, line):
    with pytest.raises(UserError, match=line):
        config(tmp_path, *keys)


def test_a_folder_without_keyframes_is_described_as_before_there_were_any(encoders, tmp_path):
    precompute(config(tmp_path), encoders)
    assert "keyframes" not in (tmp_path / "index.json").read_text()
    with pytest.raises(UserError, match="keyframes was False and is True now"):
        precompute(config(tmp_path, "keyframes=true"), encoders)


def test_the_folder_says_which_autoencoder_made_it(encoders, tmp_path):
    precompute(config(tmp_path), encoders)
    index = LatentDataset(tmp_path).index
    assert index.made_from["tae"] == fingerprint(encoders.tae.state_dict())
    assert (index.latent_mean, index.latent_std) == ((0.1, 0.2), (2.0, 3.0))


def test_latents_beyond_float16_are_refused(encoders, tmp_path):
    tae = copy.deepcopy(encoders.tae)
    torch.nn.init.constant_(tae.encoder.conv_out.temporal.bias, 1e5)
    with pytest.raises(UserError, match=r"/tae: gives latents beyond float16"):
        precompute(config(tmp_path), replace(encoders, tae=tae))
    assert not any(path.name.isdigit() for path in tmp_path.rglob("*"))


def test_processes_share_the_work_and_resume(encoders, tmp_path, monkeypatch, capsys):
    precompute(config(tmp_path / "one"), encoders)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1", "0"):
        monkeypatch.setenv("RANK", rank)
        precompute(config(tmp_path / "two"), encoders)
    assert "0 of 3 shards to make" in capsys.readouterr().out
    files = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    ]
    assert files[0] == files[1] and len(files[0]) == 1 + 2 + 3 * 6


def test_command(encoders, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_encoders", lambda config: encoders)
    assert module.main([*WORLD, "clips=2", "buckets=[1x16x16@16]", f"out={tmp_path}"]) == 0
    with pytest.raises(UserError, match="out: name the folder"):
        module.main(["clips=2"])
    with pytest.raises(UserError, match="captions_per_clip"):
        module.main(["source=a.parquet", "captions_per_clip=2", f"out={tmp_path}"])


def test_real_clips_from_a_list(encoders, tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (12, 32, 48, 3), np.uint8)
    video.write(tmp_path / "a.mp4", frames, fps=Fraction(16))
    entry = manifest.ClipEntry(path="a.mp4", caption="noise")
    manifest.write(tmp_path / "clips.jsonl", [entry])
    settings = [
        f"source={tmp_path / 'clips.jsonl'}",
        "buckets=[8x16x16@16]",
        f"out={tmp_path / 'out'}",
        "workers=0",
    ]
    precompute(load(PrecomputeConfig, [*WORLD, *settings]), encoders)
    data = LatentDataset(tmp_path / "out")
    assert data.captions("8x16x16@16", 0) == ["noise"] and data.num_clips("8x16x16@16") == 1


def test_lists_go_one_after_the_other_into_one_folder(encoders, tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (12, 32, 48, 3), np.uint8)
    for name in "ab":
        (tmp_path / name).mkdir()
        video.write(tmp_path / name / "clip.mp4", frames, fps=Fraction(16))
        entry = manifest.ClipEntry(path="clip.mp4", caption=name)
        manifest.write(tmp_path / name / "clips.jsonl", [entry])
    a, b = (tmp_path / name / "clips.jsonl" for name in "ab")
    settings = ["buckets=[8x16x16@16]", f"out={tmp_path / 'out'}", "workers=0", WORLD[1]]
    precompute(load(PrecomputeConfig, [*settings, f"source=[{a},{b}]"]), encoders)
    data = LatentDataset(tmp_path / "out")
    assert [data.captions("8x16x16@16", i) for i in range(2)] == [["a"], ["b"]]
    with pytest.raises(UserError, match=r"^source: lists have no weights here; .* weigh the folders"):
        precompute(load(PrecomputeConfig, [*settings, f"source=['{a} weight=2',{b}]"]), encoders)


@pytest.fixture
def listed(tmp_path):
    """Five clips of noise in shards of two; what precomputing them again makes anew."""

    def noise(name, seed):
        frames = np.random.default_rng(seed).integers(0, 255, (12, 32, 48, 3), np.uint8)
        video.write(tmp_path / f"{name}.mp4", frames, fps=Fraction(16))

    def write(captions):
        size = {"frames": 12, "fps": Fraction(16), "width": 48, "height": 32}
        rows = [manifest.ClipEntry(path=f"{name}.mp4", caption=captions[name], **size) for name in captions]
        manifest.write(tmp_path / "clips.jsonl", rows)

    for seed, name in enumerate("abcde"):
        noise(name, seed)
    write(dict(zip("abcde", "vwxyz", strict=True)))
    return noise, write


def again(encoders, tmp_path):
    """Numbers of the shards that are other folders than before, after precomputing once more."""
    out = tmp_path / "out" / "8x16x16@16"
    before = {path.name: path.stat().st_ino for path in out.glob("*")}
    settings = [
        f"source={tmp_path / 'clips.jsonl'}",
        "buckets=[8x16x16@16]",
        f"out={tmp_path / 'out'}",
        "workers=0",
    ]
    precompute(load(PrecomputeConfig, [*WORLD, *settings, "shard_size=2"]), encoders)
    return sorted(int(path.name) for path in out.iterdir() if path.stat().st_ino != before.get(path.name))


def test_what_changed_in_a_list_is_made_again(encoders, listed, tmp_path, capsys):
    noise, write = listed
    assert again(encoders, tmp_path) == [0, 1, 2]
    name, clip, choice = "8x16x16@16", np.array([3]), np.zeros(1, np.int64)
    old = LatentDataset(tmp_path / "out").get(name, clip, choice)
    assert again(encoders, tmp_path) == []
    write({"a": "v", "b": "w", "c": "x", "d": "Q", "e": "z"})
    assert again(encoders, tmp_path) == [1]
    assert (
        "1 of 3 shards to make, 1 of them again: their clips or captions are not" in capsys.readouterr().out
    )
    new = LatentDataset(tmp_path / "out")
    assert new.captions(name, 3) == ["Q"]
    batch = new.get(name, clip, choice)
    assert batch.texts[0].hidden[0, :, 0].tolist() == [ord("Q")] != old.texts[0].hidden[0, :, 0].tolist()
    assert torch.equal(batch.latent, old.latent)
    noise("e", 99)
    assert again(encoders, tmp_path) == [2]
    noise("d", 77)
    assert again(encoders, tmp_path) == [1]
    assert not torch.equal(LatentDataset(tmp_path / "out").get(name, clip, choice).latent, old.latent)
    write({"a": "v", "b": "w", "d": "Q", "c": "x", "e": "z"})
    assert again(encoders, tmp_path) == [1], "another order"
    (tmp_path / "out" / "8x16x16@16" / "00000" / "stamps.txt").unlink()
    assert again(encoders, tmp_path) == [0], "who does not say what it was made of"
    assert again(encoders, tmp_path) == []
    write({"a": "v", "b": "w", "d": "Q"})
    with pytest.raises(UserError, match=r"buckets was .* delete the folder"):
        again(encoders, tmp_path)


def test_a_bad_clip_and_a_bad_row_change_nothing_that_is_made(encoders, listed, tmp_path, capsys):
    """Another clip takes the place of the bad one, and its shard is made again once it is repaired."""
    good = (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(b"no clip")
    with (tmp_path / "clips.jsonl").open("a") as file:
        file.write('{"path": 3}\n')
    assert again(encoders, tmp_path) == [0, 1, 2]
    said = capsys.readouterr().err
    assert "clips.jsonl: 1 of 6 rows are bad and left out; the first is row 6: path: 3 is not text" in said
    data = LatentDataset(tmp_path / "out")
    assert [data.captions("8x16x16@16", clip)[0] for clip in range(5)] == ["v", "x", "x", "y", "z"]
    assert again(encoders, tmp_path) == []
    (tmp_path / "b.mp4").write_bytes(good)
    assert again(encoders, tmp_path) == [], "it stands in quarantine"
    (tmp_path / "out" / "quarantine.jsonl").unlink()
    assert again(encoders, tmp_path) == [0]
    assert LatentDataset(tmp_path / "out").captions("8x16x16@16", 1) == ["w"]


def test_a_release_names_its_encoders_and_captions_are_kept(encoders, tmp_path, monkeypatch):
    """Precomputing again, for another autoencoder say, loads no text encoder and gives the same states."""
    release, settings = tmp_path / "release", ["clips=4", "buckets=[1x16x16@16]", "batch_size=2"]
    encoders.tae.save_pretrained(release / "tae")
    with quiet():
        write_ul2(release / "text" / "ul2")
        write_byt5(tmp_path / "elsewhere")
        write_metaclip(release / "text" / "metaclip")
    card = f"name: half\ntext: {{byt5: {tmp_path / 'elsewhere'}, dtype: bfloat16}}\n"
    (release / "kinoflow.yaml").write_text(card)
    settings += ["source=world", f"release={release}", f"text_cache={tmp_path / 'kept'}"]
    assert module.main([*settings, f"out={tmp_path / 'a'}"]) == 0

    def fail(*_):
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(kinoflow.conditioning.prompt_encoder, "_load", fail)
    assert module.main([*settings, f"out={tmp_path / 'b'}"]) == 0
    first, second = (LatentDataset(tmp_path / name) for name in "ab")
    assert first.index == second.index and first.index.widths == (24, 24, 16)
    choice = np.zeros(4, np.int64)
    batches = [data.get("1x16x16@16", np.arange(4), choice) for data in (first, second)]
    for one, other in zip(batches[0].texts, batches[1].texts, strict=True):
        assert torch.equal(one.hidden, other.hidden) and one.hidden.abs().sum() > 0
    (release / "kinoflow.yaml").write_text(card.replace("bfloat16", "float32"))
    with pytest.raises(UserError, match="made_from was"):  # other states than those of the folder
        monkeypatch.undo()
        module.main([*settings, f"out={tmp_path / 'b'}"])


def test_compile_reaches_the_code_that_encodes(encoders, monkeypatch):
    """The encoder streams when it is called plainly; compiling a method that nobody calls would go unseen."""
    calls = []

    def compiled(function, **_):
        return lambda video: (calls.append(len(video)), function(video))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    video = to_tensor([draw(3, parse("8x16x16@16"))])
    want = encoders.latent(video)
    assert not calls
    assert torch.equal(replace(encoders, compile=True).latent(video), want)
    assert calls == [1]
