"""The mean of transformers as a release."""

import shutil

import pytest
import torch

from kinoflow.configs.pretrained import Weights
from kinoflow.configs.schema import load
from kinoflow.dit_video import VideoDiT
from kinoflow.sample.release import Release
from kinoflow.train.__main__ import main
from kinoflow.train.run.config import RunConfig
from tests.train.tiny import BUCKET, DIT, write_release


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """Three releases that differ in their transformers alone."""
    root = tmp_path_factory.mktemp("releases")
    first = write_release(root / "0")
    (first / "kinoflow.yaml").write_text(f"name: first\nbuckets: [{BUCKET}]\ndefault_bucket: {BUCKET}\n")
    for i in range(3):
        if i:
            shutil.copytree(first, root / str(i), ignore=lambda *_: ["dit"])
        write_dit(root / str(i), seed=i)
    return [root / str(i) for i in range(3)]


def write_dit(release, seed, *words):
    model = VideoDiT(load(RunConfig, [*DIT, *words]).dit)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    model.save_pretrained(release / "dit", dtype=torch.float16)


def test_adapters_stay_with_the_backbone_that_they_are_for(releases, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(releases[0], own)
    (own / "adapters" / "four").mkdir(parents=True)
    (own / "adapters" / "four" / "sampling.yaml").write_text("num_steps: 4\n")
    assert main(["average", str(tmp_path / "mean"), str(own), str(releases[1])]) == 0
    assert not (tmp_path / "mean" / "adapters").exists()
    assert main(["average", str(tmp_path / "small"), str(own), "--int8"]) == 0
    assert (tmp_path / "small" / "adapters" / "four" / "sampling.yaml").is_file()


def test_what_the_release_around_it_has_is_not_copied_and_comes_along_elsewhere(releases, tmp_path):
    """As an upsampler is shipped, in 8 bits: its backbone alone."""
    around = shutil.copytree(releases[0], tmp_path / "around")
    inside = around / "upsampler"
    assert main(["average", str(inside), str(releases[1]), "--int8"]) == 0
    assert sorted(path.name for path in inside.iterdir()) == ["dit", "kinoflow.yaml"]
    assert Release.load(inside).place("tae") == around / "tae"
    assert main(["average", str(tmp_path / "out"), str(inside), str(releases[2])]) == 0
    assert {"tae", "text"} <= {path.name for path in (tmp_path / "out").iterdir()}
    (around / "tae" / "more.txt").write_text("another autoencoder")
    assert main(["average", str(around / "other"), str(releases[1]), "--int8"]) == 0
    assert (around / "other" / "tae").is_dir()


def test_every_weight_is_the_mean(releases, tmp_path, capsys):
    assert main(["average", str(tmp_path / "out"), *map(str, releases)]) == 0
    assert "the mean of 3 backbones" in capsys.readouterr().out
    found = Weights(tmp_path / "out" / "dit")
    each = [Weights(release / "dit") for release in releases]
    assert set(found) == set(each[0])
    for name, value in found.items():
        mean = torch.stack([weights[name].double() for weights in each]).mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=2**-10, atol=1e-6)
        assert value.dtype == torch.float16
    release = Release.load(tmp_path / "out")
    assert (release.name, release.config.version) == ("out", "1")
    assert release.config.trained_from == "the mean of first 1, first 1, first 1"
    for part in ("tae/model.safetensors", "tae/config.json", "text/ul2/config.json"):
        assert (tmp_path / "out" / part).read_bytes() == (releases[0] / part).read_bytes()


def test_one_in_bytes_makes_nearly_the_same(releases, tmp_path, capsys):
    large = tmp_path / "large"
    shutil.copytree(releases[0], large)
    write_dit(large, 7, "dit.width=64", "dit.ffn=96")
    assert main(["average", str(tmp_path / "out"), str(large), "--int8"]) == 0
    assert "out: first, in 8 bits" in capsys.readouterr().out
    release = Release.load(tmp_path / "out")
    assert release.config.trained_from == "first 1"
    one, other = (Weights(folder / "dit") for folder in (large, tmp_path / "out"))
    assert set(one) == set(other)
    errors = {name: ((one[name].float() - other[name]).norm() / one[name].float().norm()) for name in one}
    assert max(errors.values()) < 0.01 and errors["blocks.0.attention.qkv.weight"] > 1e-4
    sizes = [(folder / "dit" / "model.safetensors").stat().st_size for folder in (large, tmp_path / "out")]
    assert sizes[1] < 0.6 * sizes[0]
    assert main(["average", str(tmp_path / "other"), str(large)]) == 2


def test_what_only_one_reads_with_is_kept(releases, tmp_path, capsys):
    """A backbone that learned to read what is known, and the one that it went on from."""
    reading = tmp_path / "reading"
    shutil.copytree(releases[0], reading)
    write_dit(reading, 5, "dit.known=true")
    assert main(["average", str(tmp_path / "out"), str(reading), str(releases[1])]) == 0
    found, one, two = (Weights(folder / "dit") for folder in (tmp_path / "out", reading, releases[1]))
    assert (
        torch.equal(found["known.weight"], one["known.weight"]) and Release.load(tmp_path / "out").reads_known
    )
    torch.testing.assert_close(
        found["embed.weight"].float(),
        (one["embed.weight"] / 2 + two["embed.weight"] / 2).float(),
        rtol=2**-9,
        atol=1e-3,
    )
    assert main(["average", str(tmp_path / "other"), str(releases[1]), str(reading)]) == 2
    assert "is another model than" in capsys.readouterr().err


def test_what_has_no_mean_is_refused(releases, tmp_path, capsys):
    for other in ("shape", "tae"):
        shutil.copytree(releases[0], tmp_path / other)
    write_dit(tmp_path / "shape", 0, "dit.width=64")
    weights = tmp_path / "tae" / "tae" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for words, said in (
        ([tmp_path / "out", releases[0], tmp_path / "shape"], "another model"),
        ([tmp_path / "out", releases[0], tmp_path / "tae"], "another autoencoder"),
        ([releases[0], releases[0], releases[1]], "one of those to average"),
        ([tmp_path / "out", releases[0]], "name the release to write"),
    ):
        assert main(["average", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
