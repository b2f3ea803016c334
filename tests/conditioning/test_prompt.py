"""Prompts: the frame rate in front, the quoted text, the null prompt."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinoflow.conditioning.prompt import PromptTexts, format_fps, fps_prefix, is_null, prepare, quoted_text
from kinoflow.configs.errors import UserError

FPS = Fraction(16)


@pytest.mark.parametrize(
    ("fps", "text"),
    [
        (Fraction(16), "16"),
        (Fraction(30000, 1001), "29.97"),
        (Fraction(24000, 1001), "23.976"),
        (Fraction(60000, 1001), "59.94"),
        (Fraction(25, 2), "12.5"),
        (Fraction(100), "100"),
        (Fraction(1, 3), "0.333"),
    ],
)
def test_frame_rates_are_written_as_people_write_them(fps, text):
    assert format_fps(fps) == text
    assert fps_prefix("a red star", fps) == f"FPS-{text} a red star"


@pytest.mark.parametrize("fps", [Fraction(0), Fraction(-24), Fraction(1, 100000)])
def test_a_rate_that_is_none_is_refused_by_name(fps):
    with pytest.raises(UserError, match=r"^fps: .*positive") as caught:
        prepare("a red star", fps)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "quoted"),
    [
        ("a red star", []),
        ("", []),
        ('a sign that reads "KITE"', ["KITE"]),
        ('"ONE" and "TWO", then "THREE".', ["ONE", "TWO", "THREE"]),
        ("a sign “KITE” and „MOND“ and «LUNE» and ‘MOON’", ["KITE", "MOND", "LUNE", "MOON"]),
        ("a sign 'KITE'", ["KITE"]),
        ('mixed “KITE" marks', ["KITE"]),
        ('the word "KITE', []),
        ("the word KITE”", []),
        ('"A" and a lone " mark', ["A"]),
        ('empty "" and blank " "', []),
        ('spaces " KITE " go', ["KITE"]),
        ("the dog's bowl isn't the cat's", []),
        ("the dogs' bowl and the cats' bowl", []),
        ("the dog’s bowl isn’t the cat’s", []),
        ("a sign ‘don’t stop’", ["don’t stop"]),
        ("it's a sign 'don't stop'", ["don't stop"]),
        ("“he said 'hi' twice”", ["he said 'hi' twice"]),
        ('a 27" screen that shows "HI"', ["HI"]),
        ('a sign "日本 🌟"', ["日本 🌟"]),
        ('two lines "UP\nDOWN"', ["UP\nDOWN"]),
        ("”KITE” and ‚MOON‘ and »STAR« and 「凧」", ["KITE", "MOON", "STAR", "凧"]),
        ("“ONE” ‘TWO’ \"THREE\" 'FOUR'", ["ONE", "TWO", "THREE", "FOUR"]),
        ("a word “KITE then “MOON”", ["MOON"]),
        ('a word “KITE and "MOON"', ["KITE and"]),
        ("a lone ” and a lone “", []),
        ('no opening: KITE.”, then "MOON"', ["MOON"]),
        ("no opening: KITE» and «MOON»", ["MOON"]),
        ("« « A »", ["A"]),
        ("‘ONE and ‘TWO’", ["TWO"]),
        ("“KITE“", []),
        ('"""', []),
        ('"KITE""MOON"', ["KITE", "MOON"]),
    ],
)
def test_quoted_text(prompt, quoted):
    assert quoted_text(prompt) == quoted


def test_long_prompts_full_of_open_marks_are_quick():
    assert quoted_text("'a " * 4000) == []
    assert quoted_text('"' * 10001) == []
    for mark in "‘‚»„「":
        assert quoted_text(f"{mark}a " * 4000) == []


PAIRS = ('""', "“”", "””", "„“", "„”", "«»", "»«", "‘’", "‚‘", "「」", "''")
PLAIN = st.text(st.characters(categories=("L", "N", "Zs", "Po"), exclude_characters="\"'"), max_size=30)
WORD = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=12)


@given(prompt=st.text(max_size=80))
def test_any_text_is_read_and_what_is_quoted_stands_in_it(prompt):
    assert all(quote and quote in prompt for quote in quoted_text(prompt))


@given(before=PLAIN, after=PLAIN, words=st.lists(WORD, min_size=1, max_size=3), pair=st.sampled_from(PAIRS))
def test_every_kind_of_pair_quotes_among_plain_text(before, after, words, pair):
    quotes = " and ".join(f"{pair[0]}{word}{pair[1]}" for word in words)
    assert quoted_text(f"{before} {quotes} {after}") == words


def test_each_encoder_gets_its_text():
    texts = prepare('  a star above "KITE" and “MOON” ', FPS)
    whole = 'FPS-16 a star above "KITE" and “MOON”'
    assert texts == PromptTexts(ul2=whole, byt5="KITE MOON", metaclip=whole)
    assert prepare("a star", FPS).byt5 == ""


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t"])
def test_the_null_prompt_is_empty_at_every_rate(prompt):
    assert is_null(prompt)
    assert prepare(prompt, FPS) == prepare("", Fraction(24)) == PromptTexts(ul2="", byt5="", metaclip="")


def test_bytes_that_are_no_text_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"^prompt: character 3 .*UTF-8") as caught:
        prepare("a \udcff star", FPS)
    assert "\n" not in str(caught.value)
