"""Windows of footage and of pictures: where they lie, what they hold, and what is refused."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from kinoflow.configs.errors import UserError
from kinoflow.data import video
from kinoflow.data.__main__ import main
from kinoflow.data.clips import manifest
from kinoflow.data.clips.buckets import parse
from kinoflow.data.clips.cut import CutConfig, cut, windows

CONFIG = CutConfig(frames=8, side=32, per_minute=600.0, per_picture=3)


def footage(path, frames=40):
    """Frame i has the grey level 5 i on the left and 255 - 5 i on the right."""
    clip = np.empty((frames, 64, 96, 3), np.uint8)
    clip[:, :, :48] = (5 * np.arange(frames))[:, None, None, None]
    clip[:, :, 48:] = (255 - 5 * np.arange(frames))[:, None, None, None]
    video.write(path, clip, fps=Fraction(24), crf=1)
    return path


def test_windows_lie_inside_and_come_in_order():
    found = windows(CONFIG, frames=240, height=64, width=96, fps=Fraction(24))
    assert len(found) == 100
    assert [w.start for w in found] == sorted(w.start for w in found)
    assert all(w.start + 8 <= 240 and w.top + w.size <= 64 and w.left + w.size <= 96 for w in found)
    assert {w.size for w in found} - {32}, "some windows are larger than the clips"
    assert windows(CONFIG, frames=7, height=64, width=96, fps=Fraction(24)) == []


def test_clips_hold_the_windows(tmp_path):
    source = footage(tmp_path / "a.mp4")
    entries = list(cut(source, tmp_path, CONFIG))
    expected = windows(CONFIG, frames=40, height=64, width=96, fps=Fraction(24))
    assert len(entries) == len(expected) > 3
    for entry, window in zip(entries, expected, strict=True):
        clip = video.read(tmp_path / entry.path)
        assert clip.shape == (8, 32, 32, 3)
        level = 5 * (window.start + np.arange(8))
        if window.left + window.size <= 48:
            assert np.abs(clip.mean(axis=(1, 2, 3)) - level).max() < 4
        elif window.left >= 48:
            assert np.abs(clip.mean(axis=(1, 2, 3)) - (255 - level)).max() < 4


def test_a_picture_drifts(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    Image.fromarray(noise).resize((192, 144), Image.Resampling.BICUBIC).save(tmp_path / "a.png")
    entries = list(cut(tmp_path / "a.png", tmp_path, CONFIG))
    assert [entry.fps for entry in entries] == [Fraction(24)] * 3
    clip = video.read(tmp_path / entries[0].path).astype(float)
    steps = np.abs(np.diff(clip, axis=0)).mean(axis=(1, 2, 3))
    assert (steps > 0.5).all(), "every frame moves"
    assert np.abs(clip[-1] - clip[0]).mean() > 2 * steps.mean(), "and moves on"


def test_the_same_seed_gives_the_same_clips(tmp_path):
    source = footage(tmp_path / "a.mp4")
    first, second = (
        [video.read(tmp_path / name / e.path) for e in cut(source, tmp_path / name, CONFIG)] for name in "ab"
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_command_lists_what_was_cut_and_what_could_not_be(tmp_path, capsys):
    good, bad = footage(tmp_path / "good.mp4"), tmp_path / "bad.mp4"
    bad.write_bytes(b"no clip")
    out = tmp_path / "out"
    arguments = [
        "cut",
        str(good),
        str(bad),
        str(out),
        "--frames",
        "8",
        "--side",
        "32",
        "--fps",
        "16",
        "--json",
    ]
    assert main(arguments) == 1
    assert "bad.mp4" in capsys.readouterr().err
    entries = manifest.read(out / "manifest.jsonl").entries
    assert len(entries) == 8
    assert {entry.fps for entry in entries} == {Fraction(16)}
    assert video.probe(out / entries[0].path).fps == 16


def test_what_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(UserError, match="--side"):
        windows(CONFIG, frames=40, height=16, width=96, fps=Fraction(24))
    nan, inf = float("nan"), float("inf")
    for wrong in (
        {"frames": 0}, {"side": 33}, {"per_minute": 0.0}, {"per_minute": nan}, {"per_minute": inf},
        {"per_picture": -1}, {"fps": Fraction(0)}, {"fps": Fraction(-1)}, {"seed": -1},
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
            CutConfig(**wrong)


def test_two_sources_of_one_name_are_refused(tmp_path, capsys):
    assert main(["cut", "a/x.mp4", "b/x.mp4", str(tmp_path / "out")]) == 2
    assert "x: two sources" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        *(f"--fps {rate}" for rate in ("1/0", "0", "inf", "nan", "-1", "1000001", "fast")), "--seed -1",
        *(f"--per-minute {count}" for count in ("nan", "inf", "1e400", "-1")), "--per-picture 0",
    ],
)  # fmt: skip
def test_a_wrong_option_is_one_line_that_names_it(option, tmp_path, capsys):
    source = footage(tmp_path / "a.mp4")
    name, value = option.split()
    assert main(["cut", str(source), str(tmp_path / "out"), f"{name}={value}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"kinoflow data: {name}: ")
    assert not (tmp_path / "out").exists()


def test_sources_too_small_or_too_short_are_listed_and_cost_nothing_else(tmp_path, capsys):
    good = footage(tmp_path / "good.mp4")
    video.write(tmp_path / "small.mp4", np.zeros((40, 16, 96, 3), np.uint8), fps=24)
    video.write(tmp_path / "short.mp4", np.zeros((7, 64, 96, 3), np.uint8), fps=24)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "little.png")
    video.write(tmp_path / "fast.mp4", np.zeros((9, 64, 96, 3), np.uint8), fps=2000)
    names = ["small.mp4", "good.mp4", "short.mp4", "little.png", "gone.mp4"]
    sources = [*(str(tmp_path / name) for name in names), str(tmp_path / "fast.mp4")]
    out = tmp_path / "out"
    assert main(["cut", *sources, str(out), "--frames", "8", "--side", "32", "--json"]) == 1
    said = capsys.readouterr()
    figures = json.loads(said.out)
    assert figures["clips"] == round(300 * 40 / 24 / 60) + 1
    wanted = {
        "small.mp4": "has 96x16 pixels; give a smaller --side",
        "short.mp4": "has 7 frames, a clip takes 8; give fewer --frames",
        "little.png": "has 16x16 pixels; give a smaller --side",
        "gone.mp4": "no such file or folder; check the path",
    }
    assert figures["bad"] == [f"{tmp_path / name}: {reason}" for name, reason in wanted.items()]
    assert said.err.splitlines() == [f"kinoflow data: {line}" for line in figures["bad"]]
    entries = manifest.read(out / "manifest.jsonl").entries
    assert {entry.extra["source"]: entry.fps for entry in entries} == {good.name: 24, "fast.mp4": 2000}
    assert video.probe(out / entries[-1].path).fps == 2000


@pytest.mark.parametrize("rate", [Fraction(16), Fraction(24000, 1001), 24, 25, Fraction(30000, 1001), 30, 60])
def test_clips_of_the_usual_length_fill_the_buckets_of_the_mini_configurations(rate):
    duration = CutConfig().length(Fraction(rate)) / Fraction(rate)
    names = ["mini_tae.yaml", "mini_latents.yaml", "mini_dit.yaml"]
    texts = [text for name in names for text in buckets_of(Path(__file__).parents[2] / "configs/mini" / name)]
    assert len(texts) == 10
    for bucket in map(parse, texts):
        slow = rate < Fraction(98, 100) * bucket.fps and bucket.frames > 1
        assert bucket.filled_by(duration=duration, fps=Fraction(rate)) != slow
    assert CutConfig(fps=Fraction(10)).length(Fraction(10)) == 20


def buckets_of(path):
    content = yaml.safe_load(path.read_text())
    return content["buckets"] if "buckets" in content else content["data"]["buckets"]


def test_names_with_digits_that_are_no_decimals(tmp_path):
    footage(tmp_path / "②.mp4")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "take ①.png")
    names = [str(tmp_path / name) for name in ("②.mp4", "take ①.png")]
    assert main(["cut", *names, str(tmp_path / "²"), "--frames", "8", "--side", "32"]) == 0
    listing = manifest.read(tmp_path / "²" / "manifest.jsonl")
    assert list(manifest.check(listing)) == [None] * len(listing)


# --- captions ---------------------------------------------------------------------------------------------


def cut_two(tmp_path, *options):
    """Rows of clips of a.mp4 and b.mp4: the captions of each."""
    for name in "ab":
        if not (tmp_path / f"{name}.mp4").exists():
            footage(tmp_path / f"{name}.mp4")
    sources = [str(tmp_path / f"{name}.mp4") for name in "ab"]
    status = main(["cut", *sources, str(tmp_path / "out"), "--frames", "8", "--side", "32", *options])
    if status:
        return status
    found = {}
    for entry in manifest.read(tmp_path / "out" / "manifest.jsonl").entries:
        found.setdefault(entry.extra["source"], set()).add(entry.caption)
    return found


def test_captions_lie_beside_the_sources_or_in_a_table(tmp_path, capsys):
    assert cut_two(tmp_path) == {"a.mp4": {""}, "b.mp4": {""}}
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("16 of 16 clips have no caption")
    assert str(tmp_path / "out" / "manifest.jsonl") in said and "--captions" in said and ".txt" in said
    (tmp_path / "a.txt").write_text("\ufeff a fox\n  runs\n", encoding="utf-8")
    assert cut_two(tmp_path) == {"a.mp4": {"a fox runs"}, "b.mp4": {""}}
    assert capsys.readouterr().out.splitlines()[-1].startswith("8 of 16 clips have no caption")
    for name, text in {
        "t.jsonl": '\n{"source": "b.mp4", "text": "rain, on a \\"street\\""}\n{"path": "x", "text": ""}\n',
        "t.csv": 'source,caption\nclips/b.mp4,"rain, on a ""street"""\n',
        "u.csv": 'file_name,text\nb.mp4,"rain, on a\n""street"""\n',
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        wanted = {"a.mp4": {"a fox runs"}, "b.mp4": {'rain, on a "street"'}}
        assert cut_two(tmp_path, "--captions", str(tmp_path / name)) == wanted
        assert "no caption" not in capsys.readouterr().out
    (tmp_path / "v.csv").write_text("source,caption\na.mp4,of the table\n")
    assert cut_two(tmp_path, "--captions", str(tmp_path / "v.csv"), "--json")["a.mp4"] == {"of the table"}
    assert json.loads(capsys.readouterr().out)["without_caption"] == 8


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("t.txt", b"", "ends neither in .jsonl nor in .csv"), ("t.csv", b"a.mp4,fox\n", "has no rows"),
        ("t.csv", b"source,words\na.mp4,fox\n", "row 1 has no name or no caption"),
        ("t.jsonl", b'{"source": "a.mp4"}', "row 1 has no name or no caption"),
        ("t.jsonl", b'["a.mp4"]', "row 1 has no name"), ("t.jsonl", b"{oops", "cannot be read"),
        ("t.jsonl", b"\xff", "not UTF-8"),
        ("t.jsonl", b'{"source": "c.mp4", "caption": "x"}', "names none of"),
    ],
)  # fmt: skip
def test_a_table_that_makes_no_sense_is_one_line(tmp_path, capsys, name, content, wanted):
    (tmp_path / name).write_bytes(content)
    assert cut_two(tmp_path, "--captions", str(tmp_path / name)) == 2
    error = capsys.readouterr().err
    assert wanted in error and str(tmp_path / name) in error and error.count("\n") == 1
    assert cut_two(tmp_path, "--captions", str(tmp_path / "gone.csv")) == 2
    assert "gone.csv: no such file" in capsys.readouterr().err
