"""Captions: what a server or a model is asked, that each shot is asked about once, and what goes wrong."""

import base64
import io
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kinoflow.configs.errors import UserError
from kinoflow.data.__main__ import main
from kinoflow.data.clips import manifest
from kinoflow.data.engine import captioners, captioning, kept
from kinoflow.data.engine.captioners import plain
from tests.data.engine.planting import shot, write

pytest.importorskip("cv2")
KEYS = ["scan.text=none", "select.sharpness=null", "select.motion=null", "select.shake=null"]
NAMES = ("car", "crossing", "rabbit", "street")


class Server(ThreadingHTTPServer):
    """It answers with what `answer` makes of a request, a text or (status, body)."""

    asked: list[dict[str, Any]]
    answer: Any

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._reply(200, {"data": [{"id": "eye"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        given = self.server.answer(body)
        if isinstance(given, str):
            given = 200, {"choices": [{"message": {"content": given}, "finish_reason": "stop"}]}
        self._reply(*given)

    def _reply(self, status: int, body: Any) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(captioners, "_WAITS", (0.0, 0.0))
    with Server(("127.0.0.1", 0), Handler) as server:
        server.asked, server.answer = [], lambda _: "A  thing\nmoves."
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name in NAMES:
        write(folder / f"{name}.mp4", shot(name))
    (folder / "car.txt").write_text("a man in a car")
    return folder


@pytest.fixture
def out(videos: Path, tmp_path: Path) -> Path:
    """A folder as curate leaves it: four kept shots, one of which somebody described."""
    shutil.copytree(videos, tmp_path, dirs_exist_ok=True)
    facts = {"begin": "0", "end": "2", "camera": "pan left"}
    manifest.write(tmp_path / "out" / "manifest.jsonl", [
        manifest.ClipEntry(
            path=str(tmp_path / f"{name}.mp4"), caption="a man in a car" if name == "car" else "",
            first_frame=4, frames=40,
            extra=facts | ({"camera": "still"} if name == "street" else {}),
        )
        for name in NAMES
    ])  # fmt: skip
    return tmp_path / "out"


def caption(out: Path, model: str, *more: str) -> int:
    return main(["caption", str(out), "--model", model, "--workers", "0", "--requests", "1", *more])


def entries(out: Path) -> dict[str, manifest.ClipEntry]:
    return {Path(entry.path).stem: entry for entry in manifest.read(out / "manifest.jsonl").entries}


def ledger(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "captions" / "ledger.jsonl").read_text().splitlines()]


def test_a_server_sees_even_frames_and_the_list_gets_what_it_says(out: Path, server: Server) -> None:
    assert caption(out, server.address, "--frames", "3", "--side", "64") == 0
    found = entries(out)
    assert found["car"].caption == "a man in a car" and captioning.BY not in found["car"].extra
    for name in NAMES[1:]:
        begin = "Still camera" if name == "street" else "Pan left"
        assert found[name].caption == f"{begin}. A thing moves."
        assert found[name].extra[captioning.BY] == "eye"
    assert len(server.asked) == 3
    for name, body in zip(NAMES[1:], server.asked, strict=True):
        (message,) = body["messages"]
        *shown, text = message["content"]
        assert body["model"] == "eye" and text == {"type": "text", "text": captioning.PROMPT}
        frames = [small(Image.fromarray(frame)) for frame in shot(name)]
        wanted = kept.sampled(found[name], 3)
        for part, index in zip(shown, wanted, strict=True):
            kind, _, data = part["image_url"]["url"].partition(",")
            picture = Image.open(io.BytesIO(base64.b64decode(data)))
            assert (kind, picture.format, picture.size) == ("data:image/jpeg;base64", "JPEG", (64, 36))
            off = [np.abs(frame - small(picture)).mean() for frame in frames]
            assert abs(int(np.argmin(off)) - index) <= 1, "that frame"


def small(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L").resize((64, 36), Image.Resampling.BOX), np.float32)


def test_frames_are_the_middles_of_equal_parts() -> None:
    def at(first: int, frames: int, count: int) -> list[int]:
        return kept.sampled(manifest.ClipEntry(path="a", first_frame=first, frames=frames), count)

    assert at(100, 10, 2) == [102, 107]
    assert at(7, 3, 8) == [7, 8, 9]
    assert at(0, 9, 1) == [4]


def test_a_shot_is_asked_about_once_and_anew_when_anything_changed(out: Path, server: Server) -> None:
    assert caption(out, server.address) == caption(out, server.address) == 0
    assert len(server.asked) == 3
    (out / "prompt.txt").write_text("Name it.")
    server.answer = lambda _: "A name."
    assert caption(out, server.address, "--prompt", str(out / "prompt.txt")) == 0
    assert len(server.asked) == 6 and server.asked[-1]["messages"][0]["content"][-1]["text"] == "Name it."
    assert entries(out)["street"].caption.endswith("A name.")
    assert caption(out, server.address) == 0 and len(server.asked) == 6
    assert entries(out)["street"].caption.endswith("A thing moves."), "the former ones are there"
    assert caption(out, server.address + "#other") == 0 and len(server.asked) == 9
    write(Path(entries(out)["street"].path), shot("street")[:, ::-1])
    assert caption(out, server.address + "#other") == 0 and len(server.asked) == 10
    assert caption(out, server.address + "#other", "--all") == 0 and len(server.asked) == 11
    assert entries(out)["car"].caption.endswith("A name.")


def test_choosing_anew_keeps_the_captions_and_a_new_video_loses_them(
    videos: Path, tmp_path: Path, server: Server
) -> None:
    for name in ("car", "street"):
        shutil.copy(videos / f"{name}.mp4", tmp_path)
    shutil.copy(videos / "car.txt", tmp_path)
    out, changed = tmp_path / "out", tmp_path / "street.mp4"
    curate = ["curate", str(tmp_path), str(out), "--workers", "0", "--config", *KEYS]
    assert main(curate) == 0
    assert caption(out, server.address) == 0
    before = entries(out)
    assert before["street"].caption.endswith(". A thing moves.")
    assert main(["select", str(out), "--config", "select.seconds=:2.1"]) == 0
    assert entries(out) == {"street": before["street"]}
    assert main(["select", str(out), "--config", "select.seconds=null"]) == 0
    assert entries(out) == before
    write(changed, shot("street")[:, ::-1])
    assert main(curate) == 0
    assert entries(out)["street"].caption == "" and entries(out)["car"] == before["car"]
    assert caption(out, server.address) == 0 and len(server.asked) == 2


def test_what_was_said_before_it_was_killed_is_not_asked_again(out: Path, server: Server) -> None:
    class Killed(BaseException):
        pass

    def shown(items: Any, *_: Any) -> Any:
        for index, item in enumerate(items):
            yield item
            if index == 1:
                raise Killed

    class Model:
        name = key = "m"
        calls = 0

        def __call__(self, prompt: str, pictures: list[bytes]) -> str:
            self.calls += 1
            return f"It is {len(pictures)}."

    model, asking = Model(), captioning.Asking(requests=1)
    workers = captioning.Workers(0)
    listing = out / "manifest.jsonl"
    with pytest.raises(Killed):
        captioning.caption(listing, model, asking, workers=workers, show=shown)
    assert entries(out)["rabbit"].caption == "", "the list is written at the end"
    before, file = model.calls, next((out / "captions").glob("*-*.jsonl"))
    whole = file.read_text()
    told = captioning.caption(listing, model, asking, workers=workers, show=lambda items, *_: items)
    assert (told.asked, told.cached, told.without) == (1, 2, 0)
    assert before <= model.calls <= 4 and entries(out)["rabbit"].caption.endswith("It is 8.")
    file.write_text(whole[: len(whole) // 2])
    told = captioning.caption(listing, model, asking, workers=workers, show=lambda items, *_: items)
    assert told.asked == 1, "a damaged line alone"


def test_a_bad_shot_costs_one_line(out: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter(["", "Good.", (503, "busy"), (429, "busy"), "Late."])
    server.answer = lambda _: next(answers)
    street = Path(entries(out)["street"].path)
    capsys.readouterr()
    assert caption(out, server.address, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["asked"], told["failed"], told["without"]) == (3, 1, 1)
    (line,) = ledger(out)
    assert (Path(line["path"]).stem, line["model"], line["begin"]) == ("crossing", "eye", "0")
    assert "eye says nothing of it" in line["reason"]
    assert entries(out)["crossing"].caption == "" and entries(out)["street"].caption.endswith("Late.")
    street.unlink()
    server.answer = lambda _: "Now."
    assert caption(out, server.address) == 1, "a video that is gone"
    assert Path(ledger(out)[0]["path"]).stem == "street" and len(ledger(out)) == 1
    assert entries(out)["crossing"].caption.endswith("Now.")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((503, "busy"), "503"),
        ((404, "no eye"), '404 "no eye"; see that it serves that model'),
        ((401, "who"), "set OPENAI_API_KEY"),
        ((200, {"choices": []}), "no answer of OpenAI's protocol"),
        ((200, {"choices": [{"message": {"content": 7}}]}), "no answer of OpenAI's protocol"),
        ((200, {"choices": [{"message": {"content": "A man who"}, "finish_reason": "length"}]}), "no end"),
    ],
)
def test_a_server_that_fails_leaves_the_list_alone(
    out: Path, server: Server, capsys: pytest.CaptureFixture[str], answer: Any, why: str
) -> None:
    assert caption(out, server.address) == 0
    before = entries(out)
    server.answer = lambda _: answer
    assert caption(out, server.address + "#other") == 2
    said = capsys.readouterr().err
    assert why in said and "the same command goes on" in said and said.count("\n") == 1
    assert entries(out) == before and len(ledger(out)) == 3


def test_twenty_failures_in_a_row_end_it(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        name = key = "m"

        def __call__(self, prompt: str, pictures: list[bytes]) -> str:
            raise UserError("it is away")

    monkeypatch.setattr(kept, "MOST_FAILURES", 2)
    with pytest.raises(UserError, match="2 clips have no caption, the last because it is away"):
        captioning.caption(
            out / "manifest.jsonl", Model(), captioning.Asking(requests=1),
            workers=captioning.Workers(0), show=lambda items, *_: items,
        )  # fmt: skip
    assert len(ledger(out)) == 2


def test_no_server_no_folder_and_no_prompt_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captioners, "_WAITS", (0.0,))
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "manifest.jsonl").write_text('{"path": "a.mp4", "first_frame": 0, "frames": 3}\n')
    for words, why in [
        (["--model", "http://127.0.0.1:1/v1"], "cannot be asked"),
        (["--model", "http://[/v1"], "Invalid IPv6 URL; write http://HOST"),
        (["--model", str(tmp_path / "gone")], "no such folder"),
        (["--model", str(tmp_path / "empty")], "holds no model of pictures"),
        (["--model", "x/y", "--prompt", str(tmp_path / "blank.txt")], "--prompt: is empty"),
        (["--model", "x/y", "--prompt", str(tmp_path / "none.txt")], "none.txt"),
        (["--model", "x/y", "--frames", "0"], "--frames: 0; use 1 to 256"),
    ]:
        assert main(["caption", str(tmp_path), *words]) == 2
        said = capsys.readouterr().err
        assert why in said and said.count("\n") == 1
    assert main(["caption", str(tmp_path / "empty"), "--model", "x/y"]) == 2
    assert "run kinoflow data curate SOURCE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "whole", "caption"),
    [
        (" A cat.\n\nIt sits. ", True, "A cat. It sits."),
        ("<think>hm\n</think>A cat.", True, "A cat."),
        ('"A cat."', True, "A cat."),
        ('A sign reads "KITE".', True, 'A sign reads "KITE".'),
        ("A cat. It is 3.5 m lo", False, "A cat."),
        ("A cat \ud83d sits.", True, "A cat ? sits."),
    ],
)
def test_an_answer_is_one_line_of_whole_sentences(text: str, whole: bool, caption: str) -> None:
    assert plain(text, whole=whole, name="m") == caption
