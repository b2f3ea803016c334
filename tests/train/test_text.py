"""The small text encoders: their tokenizers, their corruptions, their training at a tiny size."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.conditioning.prompt_encoder import PromptEncoder
from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import load
from kinoflow.data.world import WORDS, is_heldout, labels
from kinoflow.train.mini import text
from kinoflow.train.mini.config import EncoderConfig, TextTrainConfig
from kinoflow.train.mini.corpus import ATTRIBUTES, attributes, corrupt, describe, quoted, sample, spell
from kinoflow.train.mini.probe import AttributeHeads, accuracy, last_state, mean_state
from kinoflow.train.mini.tokenizers import byte_pair_tokenizer, word_tokenizer
from kinoflow.train.run.config import RunConfig

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "sample" / "mini" / "text"
SENTINELS = list(range(900, 916))
END = 1

TINY = EncoderConfig(width=16, layers=1, heads=2, feed_forward=16, max_tokens=128, steps=3, batch_size=4)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(text, "_CORPUS", 300)
    return TextTrainConfig(ul2=TINY, byt5=TINY, metaclip=TINY, clips=8, merges=300, probes=30)


def _restore(inputs, targets):
    """What a reader of T5's format makes of it: each sentinel of the inputs replaced by its span."""
    spans, current = {}, None
    for token in targets[:-1]:
        if token in SENTINELS:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [each for token in inputs for each in spans.get(token, [token])]


@pytest.mark.parametrize("length", [2, 3, 5, 12, 40])
def test_a_corruption_loses_nothing(length):
    ids = [*range(10, 10 + length), END]
    shares = Counter()
    for seed in range(200):
        made = corrupt(ids, SENTINELS, Random(seed))
        assert made.inputs[-1] == made.targets[-1] == END
        assert _restore(made.inputs, made.targets) == ids
        hidden = sum(token not in SENTINELS for token in made.targets) - 1
        assert 0 < hidden < length or length == 1
        shares["short" if hidden <= max(1, round(0.15 * length)) else "long"] += 1
    assert min(shares.values()) > 20 or length < 5


@pytest.mark.parametrize("ids", [[END], [10, END]])
def test_what_is_too_short_to_corrupt_is_copied(ids):
    made = corrupt(ids, SENTINELS, Random(0))
    assert made.inputs == made.targets == ids


def test_spelling_names_each_place_once():
    made = spell([10, 11, 12, END], [501, 502, 503, 504], Random(3))
    assert made.inputs == [10, 11, 12, END]
    pairs = list(zip(made.targets[:-1:2], made.targets[1::2], strict=True))
    assert sorted(pairs) == [(501, 10), (502, 11), (503, 12)]
    assert pairs != sorted(pairs)


def test_samples_follow_from_their_seed_and_keep_the_split():
    assert sample(7).prompt == sample(7).prompt
    assert sample(7).scene == sample(7, wording=1).scene
    assert len({sample(7, wording=i).prompt for i in range(20)}) > 5
    for split in ("train", "heldout"):
        for seed in range(100):
            known = labels(sample(seed, split=split).scene)
            assert is_heldout(known["color"], known["shape"], known["motion"]) == (split == "heldout")


def test_descriptions_and_attributes_say_the_whole_scene():
    seen = {}
    for seed in range(1000):
        scene = sample(seed).scene
        values = [options[index] for options, index in zip(ATTRIBUTES, attributes(scene), strict=True)]
        assert values[:3] == [labels(scene)[key] for key in ("color", "shape", "motion")]
        assert all(value in describe(scene, "") for value in values if value)
        seen.setdefault(describe(scene, ""), tuple(values))
        assert seen[describe(scene, "")] == tuple(values)


def test_written_words_are_known_and_unknown():
    words = [quoted(seed) for seed in range(2000)]
    assert "" in words
    assert any(" " in word for word in words)
    known = sum(word in WORDS for word in words)
    assert 300 < known < 1000


def test_word_tokenizer_has_a_token_a_word_and_letters_for_the_rest():
    prompts = ['a red star moves left with a sign that says "KITE"', "FPS-16 a blue ring spins."] * 3
    tokenizer = word_tokenizer(prompts, 32)
    assert tokenizer.tokenize("a Red star") == ["▁a", "▁red", "▁star"]
    assert tokenizer.tokenize("FPS-24 a ring.") == ["▁fps-24", "▁a", "▁ring", "."]
    assert tokenizer.tokenize("FPS-48") == ["▁fps-", "4", "8"]
    assert "▁kite" not in tokenizer.get_vocab() and "kite" not in tokenizer.get_vocab()
    assert tokenizer.tokenize("says “kïte”") == tokenizer.tokenize('says "KITE"')
    for unseen in ("turquoise", "a-b_c", "1234"):
        assert tokenizer.unk_token_id not in tokenizer(unseen)["input_ids"]
        assert tokenizer.decode(tokenizer(unseen)["input_ids"], skip_special_tokens=True) == unseen
    assert tokenizer("")["input_ids"] == [END]
    assert tokenizer.model_max_length == 32


def test_byte_pair_tokenizer_has_a_token_a_word_and_bytes_for_the_rest():
    tokenizer = byte_pair_tokenizer(['a red star says "KITE"', "a red ring"] * 20, 100, 32)
    assert tokenizer.tokenize("A red star") == ["a</w>", "red</w>", "star</w>"]
    assert len(tokenizer.tokenize("kite")) == 4
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for anything in ("turquoise", "日本 🌟", "x" * 20):
        ids = tokenizer(anything)["input_ids"]
        assert ids[0] == start and ids.count(end) == 1 and ids[-1] == end
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_readers_leave_padding_out():
    hidden = torch.tensor([[[1.0, 3.0], [3.0, 5.0], [9.0, 9.0]]])
    states = TextEmbedding(
        hidden=hidden * torch.tensor([[[1], [1], [0]]]), mask=torch.tensor([[True, True, False]])
    )
    torch.testing.assert_close(mean_state(states), torch.tensor([[2.0, 4.0]]))
    torch.testing.assert_close(last_state(states), torch.tensor([[3.0, 5.0]]))
    heads = AttributeHeads(2, [2, 3])
    truth, mask = torch.tensor([[1, 2]]), states.mask
    changed = hidden.clone()
    changed[0, 2] = 100.0
    torch.testing.assert_close(heads(hidden, mask, truth), heads(changed, mask, truth))


def test_probes_tell_what_is_there_from_what_is_not():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 6, generator=generator)
    names = ["left" if value > 0 else "right" for value in features[:, 2]]
    chance = ["left" if value > 0 else "right" for value in torch.randn(400, generator=generator)]
    halves = (features[:200], features[200:])
    assert accuracy(halves, (names[:200], names[200:])) > 0.95
    assert accuracy(halves, (chance[:200], chance[200:])) < 0.65


@pytest.mark.filterwarnings("ignore::kinoflow.conditioning.embedding.TruncatedPromptWarning")
def test_training_writes_three_checkpoints_that_everyone_can_load(tiny, tmp_path):
    figures = text.train(tiny, seed=0, run=tmp_path)
    folder = tmp_path / "text"
    assert sorted(path.name for path in folder.iterdir()) == ["byt5", "figures.json", "metaclip", "ul2"]
    assert json.loads((folder / "figures.json").read_text())["probes"] == figures["probes"]
    assert PromptEncoder.from_pretrained(folder).widths == (16, 16, 16)
    for name, kind in (("ul2", T5EncoderModel), ("byt5", T5EncoderModel), ("metaclip", CLIPTextModel)):
        model, info = kind.from_pretrained(folder / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert next(model.parameters()).dtype == torch.float16
        AutoTokenizer.from_pretrained(folder / name, local_files_only=True)


def test_the_same_seed_gives_the_same_weights_and_another_one_others(tiny, tmp_path):
    tiny = replace(tiny, probes=8)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        text.train(tiny, seed=seed, run=tmp_path / name)
    for part in ("ul2", "byt5", "metaclip"):
        weights = [(tmp_path / run / "text" / part / "model.safetensors").read_bytes() for run in "abc"]
        assert weights[0] == weights[1] != weights[2]


def test_a_killed_run_leaves_the_old_encoders(tiny, tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "old").touch()
    monkeypatch.setattr(text, "_train_byt5", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        text.train(tiny, seed=0, run=tmp_path)
    assert (tmp_path / "text" / "old").exists()


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("text.ul2.steps=0", r"text\..*steps"),
        ("text.byt5.heads=5", r"text\..*heads"),
        ("text.clips=10", r"text\.clips"),
        ("text.probes=0", r"text\..*probes"),
    ],
)
def test_a_bad_value_is_named(override, key):
    with pytest.raises(UserError, match=key):
        load(RunConfig, [str(ROOT / "configs" / "mini" / "mini_text.yaml"), override])


def test_the_shipped_states_tell_colour_shape_and_motion():
    figures = text.measure(SHIPPED, 600)
    least = {"ul2": 0.85, "metaclip": 0.97}  # 0.92 and 0.997 when fitted on the 3000 captions of the recipe
    for name, floor in least.items():
        for kind in ("mean", "end"):
            for key in ("color", "shape", "motion"):
                assert figures["probes"][f"{name}_{kind}_{key}"] > floor, (name, kind, key)
    assert figures["probes"]["byt5_token_letter"] > 0.99
    assert figures["probes"]["byt5_token_place"] > 0.99
    assert figures["tokens_per_caption"]["ul2"] < 18
    assert figures["tokens_per_caption"]["metaclip"] < 22
