"""Words that a small release does not know are named; large releases know every word."""

import json
from pathlib import Path

import pytest

from kinoflow.conditioning.vocabulary import Vocabulary, known_words
from kinoflow.train.mini.tokenizers import word_tokenizer
from tests.conditioning.writing import write_metaclip

MINI = Path(__file__).parents[2] / "sample" / "mini" / "text"
KNOWN = Vocabulary(
    words=frozenset({"a", "red", "purple", "star", "sign", "that", "reads", "etoile"}), written="[A-Z]{2,8}"
)

HOW_TO_WRITE = 'a word to be written goes in quotes and capitals, as in "KITE"'


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a red star", []),
        ("A Red, STAR... (étoile)! — ?", []),
        ('a sign that reads "KITE" and “moon”', ["and"]),
        ("a dog, a Dog and a dog's star", ["dog", "Dog", "and", "dog's"]),
        ("🎉 a ★", ["🎉", "★"]),
        ("", []),
    ],
)
def test_words_outside_quotes_are_looked_up_as_the_tokenizer_reads_them(prompt, unknown):
    assert KNOWN.unknown(prompt) == unknown


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ("a red star", None),
        ('a sign that reads "KITE"', None),
        ("a puple star", 'this release does not know "puple" (it knows "purple")'),
        (
            "a sign that reads kite",
            f'this release does not know "kite"; {HOW_TO_WRITE}',
        ),
        (
            'a sign that reads "kite"',
            f'this release writes [A-Z]{{2,8}}, not "kite"; {HOW_TO_WRITE}',
        ),
        ('a sign that reads "TO LET"', 'this release writes [A-Z]{2,8}, not "TO LET"'),
        ("b c d e f g h", 'this release does not know "b", "c", "d", "e", "f" and 2 more'),
        ("a " + "x" * 99, f'this release does not know "{"x" * 30}…"'),
    ],
)
def test_the_advice_is_one_line(prompt, line):
    assert KNOWN.advice(prompt) == line


def test_a_release_that_does_not_say_what_it_writes_is_not_asked():
    assert Vocabulary(words=KNOWN.words).advice('a sign that reads "kite"') is None
    assert Vocabulary(words=KNOWN.words).advice("a kite") == 'this release does not know "kite"'


def test_only_a_tokenizer_of_words_tells_what_it_knows(tmp_path):
    word_tokenizer(['a red star, "KITE"', "it moves"], 16).save_pretrained(tmp_path / "words")
    assert known_words(tmp_path / "words") >= {"a", "red", "star", "it", "moves"}
    assert not known_words(tmp_path / "words") & {"kite", '"kite"', "th", "s"}
    table = json.loads((tmp_path / "words" / "tokenizer.json").read_text())
    table["model"]["vocab"].append(["ing", -5.0])  # a piece of words: any word may be made of such
    (tmp_path / "pieces").mkdir()
    (tmp_path / "pieces" / "tokenizer.json").write_text(json.dumps(table))
    write_metaclip(tmp_path / "metaclip", width=8)
    for folder in (tmp_path / "pieces", tmp_path / "metaclip", MINI / "byt5", tmp_path):
        assert known_words(folder) is None


def test_the_shipped_release_knows_its_world():
    known = known_words(MINI / "ul2")
    assert {"star", "purple", "checkered", "bounces", "sign"} <= known
    assert not {"dog", "kite", "th"} & known
