"""Text states on disk: hits bit for bit, damage, several processes, resuming, real encoders left unloaded."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import kinoflow.conditioning.prompt_encoder
from kinoflow.conditioning.embedding import TruncatedPromptWarning
from kinoflow.conditioning.prompt_encoder import PromptEncoder
from kinoflow.configs.errors import UserError
from tests.conditioning.filling import TEXTS, HashEncoder, cached
from tests.conditioning.writing import write_encoders

ROOT = Path(__file__).parents[2]
FPS = Fraction(16)
PROMPTS = ["a red star", 'a ring, a sign says "KITE"', "a red star", ""]


def entries(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hits_are_bit_for_bit_what_was_computed(tmp_path, dtype):
    encoder = HashEncoder(dtype)
    one = cached(tmp_path, encoder, dtype=dtype)
    texts = ["a star", "b", "", "a star", "déjà vu 🌟"]
    first = one(texts)
    plain = encoder.encode(texts).states
    assert torch.equal(first.hidden, plain.hidden) and torch.equal(first.mask, plain.mask)
    assert encoder.seen[:4] == ["a star", "b", "", "déjà vu 🌟"]  # each text once
    never = HashEncoder()
    again = cached(tmp_path, never, dtype=dtype)(texts)
    assert never.seen == []
    assert torch.equal(again.hidden, first.hidden) and torch.equal(again.mask, first.mask)
    assert again.hidden.dtype == dtype
    assert len(entries(tmp_path)) == 4


def test_only_what_is_missing_is_computed_and_rows_stay_in_order(tmp_path):
    encoder = HashEncoder()
    one = cached(tmp_path, encoder)
    one(["b", "d"])
    states = one(["a", "b", "c", "d", "e"])
    assert encoder.seen == ["b", "d", "a", "c", "e"]
    plain = HashEncoder().encode(["a", "b", "c", "d", "e"]).states
    assert torch.equal(states.hidden, plain.hidden) and torch.equal(states.mask, plain.mask)
    assert one.width == 6


def test_another_checkpoint_encoder_or_dtype_shares_nothing(tmp_path):
    kinds = [{}, {"identity": "other"}, {"name": "byt5"}, {"dtype": torch.bfloat16}]
    for kind in kinds:
        encoder = HashEncoder()
        cached(tmp_path, encoder, **kind)(["a"])
        assert encoder.seen == ["a"]
    assert len(list(tmp_path.iterdir())) == len(kinds)
    moved = HashEncoder()
    states = cached(tmp_path, moved, dtype=torch.float32).to(torch.float64)(["a"])
    assert moved.seen == ["a"] and states.hidden.dtype == torch.float64


def test_a_cut_is_told_at_every_meeting(tmp_path):
    for _ in range(2):
        with pytest.warns(TruncatedPromptWarning, match="ul2 reads at most 12 tokens: the end of 1 of 2"):
            cached(tmp_path, HashEncoder())(["x" * 12, "short"])
    cached(tmp_path, HashEncoder())(["x" * 11])  # exactly the limit: nothing was left out


def swap(path):
    """The whole and healthy entry of another text."""
    other = next(each for each in entries(path.parents[1]) if each != path)
    path.write_bytes(other.read_bytes())


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def forget_the_text(path):
    save_file(load_file(path), path)


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b"not safetensors at all"),
        lambda path: flip(path, -1),
        lambda path: flip(path, 2),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"cut_at":"0"', b'"cut_at":"9"')),
        swap,
        forget_the_text,
    ],
    ids=[
        "missing",
        "empty",
        "short",
        "other",
        "bit of a state",
        "bit of the header",
        "cut",
        "swapped",
        "bare",
    ],
)
def test_damaged_entries_are_made_anew(tmp_path, damage):
    first = cached(tmp_path, HashEncoder())(["a star", "b"])
    key = next(path for path in entries(tmp_path) if b"a star" in path.read_bytes())
    whole = key.read_bytes()
    damage(key)
    assert not key.exists() or key.read_bytes() != whole
    encoder = HashEncoder()
    again = cached(tmp_path, encoder)(["a star", "b"])
    assert encoder.seen == ["a star"]
    assert torch.equal(again.hidden, first.hidden)
    healed = HashEncoder()
    cached(tmp_path, healed)(["a star", "b"])
    assert healed.seen == []


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    class Interrupted(HashEncoder):
        def encode(self, texts):
            if len(self.seen) == 5:
                raise KeyboardInterrupt
            return super().encode(texts)

    one = cached(tmp_path, Interrupted())
    with pytest.raises(KeyboardInterrupt):
        for text in TEXTS[:10]:
            one([text])
    rest = HashEncoder()
    cached(tmp_path, rest)(TEXTS[:10])
    assert rest.seen == TEXTS[5:10]


def filling(name, folder, count):
    """A function of filling.py in a process of its own."""
    command = [sys.executable, "-m", "tests.conditioning.filling", name, str(folder), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_processes_fill_one_cache(tmp_path):
    both = filling("fill_together", tmp_path, 2)
    counts = [int(line) for line in both.communicate(timeout=900)[0].splitlines()]
    assert both.returncode == 0 and len(counts) == 2
    assert sum(counts) >= len(TEXTS)
    assert len(entries(tmp_path)) == len(TEXTS)  # nothing half written is left
    never = HashEncoder()
    states, plain = cached(tmp_path, never)(TEXTS), HashEncoder().encode(TEXTS).states
    assert never.seen == []
    assert torch.equal(states.hidden, plain.hidden)


def test_a_killed_process_leaves_whole_entries(tmp_path):
    """Killed while it writes its sixth one, whose half lies beside them under a hidden name."""
    one = filling("stop_in_the_middle", tmp_path, 5)
    assert one.stdout.readline() == "half\n"
    one.kill()
    one.communicate()
    assert [path.name[0] == "." for path in entries(tmp_path)].count(True) == 1
    assert len(entries(tmp_path)) == 6
    rest = HashEncoder()
    states = cached(tmp_path, rest)(TEXTS)
    assert rest.seen == TEXTS[5:]
    assert torch.equal(states.hidden, HashEncoder().encode(TEXTS).states.hidden)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"text states can't be kept there.*name another cache folder"
    ) as caught:
        cached(tmp_path / "file", HashEncoder())(["a"])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "file"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("text"))


def test_real_encoders_are_not_loaded_when_nothing_is_missing(checkpoints, tmp_path, monkeypatch):
    plain = PromptEncoder.from_pretrained(checkpoints)
    kept = PromptEncoder.from_pretrained(checkpoints, cache=tmp_path)
    for states, expected in zip(kept(PROMPTS, FPS), plain(PROMPTS, FPS), strict=True):
        assert torch.equal(states.mask, expected.mask)
        torch.testing.assert_close(states.hidden, expected.hidden, atol=1e-6, rtol=1e-6)
    first = kept(PROMPTS, FPS), kept.null()

    def fail(*_):
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(kinoflow.conditioning.prompt_encoder, "_load", fail)
    again = PromptEncoder.from_pretrained(checkpoints, cache=tmp_path)
    assert again.widths == plain.widths == (24, 24, 16)
    for states, expected in zip((again(PROMPTS, FPS), again.null()), first, strict=True):
        assert all(torch.equal(s.hidden, e.hidden) for s, e in zip(states, expected, strict=True))
    with pytest.raises(AssertionError, match="an encoder was loaded"):
        again(["a prompt not met before"], FPS)
    with pytest.raises(AssertionError, match="an encoder was loaded"):
        again(PROMPTS[:1], Fraction(24))  # the rate is a part of what UL2 reads


def test_a_hit_needs_no_transformers(checkpoints, tmp_path):
    """The library's import takes longer than a small encoder's work."""
    prompts = PROMPTS[:2]
    expected = PromptEncoder.from_pretrained(checkpoints, cache=tmp_path)(prompts, FPS)
    script = (
        "import sys; from fractions import Fraction\n"
        "from kinoflow.conditioning.prompt_encoder import PromptEncoder\n"
        f"states = PromptEncoder.from_pretrained({str(checkpoints)!r}, cache={str(tmp_path)!r})"
        f"({prompts!r}, Fraction(16))\n"
        "print('transformers' in sys.modules, *[float(each.hidden.double().sum()) for each in states])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True
    )
    imported, *sums = ran.stdout.split()
    assert imported == "False"
    assert [float(each) for each in sums] == [float(each.hidden.double().sum()) for each in expected]
