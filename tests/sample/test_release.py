import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from kinoflow.configs.errors import UserError
from kinoflow.data.clips.buckets import parse
from kinoflow.sample.card import ReleaseConfig
from kinoflow.sample.evaluation.judge import Judge
from kinoflow.sample.generate import generate
from kinoflow.sample.release import Release, write
from kinoflow.tae import TAE
from tests.standin import DEVICE, Accelerator


@pytest.fixture
def copy(tiny_release_folder, tmp_path):
    return Path(shutil.copytree(tiny_release_folder, tmp_path / "copy"))


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_written_release_loads_with_its_models(tiny_release_folder):
    release = Release.load(tiny_release_folder)
    assert release.name == "tiny"
    assert release.tae().config.latent_channels == release.backbone().config.latent_channels == 4
    assert not release.backbone().training
    assert Judge.from_pretrained(release.folder / "judge").config.frames == 16
    assert len(release.weights_hash) == 16


def test_the_hash_follows_the_weights_and_not_the_folder(copy, tiny_release_folder):
    assert Release.load(copy).weights_hash == Release.load(tiny_release_folder).weights_hash
    weights = copy / "dit" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert Release.load(copy).weights_hash != Release.load(tiny_release_folder).weights_hash


@pytest.mark.parametrize(
    "missing",
    [
        "kinoflow.yaml",
        "tae/config.json",
        "dit/model.safetensors",
        "text/byt5/config.json",
        "text/ul2/config.json",
    ],
)
def test_a_missing_file_is_named(copy, missing):
    (copy / missing).unlink()
    with pytest.raises(UserError) as error:
        Release.load(copy)
    assert f"{copy / missing}: missing" in one_line(error)


@pytest.mark.parametrize(("part", "damage"), [("tae", b""), ("dit", b"not weights"), ("judge", None)])
def test_damaged_weights_are_named(copy, part, damage):
    weights = copy / part / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    with pytest.raises(UserError) as error:
        reads = {"judge": Judge.from_pretrained, "tae": TAE.from_pretrained}
        reads[part](copy / part) if part in reads else Release.load(copy).backbone()
    assert str(weights) in one_line(error)


def test_a_model_config_with_another_width_does_not_load(copy):
    path = copy / "dit" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"width": 64}))
    with pytest.raises(UserError) as error:
        Release.load(copy).backbone()
    assert str(copy / "dit") in one_line(error)


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("name: x\nbuckets: [16x64]\n", "buckets"),
        ("name: x\nbuckets: []\n", "default_bucket"),
        ("name: x\ndefault_bucket: 8x64x64@16\n", "default_bucket"),
        ("name: x\nbukets: [16x64x64@16]\n", "bukets"),
        ("name: x\nsampling: {num_steps: 0}\n", "num_steps"),
        ("name: x\nsampling: {solver: dopri5}\n", "solver"),
        ("name: x\nwritten: '['\n", "written: '\\['"),
        (": : :", "kinoflow.yaml"),
    ],
)
def test_a_wrong_card_names_the_key(copy, card, said):
    (copy / "kinoflow.yaml").write_text(card)
    with pytest.raises(ValueError, match=said) as error:
        Release.load(copy)
    assert type(error.value) is UserError
    one_line(error)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (
            "dit",
            "an autoencoder only, for kinoflow tae encode CLIP CLIP.kino --weights {}/tae; to sample with",
        ),
        ("tae", "a backbone only; to sample with it, export its run into a copy of the release whose tae/"),
    ],
)
@pytest.mark.parametrize("card", [True, False])
def test_a_part_of_a_release_says_what_it_is_and_what_to_do(copy, part, said, card):
    shutil.rmtree(copy / part)
    if not card:
        (copy / "kinoflow.yaml").unlink()
    with pytest.raises(UserError) as error:
        Release.load(copy)
    assert one_line(error).startswith(f"{copy}: {said.format(copy)}")
    with pytest.raises(UserError, match=r"give the folder that holds judge/"):
        Release.load(copy / "judge")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError) as error:
        Release.load(tmp_path / "nowhere")
    assert "nowhere" in one_line(error)


def test_buckets_are_completed_from_the_default(tiny_release_folder):
    release = Release.load(tiny_release_folder)
    assert release.bucket() == parse("16x32x32@16")
    assert release.bucket(frames=1) == parse("1x32x32@16")
    assert release.bucket(width=48) == parse("40x32x48@24000/1001")
    assert release.bucket(fps=Fraction(24000, 1001)).frames == 40


@pytest.mark.parametrize(
    "wanted", [{"frames": 17}, {"frames": 16, "width": 48}, {"fps": Fraction(30)}, {"height": 64}]
)
def test_clips_that_it_cannot_make_list_those_that_it_can(tiny_release_folder, wanted):
    with pytest.raises(UserError) as error:
        Release.load(tiny_release_folder).bucket(**wanted)
    message = one_line(error)
    assert next(iter(wanted)) in message
    assert "--frames 16 --size 32x32 --fps 16" in message
    assert "--frames 40 --size 48x32 --fps 24000/1001" in message


def test_write_replaces_a_part_and_keeps_the_others(copy, tiny_release_folder):
    (copy / "tae" / "stale").write_text("")
    config = ReleaseConfig(name="new", buckets=("16x32x32@16",), default_bucket="16x32x32@16")
    release = write(copy, config=config, parts={"tae": tiny_release_folder / "tae", "dit": copy / "dit"})
    assert release.name == "new"
    assert not (copy / "tae" / "stale").exists()
    assert release.weights_hash == Release.load(tiny_release_folder).weights_hash
    with pytest.raises(UserError, match="vae"):
        write(copy, config=config, parts={"vae": copy})
    assert sorted(path.name for path in copy.iterdir()) == ["dit", "judge", "kinoflow.yaml", "tae", "text"]


def test_numbers_of_another_type(tiny_release, monkeypatch):
    """bf16 changes the clip by its rounding; what the transformer is told of time is exact."""
    times = []
    size = {"frames": 16, "height": 16, "width": 16, "fps": Fraction(16), "num_steps": 3}
    clips = []
    for dtype in (torch.float32, torch.bfloat16):
        dit = tiny_release.backbone(dtype=dtype)
        assert {p.dtype for p in dit.parameters()} == {dtype}
        dit.time.register_forward_pre_hook(lambda _, inputs: times.append(inputs[0].dtype))
        parts = dit, tiny_release.tae(), tiny_release.encoder()
        clips.append(generate(*parts, ["a red star"], seeds=[1], **size).float())
    assert set(times) == {torch.float32}
    assert 0 < (clips[0] - clips[1]).abs().mean() < 8


def test_every_part_goes_to_the_device(tiny_release):
    with Accelerator():
        parts = (
            tiny_release.backbone(DEVICE), tiny_release.tae(DEVICE), tiny_release.encoder(device=DEVICE)
        )  # fmt: skip
        clips = generate(
            *parts, ["a red star"], seeds=[1], frames=16, height=16, width=16, fps=Fraction(16), num_steps=2
        )
    assert clips.device.type == "cpu"
    assert clips.shape == (1, 16, 16, 16, 3)
