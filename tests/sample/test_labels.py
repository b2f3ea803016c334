"""Releases of classes: no text encoders and, where they make pixels, no autoencoder."""

import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kinoflow.conditioning.labels import LabelEncoder, Labels
from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import dump, load
from kinoflow.dit_video import DiTConfig, UNet, UNetConfig, VideoDiT
from kinoflow.sample.__main__ import main
from kinoflow.sample.card import ReleaseConfig
from kinoflow.sample.generate import generate
from kinoflow.sample.guidance import stack
from kinoflow.sample.release import Release, write
from tests.sample.conftest import tiny_tae
from tests.shaken import shake
from tests.standin import DEVICE, Accelerator

CLASSES = ("cat", "dog", "7")
SIZE = {"frames": 1, "height": 8, "width": 8, "fps": Fraction(1), "num_steps": 3}


def shaken(model):
    torch.manual_seed(1)
    model.init_weights()
    return shake(model)


def tiny_unet(channels: int = 1) -> UNet:
    return shaken(UNet(UNetConfig(latent_channels=channels, channels=(8, 16), layers=1, width=16, classes=3)))


def card(**changes) -> ReleaseConfig:
    buckets = ("1x8x8@1", "1x16x16@1")
    return ReleaseConfig(**{"name": "classes", "buckets": buckets, "default_bucket": "1x8x8@1",
                            "classes": CLASSES, "pixels": 1} | changes)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A U-Net on grey pixels."""
    made, place = tmp_path_factory.mktemp("unet"), tmp_path_factory.mktemp("release")
    tiny_unet().save_pretrained(made)
    write(place, config=card(), parts={"unet": made})
    return place


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; gives code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*argv, weights=folder):
        code = main([*argv, "--weights", str(weights), "--steps", "2"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def parts(folder):
    release = Release.load(folder)
    return release.backbone(), release.decoder(), release.encoder()


def test_it_loads_without_text_and_autoencoder(folder):
    release = Release.load(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["kinoflow.yaml", "unet"]
    assert release.part == "unet" and len(release.weights_hash) == 16
    assert isinstance(release.encoder(), LabelEncoder) and release.vocabulary is None
    with pytest.raises(UserError, match="has no autoencoder, its latents are pixels"):
        release.tae()


def test_pictures_are_grey_where_there_is_one_channel_and_follow_from_label_and_seed(folder):
    clips = generate(*parts(folder), ["cat", "dog", "cat"], seeds=[5, 5, 5], **SIZE)
    assert clips.shape == (3, 1, 8, 8, 3) and clips.dtype == torch.uint8
    assert torch.equal(clips[..., 0], clips[..., 1]) and torch.equal(clips[..., 0], clips[..., 2])
    assert torch.equal(clips[0], clips[2]) and not torch.equal(clips[0], clips[1])
    by_number = generate(*parts(folder), ["1"], seeds=[5], **SIZE)
    assert torch.equal(by_number[0], clips[1])
    for changed in ({"guidance_scale": 1.0}, {"negative": "dog"}, {"seeds": [6]}):
        other = generate(*parts(folder), ["cat"], **{"seeds": [5], **SIZE, **changed})
        assert not torch.equal(other[0], clips[0]), changed


def test_guidance_is_between_the_class_and_none(folder):
    """Weight 0 is the model without a class, whatever the label says."""
    unconditional = generate(*parts(folder), ["cat", "7"], seeds=[5, 5], guidance_scale=0.0, **SIZE)
    assert torch.equal(unconditional[0], unconditional[1])


def test_labels_stack_as_texts_do():
    null, own = (Labels(index=torch.tensor(rows), classes=3) for rows in ([3], [0, 2]))
    assert stack(null, own).index.tolist() == [3, 3, 0, 2]
    with pytest.raises(TypeError, match="labels beside texts"):
        stack(null, ())


def test_colours_stay_colours(tmp_path):
    tiny_unet(3).save_pretrained(tmp_path / "unet")
    write(tmp_path, config=card(pixels=3), parts={})
    (clip,) = generate(*parts(tmp_path), ["cat"], seeds=[5], **SIZE)
    assert not torch.equal(clip[..., 0], clip[..., 1])


def test_a_transformer_of_labels_on_an_autoencoders_latents(tmp_path):
    config = DiTConfig(width=32, depth=1, heads=2, ffn=48, latent_channels=4, text_widths=(), classes=3)
    shaken(VideoDiT(config)).save_pretrained(tmp_path / "dit")
    tiny_tae().save_pretrained(tmp_path / "tae")
    buckets = {"buckets": ("16x32x32@16",), "default_bucket": "16x32x32@16"}
    release = write(tmp_path, config=card(pixels=0, **buckets), parts={})
    size = SIZE | {"frames": 16, "height": 32, "width": 32}
    clips = generate(
        release.backbone(), release.decoder(), release.encoder(), ["cat", "dog"], seeds=[1, 1], **size
    )
    assert clips.shape == (2, 16, 32, 32, 3) and not torch.equal(clips[0], clips[1])


def test_every_part_goes_to_the_device(folder):
    release = Release.load(folder)
    with Accelerator():
        made = release.backbone(DEVICE), release.decoder(DEVICE), release.encoder(device=DEVICE)
        clips = generate(*made, ["cat"], seeds=[1], **SIZE)
    assert clips.device.type == "cpu" and clips.shape == (1, 1, 8, 8, 3)


def test_a_label_becomes_a_png_that_says_how_it_was_made(run, folder):
    code, out, _ = run("--label", "1", "--seed", "3", "--guidance", "2.5")
    assert code == 0
    assert out.startswith("dog-3.png")
    with Image.open("dog-3.png") as picture:
        assert (picture.size, picture.mode) == ((8, 8), "RGB")
        made = picture.info
        pixels = np.asarray(picture)
    assert made["label"] == "dog" and "prompt" not in made and "text_dtype" not in made
    assert made["guidance"] == "2.5" and made["weights"] == Release.load(folder).weights_hash
    (clip,) = generate(*parts(folder), ["dog"], seeds=[3], guidance_scale=2.5, **SIZE | {"num_steps": 2})
    assert np.array_equal(pixels, clip[0].numpy())
    code, out, _ = run("--label", "7", "--size", "16", "--json")  # the class of this name, not a number
    (figures,) = json.loads(out)["clips"]
    assert (figures["path"], figures["label"], figures["clip"]) == ("7-0.png", "7", "1x16x16@1")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["a cat"], "prompt: classes reads none; give --label, one of cat, dog, 7"),
        (["--prompts", "list.txt"], "list.txt:1: label: 'a cat' is no class"),
        (["--prompts", "both.jsonl"], "both.jsonl:1: a label and a prompt; give one of the two"),
        (["--label", "cow"], "label: 'cow' is no class; name one of cat, dog, 7, or give its number, 0 to 2"),
        (["--label", "3"], "label: '3' is no class"),
        (["--label", "cat", "--negative", "cow"], "label: 'cow' is no class"),
        (["--label", "cat", "a cat"], "give a PROMPT, --label CLASS or --prompts FILE, one of the three"),
        (["--label", "cat", "--text-cache", "x"], "text-cache: classes reads no text; leave it out"),
        (["--label", "cat", "--size", "64"], "it makes --frames 1 --size 8x8"),
    ],
)
def test_mistakes_are_one_line(run, argv, said):
    Path("list.txt").write_text("a cat\n")
    Path("both.jsonl").write_text('{"label": "cat", "prompt": "dog"}\n')
    code, out, err = run(*argv)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert said in err


def test_a_list_of_labels_gives_what_each_gives_alone(run):
    Path("list.csv").write_text("label,seed\ncat,5\n1,6\n")
    Path("list.txt").write_text("7\n")
    made = []
    for name in ("list.csv", "list.txt"):
        code, out, err = run("--prompts", name, "--out", "out", "--json")
        assert code == 0, err
        made += json.loads(out)["clips"]
    assert [clip["label"] for clip in made] == ["cat", "dog", "7"]
    assert [clip["seed"] for clip in made[:2]] == [5, 6]
    assert run("--label", "dog", "--seed", "6", "--out", "alone.png")[0] == 0
    with Image.open(made[1]["path"]) as listed, Image.open("alone.png") as alone:
        assert listed.tobytes() == alone.tobytes()


def test_a_release_of_prompts_has_no_labels(run, tiny_release):
    code, _, err = run("--label", "7", weights=tiny_release.folder)
    assert (code, err) == (
        2, "kinoflow sample: label: tiny reads prompts and has no classes; give a PROMPT instead\n"
    )  # fmt: skip
    Path("list.csv").write_text("label\ncat\n")
    code, _, err = run("--prompts", "list.csv", weights=tiny_release.folder)
    assert code == 2 and "list.csv:2: label: the release reads prompts and has no classes" in err


def test_the_worlds_evaluation_wants_prompts(folder, capsys):
    assert main(["evaluate", "--release", str(folder)]) == 2
    assert "makes classes, and the world's scenes are asked for in prompts" in capsys.readouterr().err


def test_wrong_cards_and_folders_are_one_line(copy):
    path = copy / "kinoflow.yaml"
    for changes, said in (
        ({"classes": ("a", "b")}, r"classes: names 2, and unet/ was trained on 3"),
        ({"classes": ()}, r"text/ul2/config.json: missing"),
        ({"pixels": 0}, r"a backbone only; to sample with it"),
    ):
        dump(card(**changes), path)
        with pytest.raises(UserError, match=said):
            Release.load(copy).encoder()
    dump(card(), path)
    for line in ("pixels: 2", "classes: [a, b, a]"):
        path.write_text(f"name: x\n{line}\n")
        with pytest.raises(UserError, match=line.split(":")[0]):
            load(ReleaseConfig, [str(path)])
    dump(card(), path)
    shutil.copytree(copy / "unet", copy / "dit")
    with pytest.raises(UserError, match="has dit/ and unet/, and a release has one backbone"):
        Release.load(copy)
