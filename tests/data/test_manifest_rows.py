"""Rows of a list that cannot be used: each costs itself, and is named."""

import datetime
import json
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from kinoflow.configs.errors import UserError
from kinoflow.data import video
from kinoflow.data.__main__ import main
from kinoflow.data.clips import manifest
from kinoflow.data.clips.buckets import parse
from kinoflow.data.clips.fit import Clips

# A row of JSON, and what is said of it.
BAD = {
    rb'{"path": "a\u0000b.mp4"}': "path: 'a\\x00b.mp4' has a zero byte",
    rb'{"path": "a\ud800.mp4"}': "path: 'a\\ud800.mp4' is not valid text",
    b'{"path": 7}': "path: 7 is not text",
    b'{"caption": "no path"}': "path: is empty",
    b'{"path": "a.mp4", "caption": 3.5}': "caption: 3.5 is not text",
    rb'{"path": "a.mp4", "caption": "\udc00"}': "caption: '\\udc00' is not valid text",
    b'{"path": "a.mp4", "fps": "0/0"}': "fps: '0/0' is not a rate",
    b'{"path": "a.mp4", "fps": "inf"}': "fps: 'inf' is not a rate",
    b'{"path": "a.mp4", "fps": 1e400}': "fps: inf is not a rate",
    b'{"path": "a.mp4", "fps": "1e999999999"}': "fps: '1e999999999' is not a rate",
    b'{"path": "a.mp4", "fps": "1e-999999999"}': "fps: 0 must be positive",
    b'{"path": "a.mp4", "fps": "1/%s"}' % (b"9" * 900): "is not a rate",
    b'{"path": "a.mp4", "fps": NaN}': "NaN is not a JSON number",
    b'{"path": "a.mp4", "fps": [16]}': "fps: [16] is not a rate",
    b'{"path": "a.mp4", "fps": -16}': "fps: -16 must be positive",
    b'{"path": "a.mp4", "frames": 1e30}': "frames: 1e+30 is not a whole number that a clip can have",
    b'{"path": "a.mp4", "frames": 1%s}' % (b"0" * 400): "is not a whole number that a clip can have",
    b'{"path": "a.mp4", "width": 1e400}': "width: inf is not a whole number",
    b'{"path": "a.mp4", "height": "64"}': "height: '64' is not a whole number",
    b"[1, 2]": "is not an object",
    b'"a.mp4"': "is not an object",
    b"{oops": "not JSON",
    b'{"path": "caf\xe9.mp4"}': "is not UTF-8 text",
}
GOOD = b'{"path": "good.mp4", "caption": "good"}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    frames = np.full((12, 16, 16, 3), 90, np.uint8)
    video.write(tmp_path / "good.mp4", frames, fps=16)
    return tmp_path


@pytest.mark.parametrize(("row", "reason"), BAD.items(), ids=range(len(BAD)))
def test_a_bad_row_costs_that_row(tmp_path: Path, row: bytes, reason: str) -> None:
    path = tmp_path / "clips.jsonl"
    path.write_bytes(GOOD + b"\n\n" + row + b"\r\n" + GOOD)
    listing = manifest.read(path)
    assert [entry.path for entry in listing.entries] == ["good.mp4"] * 2
    assert listing.rows == (1, 4)
    (problem,) = listing.bad
    assert problem.row == 3
    assert reason in problem.reason and "\n" not in problem.reason and len(problem.reason) < 300
    assert listing.warning.startswith(f"{path}: 1 of 3 rows are bad and left out; the first is row 3: ")
    path.write_bytes(b"\xef\xbb\xbf" + GOOD)
    assert manifest.read(path).bad == () and manifest.read(path).warning == ""


def test_a_list_of_bad_rows_alone_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "clips.jsonl"
    path.write_bytes(b"\n".join(BAD))
    with pytest.raises(UserError, match=r"^\S*clips\.jsonl: has no good row; line 1: path") as caught:
        manifest.read(path)
    assert "\n" not in str(caught.value)


def test_check_and_info_name_bad_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "clips.jsonl"
    path.write_bytes(b"\n".join([*BAD, GOOD, b'{"path": "%s.mp4"}' % (b"x" * 5000)]))
    assert main(["check", str(path), "--json"]) == 1
    figures = json.loads(capsys.readouterr().out)
    assert figures["clips"] == len(BAD) + 2
    assert [problem["row"] for problem in figures["bad"]] == [*range(1, len(BAD) + 1), len(BAD) + 2]
    for problem, reason in zip(figures["bad"], BAD.values(), strict=False):
        assert reason in problem["reason"]
    assert "name is too long" in figures["bad"][-1]["reason"]
    assert main(["check", str(path)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(BAD) + 2 and said[-1] == f"1 of {len(BAD) + 2} clips are good"
    assert said[2] == "row 3: path: 7 is not text; write it in quotes"
    assert main(["info", str(path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["clips"], len(figures["bad"])) == (2, len(BAD))
    assert main(["info", str(path)]) == 0
    assert "row 3: path: 7 is not text" in capsys.readouterr().out


def test_training_goes_on_and_quarantine_names_them_once(folder: Path) -> None:
    """The path of a bad row may be another, good row's: that one stays good."""
    path, quarantine = folder / "clips.jsonl", folder / "quarantine.jsonl"
    path.write_bytes(b'{"path": "good.mp4", "frames": "many"}\n' + GOOD + b'\n{"path": "a\\u0000b"}\n')
    bucket = parse("8x16x16@16")
    for _ in range(2):
        clips = Clips(manifest.read(path), [bucket], 0, quarantine)
        assert clips.count(bucket) == 1
        assert clips.get(0, bucket).caption == "good"
    rows = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [(row["row"], row["path"]) for row in rows] == [(1, "good.mp4"), (3, "")]


def test_a_path_that_is_too_long_costs_the_clip(folder: Path) -> None:
    path = folder / "clips.jsonl"
    long = b'{"path": "%s.mp4", "frames": 12, "fps": 16, "width": 16, "height": 16}' % (b"x" * 5000)
    path.write_bytes(long + b"\n" + GOOD)
    bucket = parse("8x16x16@16")
    clips = Clips(manifest.read(path), [bucket], 0, folder / "quarantine.jsonl")
    assert clips.get(0, bucket).caption == "good"
    assert "too long" in (folder / "quarantine.jsonl").read_text()


def parquet(file: Path, **columns: object) -> manifest.Manifest:
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return manifest.read(file)


def test_decimals_of_parquet_are_exact(tmp_path: Path) -> None:
    listing = parquet(
        tmp_path / "c.parquet",
        path=["a", "b", "c"],
        frames=pyarrow.array([Decimal("24.0"), Decimal("24.5"), None]),
        fps=pyarrow.array([Decimal("23.976"), Decimal("16.000"), Decimal("0.000")]),
    )
    (entry,) = listing.entries
    assert (entry.frames, entry.fps) == (24, Fraction(23976, 1000))
    assert [problem.row for problem in listing.bad] == [2, 3]
    assert "frames: Decimal('24.5') is not a whole" in listing.bad[0].reason


def test_long_parquet_lists_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad row far behind is told by its number in the whole."""
    count = 70_000
    assert count > 65_536, "what pyarrow gives at a time"
    monkeypatch.setattr(manifest, "_parquet_batch", _counting(sizes := [], manifest._parquet_batch))
    widths = [64] * count
    widths[count - 2] = -1
    listing = parquet(tmp_path / "c.parquet", path=[f"{i}.mp4" for i in range(count)], width=widths)
    assert len(listing) == count - 1
    assert [problem.row for problem in listing.bad] == [count - 1]
    assert listing.entries[-1].path == f"{count - 1}.mp4"
    assert sum(sizes) == count and len(sizes) > 1


def _counting(sizes: list[int], read: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def counted(pyarrow: Any, batch: Any) -> Any:
        sizes.append(batch.num_rows)
        return read(pyarrow, batch)

    return counted


def test_values_of_parquet_that_are_none_of_ours(tmp_path: Path) -> None:
    when = datetime.datetime(2024, 5, 1)
    listing = parquet(tmp_path / "c.parquet", path=["a", "b"], frames=[when, None], made=[when, when])
    assert [entry.path for entry in listing.entries] == ["b"]
    assert listing.entries[0].extra == {"made": when}
    assert "frames: datetime.datetime(2024, 5, 1, 0, 0) is not" in listing.bad[0].reason
    torn = pyarrow.array([b"a", b"\xff\xfe", b"c"]).cast(pyarrow.string(), safe=False)
    listing = parquet(tmp_path / "d.parquet", path=["a", "b", "c"], caption=torn)
    assert [entry.path for entry in listing.entries] == ["a", "c"]
    assert (listing.bad[0].row, listing.rows) == (2, (1, 3))
    assert listing.bad[0].reason.startswith("caption: cannot be read")
    impossible = pyarrow.array([2**62, 0], pyarrow.timestamp("us"))
    listing = parquet(tmp_path / "e.parquet", path=["a", "b"], made=impossible)
    assert [entry.path for entry in listing.entries] == ["b"] and listing.bad[0].row == 1
