"""The three encoders: tiny checkpoints of the real classes written here, and the shipped ones."""

import json
import shutil
from copy import deepcopy
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from kinoflow.conditioning.embedding import TextEmbedding, TruncatedPromptWarning
from kinoflow.conditioning.encoders import quiet, stretch_positions
from kinoflow.conditioning.prompt_encoder import PromptEncoder
from kinoflow.configs.errors import UserError
from tests.conditioning.writing import write_encoders

FPS = Fraction(16)
SHIPPED = Path(__file__).parents[2] / "sample" / "mini" / "text"
PROMPTS = ["a red star", "", 'a blue ring spins quickly on a gray background, a sign says "KITE" and "MOON"']


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def encoder(folder):
    return PromptEncoder.from_pretrained(folder)


@pytest.fixture(scope="module")
def shipped():
    return PromptEncoder.from_pretrained(SHIPPED)


@pytest.fixture(params=["encoder", "shipped"])
def any_encoder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_states_are_those_of_the_hugging_face_model(encoder, folder):
    text = 'FPS-16 a red "STAR"'
    states = encoder(['a red "STAR"'], FPS)
    with quiet(), torch.no_grad():
        model = T5ForConditionalGeneration.from_pretrained(folder / "ul2")
        ids = T5Tokenizer.from_pretrained(folder / "ul2")(text, return_tensors="pt").input_ids
        torch.testing.assert_close(states[0].hidden, model.encoder(ids).last_hidden_state)
        tower = CLIPModel.from_pretrained(folder / "metaclip").text_model
        ids = CLIPTokenizer.from_pretrained(folder / "metaclip")(text, return_tensors="pt").input_ids
        assert ids.shape[1] < 20  # where the stretched positions are the checkpoint's own
        torch.testing.assert_close(states[2].hidden, tower(ids).last_hidden_state)
        model = T5EncoderModel.from_pretrained(folder / "byt5")
        letters = torch.tensor([[*(3 + byte for byte in b"STAR"), 1]])
        torch.testing.assert_close(states[1].hidden, model(letters).last_hidden_state)


def test_widths_order_and_dtypes(encoder):
    assert encoder.widths == (24, 24, 16)
    assert [states.hidden.shape[2] for states in encoder(PROMPTS, FPS)] == [24, 24, 16]
    assert all(not parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(PROMPTS, FPS)[0].hidden.requires_grad


def test_weights_and_states_follow_to(folder):
    encoder = PromptEncoder.from_pretrained(folder, dtype=torch.bfloat16)
    assert {states.hidden.dtype for states in encoder(PROMPTS, FPS)} == {torch.bfloat16}
    encoder.to("cpu", torch.float64)
    states = encoder(PROMPTS, FPS)
    assert {each.hidden.dtype for each in states} == {torch.float64}
    assert {each.mask.dtype for each in states} == {torch.bool}


def test_a_prompt_does_not_depend_on_its_batch(any_encoder):
    encoder = deepcopy(any_encoder)
    encoder.to("cpu", torch.float64)  # rounding is not what is asked, and in fp32 it differs by machine
    each_alone = [encoder([prompt], FPS) for prompt in PROMPTS]
    for states, *alone in zip(encoder(PROMPTS, FPS), *each_alone, strict=True):
        assert states.mask.sum(1).max() == states.mask.shape[1]  # no longer than the longest
        for row, one in enumerate(alone):
            length = int(states.mask[row].sum())
            assert one.mask.all() and one.mask.shape[1] == length
            assert states.mask[row, :length].all()
            torch.testing.assert_close(states.hidden[row, :length], one.hidden[0], atol=1e-6, rtol=1e-6)
            assert (states.hidden[row, length:] == 0).all()


def test_the_null_prompt_is_an_empty_one_at_any_rate(any_encoder):
    for null, empty in zip(any_encoder.null(), any_encoder(["  "], Fraction(24)), strict=True):
        torch.testing.assert_close(null.hidden, empty.hidden)
    assert [states.mask.shape for states in any_encoder.null()] == [(1, 1), (1, 1), (1, 2)]


def test_the_frame_rate_and_quotes_reach_the_encoders(any_encoder):
    first, second = any_encoder(["a red star"], FPS), any_encoder(["a red star"], Fraction(24))
    assert not torch.equal(first[0].hidden, second[0].hidden)
    assert torch.equal(first[1].hidden, second[1].hidden)  # nothing quoted: one end token
    assert first[1].mask.shape == (1, 1)
    kite, moon = (any_encoder([f'a sign "{word}"'], FPS)[1].hidden for word in ("KITE", "MOON"))
    assert kite.shape[1] == 5
    assert not torch.allclose(kite, moon, atol=0.1)


@pytest.mark.parametrize("prompt", ["a red star " * 1000, "🌟" * 3000, '"' + "X" * 3000 + '"'])
def test_long_prompts_are_cut_with_a_warning(any_encoder, prompt):
    message = r"reads at most \d+ tokens: the end of 1 of 2 prompts"
    with pytest.warns(TruncatedPromptWarning, match=message) as caught:
        states = any_encoder([prompt, "a"], FPS)
    assert all("\n" not in str(each.message) for each in caught)
    limits = [one.limit for one in (any_encoder.ul2, any_encoder.byt5, any_encoder.metaclip)]
    assert all(each.mask.shape[1] <= limit for each, limit in zip(states, limits, strict=True))
    assert all(each.hidden.isfinite().all() for each in states)


def test_limits_are_the_papers_or_the_checkpoints(encoder, shipped):
    assert [one.limit for one in (encoder.ul2, encoder.byt5, encoder.metaclip)] == [512, 100, 256]
    assert [one.limit for one in (shipped.ul2, shipped.byt5, shipped.metaclip)] == [128, 64, 64]


def test_prompts_as_long_as_the_limit_pass_in_silence(encoder):
    # Without merges a token a letter: start, f p s - 1 6, the prompt, end.
    prompt = "x" * 248
    assert encoder([prompt], FPS)[2].mask.shape == (1, 256)
    with pytest.warns(TruncatedPromptWarning, match="metaclip reads at most 256"):
        encoder([prompt + "x"], FPS)


def test_stretched_positions_keep_the_first_and_interpolate_the_rest():
    ramp = torch.arange(77, dtype=torch.float64)[:, None] * torch.tensor([1.0, -2.0])
    table = stretch_positions(ramp, 256)
    assert table.shape == (256, 2) and table.dtype == torch.float64
    assert torch.equal(table[:20], ramp[:20])
    expected = torch.cat([torch.arange(20.0), torch.linspace(20, 76, 236)]).double()
    torch.testing.assert_close(table[:, 0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(table[:, 1], -2 * expected, atol=2e-5, rtol=0)
    assert torch.equal(stretch_positions(ramp, 77), ramp)
    with pytest.raises(ValueError, match="length: 76"):
        stretch_positions(ramp, 76)


def test_a_tower_of_another_length_keeps_its_table(copy):
    with quiet():
        config = CLIPTextConfig.from_pretrained(copy / "metaclip")
        config.max_position_embeddings = 40
        CLIPTextModel(config).save_pretrained(copy / "metaclip")
    encoder = PromptEncoder.from_pretrained(copy)
    assert encoder.metaclip.limit == 40
    assert len(encoder.metaclip.model.embeddings.position_embedding.weight) == 40


def test_a_mapping_names_each_folder(folder, encoder):
    paths = {name: folder / name for name in ("metaclip", "byt5", "ul2")}
    again = PromptEncoder.from_pretrained(paths)
    for one, other in zip(again(PROMPTS, FPS), encoder(PROMPTS, FPS), strict=True):
        assert torch.equal(one.hidden, other.hidden)
    with pytest.raises(UserError, match="ul2, byt5, metaclip, not ul2"):
        PromptEncoder.from_pretrained({"ul2": folder / "ul2"})


def test_no_prompts_and_bad_rates_are_errors(encoder):
    with pytest.raises(ValueError, match=r"^prompts: at least one"):
        encoder([], FPS)
    with pytest.raises(UserError, match=r"^fps: 0"):
        encoder(["a"], Fraction(0))


def test_embeddings_check_their_shapes():
    check = TextEmbedding.__post_init__  # as it is: under pytest the annotations are checked before it
    with pytest.raises(ValueError, match=r"needs a mask of its first two sizes, got \(2, 4\)"):
        check(SimpleNamespace(hidden=torch.zeros(2, 3, 8), mask=torch.ones(2, 4, dtype=torch.bool)))
    with pytest.raises(ValueError, match="must be boolean"):
        check(SimpleNamespace(hidden=torch.zeros(2, 3, 8), mask=torch.ones(2, 3)))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _drop_a_weight(path):
    state = load_file(path)
    del state["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(state, path, metadata={"format": "pt"})


def _add_rows(path):
    state = load_file(path)
    key = "shared.weight"
    save_file({**state, key: torch.cat([state[key], state[key]])}, path, metadata={"format": "pt"})


def _set_type(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "bert"}))


@pytest.mark.parametrize(
    ("name", "file", "damage", "message"),
    [
        ("ul2", "", shutil.rmtree, "no such folder"),
        ("ul2", "model.safetensors", Path.unlink, "copy the folder again"),
        ("metaclip", "model.safetensors", _truncate, "copy the folder again"),
        ("ul2", "model.safetensors", _drop_a_weight, "the weights lack .*SelfAttention.q"),
        ("byt5", "model.safetensors", _add_rows, "copy the folder again"),
        ("byt5", "config.json", Path.unlink, "no config.json.*copy the folder again"),
        ("byt5", "config.json", lambda path: path.write_text("{"), "copy the folder again"),
        ("metaclip", "config.json", _set_type, "holds a 'bert' model, metaclip needs one of type 'clip'"),
        ("ul2", "tokenizer.json", Path.unlink, "tokenizer"),
        ("ul2", "tokenizer.json", lambda path: path.write_text("{}"), "copy the folder again"),
        ("metaclip", "tokenizer.json", Path.unlink, "tokenizer"),
        ("byt5", "tokenizer_config.json", Path.unlink, "tokenizer"),
    ],
)
def test_damage_gives_one_line_that_names_the_folder(copy, name, file, damage, message):
    damage(copy / name / file)
    with pytest.raises(UserError, match=message) as caught:
        PromptEncoder.from_pretrained(copy)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(copy / name))


def test_folders_of_two_encoders_changed_about_are_noticed(folder):
    swapped = {"ul2": folder / "byt5", "byt5": folder / "byt5", "metaclip": folder / "metaclip"}
    with pytest.raises(UserError, match="holds ByT5Tokenizer, not what ul2 needs"):
        PromptEncoder.from_pretrained(swapped)
    with pytest.raises(UserError, match="holds a 't5' model, metaclip needs"):
        PromptEncoder.from_pretrained({**swapped, "ul2": folder / "ul2", "metaclip": folder / "ul2"})


@pytest.mark.parametrize("source", ["/no/such/folder", "no such folder", "runs/a/b"])
def test_a_folder_that_is_not_there_is_never_looked_for_elsewhere(source):
    with pytest.raises(UserError, match=f"^{source}/?.*no such folder"):
        PromptEncoder.from_pretrained(source)


def test_the_shipped_encoders_are_small_and_offline(shipped):
    assert shipped.widths == (128, 96, 96)
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 2.2 * 2**20
    prompt = "A Red Star moves left slowly on a gray background with a sign that reads “KITE”"
    words = len(prompt.split())
    ul2, byt5, metaclip = shipped([prompt], FPS)
    assert ul2.mask.shape[1] <= words + 7  # the rate, two marks, four letters less one, the end
    assert byt5.mask.shape[1] == 5
    assert metaclip.mask.shape[1] <= words + 17
