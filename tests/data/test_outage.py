"""What is no clip's fault: a disk that is away, a folder that comes back, a reader that hangs or dies."""

import json
import os
import time
from fractions import Fraction

import pytest

from kinoflow.configs.errors import UserError
from kinoflow.data.clips import manifest, patience
from kinoflow.data.clips import workers as workers_module
from kinoflow.data.clips.buckets import parse
from kinoflow.data.clips.fit import Clips
from kinoflow.data.clips.manifest import ClipEntry
from kinoflow.data.clips.patience import GoneError, OutageError, patiently
from kinoflow.data.clips.workers import Workers

BUCKET = parse("1x16x16@16")


@pytest.fixture
def desk(tmp_path):
    """Fourteen pictures in a folder of their own, and their list outside of it."""
    from PIL import Image

    (tmp_path / "clips").mkdir()
    for number in range(14):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / "clips" / f"{number}.png")
    known = {"frames": 1, "fps": Fraction(1), "width": 16, "height": 16}
    entries = [ClipEntry(path=f"clips/{number}.png", caption="", **known) for number in range(14)]
    manifest.write(tmp_path / "clips.jsonl", entries)
    return tmp_path


def clips(desk, workers=None):
    return Clips(manifest.read(desk / "clips.jsonl"), [BUCKET], 0, desk / "quarantine.jsonl", workers)


def quarantined(desk):
    path = desk / "quarantine.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_folder_that_comes_back_costs_no_clip(desk, monkeypatch):
    before = [clips(desk).get(i, BUCKET).video[0, 0, 0, 0] for i in range(14)]
    (desk / "clips").rename(desk / "away")
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            (desk / "away").rename(desk / "clips")

    monkeypatch.setattr(patience, "sleep", sleep)
    source = clips(desk)
    assert [source.get(i, BUCKET).video[0, 0, 0, 0] for i in range(14)] == before == list(range(14))
    assert slept == list(patience.WAITS[:3]) and quarantined(desk) == []


def test_an_empty_mount_point_ends_the_run_and_costs_no_clip(desk, monkeypatch):
    (desk / "clips").rename(desk / "away")
    (desk / "clips").mkdir()
    slept = []
    monkeypatch.setattr(patience, "sleep", slept.append)
    with pytest.raises(OutageError, match=r"clips/3.png: its disk is away, and was for 16 s"):
        clips(desk).get(3, BUCKET)
    assert slept == list(patience.WAITS) and quarantined(desk) == []


def test_a_file_that_is_gone_is_replaced_and_looked_for_by_the_next_run(desk, monkeypatch):
    monkeypatch.setattr(patience, "sleep", pytest.fail)
    (desk / "clips" / "3.png").rename(desk / "3.png")
    assert clips(desk).get(3, BUCKET).position == 4
    (line,) = quarantined(desk)
    assert line["path"] == "clips/3.png" and line["gone"] is True and "is not there" in line["reason"]
    (desk / "3.png").rename(desk / "clips" / "3.png")
    assert clips(desk).get(3, BUCKET).position == 3


def test_a_folder_that_stays_away_is_waited_for_once(desk, monkeypatch):
    slept = []
    monkeypatch.setattr(patience, "sleep", slept.append)
    entries = list(manifest.read(desk / "clips.jsonl").entries)
    known = {"frames": 1, "fps": Fraction(1), "width": 16, "height": 16}
    entries[2:4] = [ClipEntry(path=f"nowhere/{i}.png", **known) for i in range(2)]
    manifest.write(desk / "clips.jsonl", entries)
    assert clips(desk).get(2, BUCKET).position == 4
    assert slept == list(patience.WAITS)
    assert [line["path"] for line in quarantined(desk)] == ["nowhere/0.png", "nowhere/1.png"]


def test_a_large_share_of_bad_clips_ends_the_run(desk):
    for number in range(11):
        (desk / "clips" / f"{number}.png").write_bytes(b"no picture")
    source = clips(desk)
    for number in range(10):
        source._read(source._manifest.entries[number], _fail)
    with pytest.raises(OutageError, match="11 of 14 clips cannot be read"):
        source.get(10, BUCKET)


def _fail(path):
    raise UserError(f"{path}: bad")


def test_a_bad_file_is_read_twice_and_set_aside(desk, monkeypatch):
    monkeypatch.setattr(patience, "sleep", pytest.fail)
    reads = []

    def read():
        reads.append(1)
        raise UserError("damaged")

    with pytest.raises(UserError, match="damaged"):
        patiently(read, desk / "clips" / "1.png")
    assert len(reads) == 2
    with pytest.raises(GoneError):
        patiently(read, desk / "clips" / "99.png")


def test_what_hangs_is_set_aside(desk):
    """Its process is ended, and another one takes what comes next."""
    workers = Workers(1, seconds=2.0)
    try:
        with pytest.raises(UserError, match="600: not read within 2 s"):
            workers.call(time.sleep, 600)
    finally:
        workers.close()


def test_what_crashes_its_process_is_set_aside(desk):
    workers = Workers(2, seconds=600.0)
    try:
        with pytest.raises(UserError, match="3: the process that read it died"):
            workers.call(os._exit, 3)
        source = clips(desk, workers)
        found = workers.map(lambda i: source.get(i, BUCKET).video[0, 0, 0, 0], range(14))
        assert found == list(range(14))
    finally:
        workers.close()
    assert workers.call(abs, -3) == 3, "it starts again when it is asked"
    workers.close()


def test_first_calls_from_several_threads_share_the_processes(monkeypatch):
    made, pool = [], workers_module._pool

    def slowly(count):
        made.append(pool(count))
        time.sleep(0.3)
        return made[-1]

    monkeypatch.setattr(workers_module, "_pool", slowly)
    workers = Workers(1)
    try:
        assert workers.map(lambda number: workers.call(abs, number), [-1, -2]) == [1, 2]
    finally:
        workers.close()
    assert len(made) == 1


@pytest.mark.parametrize(("count", "threads"), [(0, None), (1, 8), (3, 2), (8, 1), (20, 1)])
def test_each_decodes_in_its_share_of_the_cores(monkeypatch, count, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert Workers(count).threads == threads
