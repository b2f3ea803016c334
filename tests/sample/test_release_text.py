"""Releases whose text encoders lie elsewhere, and sampling from text states that are kept."""

import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import kinoflow.conditioning.prompt_encoder
from kinoflow.conditioning.checkpoints import TextConfig
from kinoflow.conditioning.encoders import quiet
from kinoflow.conditioning.prompt_encoder import PromptEncoder
from kinoflow.configs.errors import UserError
from kinoflow.data.video import read
from kinoflow.sample.__main__ import main
from kinoflow.sample.card import text_config
from kinoflow.sample.release import Release
from tests.conditioning.writing import to_hub_cache, write_byt5

FPS = Fraction(16)
PROMPT = 'a red star, a sign says "KITE"'
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WRONG = {"clip": {"offload": ["clip"]}, "t5": {"t5": "google/ul2"}, "dtype": {"dtype": "int8"}}


@pytest.fixture
def folder(whole_release_folder):
    return whole_release_folder


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def name_encoders(release: Path, **text) -> None:
    card = (release / "kinoflow.yaml").read_text()
    kept = card[: card.index("text:")]
    (release / "kinoflow.yaml").write_text(kept + f"text: {json.dumps(text)}\n")


def states(release: Path):
    return Release.load(release).encoder()([PROMPT], FPS)


def same(first, second):
    return all(torch.equal(one.hidden, other.hidden) for one, other in zip(first, second, strict=True))


def test_encoders_may_lie_in_other_folders(folder, copy, tmp_path):
    shutil.move(copy / "text" / "ul2", tmp_path / "elsewhere")
    shutil.move(copy / "text" / "byt5", copy / "bytes")
    name_encoders(copy, ul2=str(tmp_path / "elsewhere"), byt5="bytes")
    assert same(states(copy), states(folder))
    assert text_config(copy) == TextConfig(ul2=str(tmp_path / "elsewhere"), byt5="bytes")
    first = Release.load(copy).weights_hash
    weights = tmp_path / "elsewhere" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert Release.load(copy).weights_hash != first


def test_encoders_may_be_hub_ids(folder, copy, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    ids = {"ul2": "google/ul2", "byt5": "google/byt5-large", "metaclip": "facebook/metaclip-h14-fullcc2.5b"}
    for name, repository in ids.items():
        to_hub_cache(folder / "text" / name, tmp_path / "hub", repository, COMMIT)
    shutil.rmtree(copy / "text")
    name_encoders(copy, **ids)
    assert same(states(copy), states(folder))
    assert len(Release.load(copy).weights_hash) == 16


def test_a_hub_out_of_reach_is_one_line_of_the_command(copy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    name_encoders(copy, ul2="google/ul2")
    with pytest.raises(UserError, match="google/ul2: the ul2 encoder is neither a folder here nor"):
        Release.load(copy).encoder()
    assert main([PROMPT, "--weights", str(copy), "--out", "x.mp4"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "google/ul2" in error and "give its folder" in error
    assert not Path("x.mp4").exists()


def test_encoders_of_other_widths_are_refused(copy):
    shutil.rmtree(copy / "text" / "byt5")
    with quiet():
        write_byt5(copy / "text" / "byt5", width=24)
    with pytest.raises(UserError, match=r"\(8, 24, 8\) wide, dit/ was trained on \(8, 6, 8\)") as caught:
        Release.load(copy).encoder()
    assert "\n" not in str(caught.value)


def test_the_card_chooses_dtype_and_names_what_it_does_not_know(copy):
    name_encoders(copy, dtype="bfloat16", offload=["ul2"])
    encoder = Release.load(copy).encoder()
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    assert {each.hidden.dtype for each in encoder([PROMPT], FPS)} == {torch.bfloat16}
    assert encoder.ul2.offload and not encoder.byt5.offload
    for wrong, said in (
        ({"offload": ["clip"]}, "clip"),
        ({"t5": "google/ul2"}, "t5"),
        ({"dtype": "int8"}, "dtype"),
    ):
        name_encoders(copy, **wrong)
        with pytest.raises(UserError, match=said) as caught:
            Release.load(copy)
        assert "\n" not in str(caught.value)


def test_kept_states_give_the_same_clip_and_load_no_encoder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [PROMPT, "--weights", str(folder), "--steps", "2"]
    assert main([*command, "--out", "plain.mp4"]) == 0
    assert main([*command, "--out", "first.mp4", "--text-cache", "kept"]) == 0
    assert {path.name.partition("-")[0] for path in Path("kept").iterdir()} == {"ul2", "byt5", "metaclip"}

    def fail(*_):
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(kinoflow.conditioning.prompt_encoder, "_load", fail)
    assert main([*command, "--out", "again.mp4", "--text-cache", "kept"]) == 0
    Path("list.txt").write_text(f"{PROMPT}\n{PROMPT}\n")  # other seeds of a prompt that is known
    assert main(["--prompts", "list.txt", *command[1:], "--text-cache", "kept", "--out", "list"]) == 0
    assert len(list(Path("list").glob("*.mp4"))) == 2
    plain = read("plain.mp4")
    assert (read("first.mp4") == plain).all() and (read("again.mp4") == plain).all()


def test_folders_that_are_no_release_yet_have_the_encoders_of_their_text_folder(folder, tmp_path):
    shutil.copytree(folder / "text", tmp_path / "text")
    assert text_config(tmp_path) == TextConfig()
    assert same(PromptEncoder.of_release(tmp_path, text_config(tmp_path))([PROMPT], FPS), states(folder))
