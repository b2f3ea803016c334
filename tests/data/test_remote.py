"""Lists and clips at URLs: as paths, through fsspec and HTTP; what is not there, not allowed or away."""

import json
import threading
from contextlib import contextmanager
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

from kinoflow.configs.errors import UserError
from kinoflow.data import video
from kinoflow.data.__main__ import main
from kinoflow.data.clips import manifest, patience
from kinoflow.data.clips.buckets import parse
from kinoflow.data.clips.fit import Clips, cut, fit
from kinoflow.data.clips.manifest import ClipEntry
from kinoflow.data.clips.patience import OutageError
from kinoflow.data.clips.remote import Url, local, place
from kinoflow.data.clips.workers import Workers

BUCKET = parse("4x16x16@16")


@pytest.fixture
def desk(tmp_path):
    """Three clips of another gray each in a folder, beside their lists; the rows of two say all facts."""
    (tmp_path / "clips").mkdir()
    entries = []
    for number in range(3):
        gray = np.full((16, 16, 16, 3), 40 * (number + 1), np.uint8)
        video.write(tmp_path / "clips" / f"{number} a.mp4", gray, fps=16)
        known = {"frames": 16, "fps": Fraction(16), "width": 16, "height": 16} if number else {}
        entries.append(ClipEntry(path=f"clips/{number} a.mp4", caption=str(number), **known))
    manifest.write(tmp_path / "clips.jsonl", entries)
    manifest.write(tmp_path / "clips.parquet", entries)
    return tmp_path


@contextmanager
def served(folder, broken=None):
    """A web server over a folder; each request is `METHOD path`. `broken` maps a path to what is wrong."""
    asked, broken = [], {} if broken is None else broken

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.partition("?")[0].replace("%20", " ")
            asked.append(f"{self.command} {path}")
            file, wrong = folder / path[1:], broken.get(path)
            if isinstance(wrong, int) or not file.is_file():
                self.send_error(wrong or 404)
                return
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", str(file.stat().st_mtime_ns))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[: 99 if wrong == "cut" else None])

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def memory(desk):
    """The desk in fsspec's memory; its name there."""
    system = fsspec.filesystem("memory")
    system.put(str(desk), "/desk", recursive=True)
    yield "memory://desk"
    system.rm("/desk", recursive=True)


def clips(listing, folder, workers=None, name="quarantine.jsonl"):
    return Clips(listing, [BUCKET], 3, folder / name, workers)


def quarantined(folder):
    path = folder / "quarantine.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def same(one, other, folder):
    for index in range(6):
        ours, theirs = one.get(index, BUCKET), other.get(index, BUCKET)
        assert np.array_equal(ours.video, theirs.video) and ours.caption == theirs.caption == str(index % 3)
    assert quarantined(folder) == []


@pytest.mark.parametrize("name", ["clips.jsonl", "clips.parquet"])
def test_a_list_in_memory_and_its_clips_are_as_on_disk(desk, memory, name):
    listing = manifest.read(f"{memory}/{name}")
    assert str(listing.path) == f"{memory}/{name}"
    assert listing.fingerprint == manifest.read(desk / name).fingerprint
    assert list(manifest.check(listing, decode=True)) == [None] * 3
    same(clips(listing, desk), clips(manifest.read(desk / name), desk), desk)


def test_file_urls_and_a_local_list_of_urls(desk):
    rows = [ClipEntry(path=f"file://{desk}/clips/{i} a.mp4", caption=str(i)) for i in range(3)]
    manifest.write(desk / "urls.jsonl", rows)
    ours, theirs = (clips(manifest.read(desk / name), desk) for name in ("urls.jsonl", "clips.jsonl"))
    same(ours, theirs, desk)
    assert manifest.read(f"file://{desk}/clips.jsonl").resolve(rows[1]) == Url(rows[1].path)


def test_over_http_in_other_processes(desk):
    with served(desk) as (where, asked):
        listing = manifest.read(f"{where}/clips.jsonl?key=7")
        workers = Workers(2)
        try:
            source = clips(listing, desk, workers)
            assert asked.count("GET /clips/0 a.mp4") == 1, "its row does not say what it is"
            assert not [line for line in asked if "/clips/1" in line]
            same(source, clips(manifest.read(desk / "clips.jsonl"), desk), desk)
        finally:
            workers.close()


def test_what_a_path_means_beside_a_list_at_a_url(tmp_path):
    for listed, path, found in (
        ("s3://b/a/l.jsonl", "c/d.mp4", "s3://b/a/c/d.mp4"),
        ("s3://b/a/l.jsonl", "./d.mp4", "s3://b/a/d.mp4"),
        ("http://h/a/l.jsonl?k=/x", "d e.mp4", "http://h/a/d e.mp4"),
        ("http://h/a/l.jsonl", "gs://b/d.mp4", "gs://b/d.mp4"),
        ("http://h/a/l.jsonl", "/d.mp4", "/d.mp4"),
        (str(tmp_path / "l.jsonl"), "http://h/d.mp4", "http://h/d.mp4"),
        (str(tmp_path / "l.jsonl"), "d.mp4", str(tmp_path / "d.mp4")),
    ):
        listing = manifest.Manifest(path=place(listed), entries=(), rows=())
        assert str(listing.resolve(ClipEntry(path=path))) == found
    assert place("c:/a") == Path("c:/a") and place("a://") == Path("a://")
    assert (Url("http://h/a/b.mp4?k=/c").name, Url("HTTPS://h/b").kind) == ("b.mp4", "https")


def test_a_clip_that_is_gone_damaged_or_forbidden_costs_itself(desk, monkeypatch):
    monkeypatch.setattr(patience, "sleep", pytest.fail)
    (desk / "clips" / "0 a.mp4").rename(desk / "away")
    (desk / "clips" / "1 a.mp4").write_bytes(b"no clip")
    with served(desk) as (where, _):
        source = clips(manifest.read(f"{where}/clips.jsonl"), desk)
        assert [source.get(i, BUCKET).caption for i in range(3)] == ["2", "2", "2"]
        gone, bad = quarantined(desk)
        assert gone["gone"] and gone["reason"] == f"{where}/clips/0 a.mp4: is not there"
        assert bad["reason"].startswith(f"{where}/clips/1 a.mp4: not a video that FFmpeg can read")
    (desk / "quarantine.jsonl").unlink()
    (desk / "away").rename(desk / "clips" / "0 a.mp4")
    (desk / "clips" / "1 a.mp4").write_bytes(bytes(200))
    with served(desk, {"/clips/0 a.mp4": 403, "/clips/1 a.mp4": "cut"}) as (where, _):
        source = clips(manifest.read(f"{where}/clips.jsonl"), desk)
        assert [source.get(i, BUCKET).caption for i in range(3)] == ["2", "2", "2"]
        reasons = [line["reason"] for line in quarantined(desk)]
        assert reasons[0].startswith(
            f"{where}/clips/0 a.mp4: cannot be fetched (403 Forbidden); check the URL"
        )
        assert "/clips/1 a.mp4: cannot be fetched (99 of 200 bytes came)" in reasons[1]


def test_a_server_that_comes_back_costs_no_clip_and_one_that_does_not_ends_the_run(desk, monkeypatch):
    wrong, slept = {}, []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 2:
            wrong.clear()

    monkeypatch.setattr(patience, "sleep", sleep)
    with served(desk, wrong) as (where, _):
        source = clips(manifest.read(f"{where}/clips.jsonl"), desk)
        wrong["/clips/1 a.mp4"] = 503
        assert source.get(1, BUCKET).caption == "1"
        assert slept == list(patience.WAITS[:2])
    with pytest.raises(OutageError, match=r"/clips/1 a.mp4: its server does not answer, nor did it for 16 s"):
        source.get(1, BUCKET)
    assert quarantined(desk) == []


def test_a_stamp_follows_what_lies_there(desk, memory):
    listing = manifest.read(f"{memory}/clips.jsonl")
    source = clips(listing, desk)
    before = source.stamp(1, BUCKET)
    assert before == source.get(1, BUCKET).stamp == source.stamp(1, BUCKET)
    fsspec.filesystem("memory").put_file(str(desk / "clips" / "2 a.mp4"), "/desk/clips/1 a.mp4")
    assert source.stamp(1, BUCKET) != before


def test_copies_do_not_stay(desk, memory, tmp_path, monkeypatch):
    kept = tmp_path / "tmp"
    kept.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(kept))
    with local(Url(f"{memory}/clips/0 a.mp4")) as path:
        assert path.name == "0 a.mp4" and path.is_relative_to(kept)
    cut(Url(f"{memory}/clips/0 a.mp4"), BUCKET, 3, 0, fit)
    with pytest.raises(UserError, match=rf"^{memory}/nothing.mp4: cannot be fetched \(there is nothing\)"):
        cut(Url(f"{memory}/nothing.mp4"), BUCKET, 3, 0, fit)
    assert list(kept.iterdir()) == []


def test_what_is_not_installed_or_known_is_told_before_the_first_clip(desk, capsys):
    for url, line in (
        ("s3://bucket/0.mp4", r"s3://bucket/0.mp4: cannot be read without another package; pip install s3fs"),
        ("gs://bucket/0.mp4", r"gs://bucket/0.mp4: .*; pip install gcsfs"),
        (
            "what://bucket/0.mp4",
            r"what://bucket/0.mp4: is no URL that fsspec knows \(Protocol not known: what",
        ),
    ):
        known = {"frames": 16, "fps": Fraction(16), "width": 16, "height": 16}
        manifest.write(desk / "urls.jsonl", [ClipEntry(path=url, **known)])
        with pytest.raises(UserError, match=f"^{line}"):
            clips(manifest.read(desk / "urls.jsonl"), desk)
    assert quarantined(desk) == []
    assert main(["info", "s3://bucket/clips.jsonl"]) == 2
    assert "pip install s3fs" in capsys.readouterr().err


def test_commands_take_urls(desk, memory, capsys):
    assert main(["check", f"{memory}/clips.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"] == f"{memory}/clips.jsonl"
    assert main(["info", f"{memory}/clips.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["clips"] == 3
