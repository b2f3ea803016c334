"""Each planted fault is dropped by the stage that is meant for it, with its reason, and nothing else is."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from kinoflow.data import video
from kinoflow.data.__main__ import main
from kinoflow.data.clips import manifest
from kinoflow.data.engine import selection
from tests.data.engine.planting import boxed, lettered, resized, shot, write

pytest.importorskip("cv2")
pytest.importorskip("rapidocr")

RULES = ["select.shake=:8", "select.sharpness=5:"]  # of small pictures of a shaky street


def curate(source: Path, out: Path, *more: str) -> int:
    return main(["curate", str(source), str(out), "--workers", "0", "--config", *RULES, *more])


def rows(out: Path) -> list[dict]:
    return selection.read_scores(out).to_pylist()


def ledger(out: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    return {Path(line["path"]).stem: line for line in lines}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four good clips, and one of each fault."""
    folder = tmp_path_factory.mktemp("raw")
    for name in ("street", "crossing", "rabbit", "car"):
        write(folder / f"good_{name}.mp4", shot(name))
    (folder / "good_car.txt").write_text("a man in a car\n")
    write(folder / "borders.mp4", boxed(shot("street")[:, :, ::-1], 24))
    write(folder / "static.mp4", np.repeat(shot("crossing")[20:21, ::-1], 50, axis=0))
    write(folder / "text.mp4", lettered(shot("car")[:, :, ::-1]))
    twin = np.stack([resized(frame, (120, 212)) for frame in shot("rabbit")])
    write(folder / "twin.mp4", twin, crf=33)
    write(folder / "short.mp4", shot("crossing")[:12, ::-1, ::-1])
    whole = write(folder / "truncated.mp4", shot("street")[:, ::-1]).read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) * 7 // 10])
    os.mkfifo(folder / "pipe.mp4")
    (folder / "notes.md").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def curated(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("curated")
    assert curate(planted, out) == 0
    return out


def test_each_fault_has_its_reason_and_nothing_else_is_dropped(curated: Path) -> None:
    lines = [json.loads(line) for line in (curated / "ledger.jsonl").read_text().splitlines()]
    found = [(Path(line["path"]).stem, line["stage"]) for line in lines]
    assert sorted(found) == [
        ("borders", "borders"), ("pipe", "readable"), ("short", "seconds"), ("static", "motion"),
        ("text", "text"), ("truncated", "damaged"), ("truncated", "readable"), ("twin", "duplicates"),
    ]  # fmt: skip
    kept = manifest.read(curated / "manifest.jsonl").entries
    assert [Path(entry.path).stem for entry in kept] == [
        f"good_{n}" for n in ("car", "crossing", "rabbit", "street")
    ]
    assert [entry.caption for entry in kept] == ["a man in a car", "", "", ""]


def test_the_ledger_says_score_and_threshold(curated: Path) -> None:
    lines = ledger(curated)
    assert "is a pipe or a device" in lines["pipe"]["reason"]
    assert (lines["short"]["score"], lines["short"]["threshold"]) == (0.48, "1:")
    assert lines["borders"]["score"] == pytest.approx(48 / 180, abs=0.02)
    assert lines["static"]["score"] < 0.3 and lines["text"]["score"] > 0.05
    assert Path(lines["twin"]["like"]["path"]).stem == "good_rabbit", "the smaller one goes"
    truncated = [row for row in rows(curated) if Path(row["path"]).stem == "truncated"]
    assert [row["error"] is None for row in truncated] == [True, False]
    assert "does not decode" in truncated[1]["error"]
    there = video.probe(truncated[0]["path"]).frames
    assert sum(row["frames"] for row in truncated) == there, "what is lost is counted"


def test_the_list_is_good_and_whole_videos_are_whole_clips(curated: Path) -> None:
    listing = manifest.read(curated / "manifest.jsonl")
    assert list(manifest.check(listing, decode=True)) == [None] * 4
    for entry in listing.entries:
        assert (entry.first_frame, entry.extra["begin"]) == (0, "0")
        assert entry.frames == len(shot(Path(entry.path).stem.removeprefix("good_")))
        assert entry.extra["end"] == str(entry.frames / entry.fps)


def test_the_same_command_again_looks_at_nothing(
    planted: Path, curated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (curated / "scores").iterdir()}
    table = rows(curated)
    nothing = pytest.fail
    monkeypatch.setattr("kinoflow.data.engine.curate.scan_to", lambda *_: nothing("decodes again"))
    monkeypatch.setattr("kinoflow.data.engine.curate.probe", lambda *_: nothing("probes again"))
    assert curate(planted, curated) == 0
    assert {path: path.stat().st_mtime_ns for path in (curated / "scores").iterdir()} == before
    assert curate(planted, curated, "shots.longest=1", "shots.detector=content") == 0
    assert len(rows(curated)) > len(table), "other shots, of the same signals"
    assert curate(planted, curated) == 0
    assert rows(curated) == table


def test_select_decides_anew_without_the_videos(
    planted: Path, curated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = tmp_path / "away"
    planted.rename(away)
    try:
        text = ["select", str(curated), "--json", "--config", "select.sharpness=best 50%", "select.text=null"]
        assert main(text) == 0
        told = json.loads(capsys.readouterr().out)
    finally:
        away.rename(planted)
    stages = {stage["stage"]: stage for stage in told["stages"]}
    assert "text" not in stages
    came = stages["sharpness"]["came"]
    assert came == 6, "four good clips, the one with text, and the twin that is found later"
    assert stages["sharpness"]["dropped"] == 3 and stages["sharpness"]["rule"].startswith("best 50% (")
    lines = [json.loads(line) for line in (curated / "ledger.jsonl").read_text().splitlines()]
    assert 2 <= told["kept"] <= 3 and told["shots"] == told["kept"] + len(lines)
    limit = float(stages["sharpness"]["rule"].partition("(")[2].partition(":")[0])
    assert all(line["score"] < limit for line in lines if line["stage"] == "sharpness")
    assert curate(planted, curated) == 0


def test_a_best_of_what_has_none_and_a_typo_are_refused(
    curated: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["select", str(curated), "--config", "select.aspect=best 10%"]) == 2
    assert "neither more nor less is better" in capsys.readouterr().err
    assert main(["select", str(curated), "--config", "select.text=0.1"]) == 2
    assert "select.text: '0.1' is no rule; write \"least:most\"" in capsys.readouterr().err
    assert main(["select", str(tmp_path)]) == 2
    assert "run kinoflow data curate SOURCE" in capsys.readouterr().err
    assert main(["curate", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "names no video" in capsys.readouterr().err
