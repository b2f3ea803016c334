"""The server as a process: killed, stopped, refused."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from kinoflow.__main__ import main
from kinoflow.configs.errors import UserError
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.serve.command import listening
from tests.sample.serve.fake import FORM, until

ROOT = Path(__file__).parents[3]


class Process:
    """A server with a fake maker, which makes clips once there is a file beside its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.gate = folder / "serve", folder / "go"
        words = [sys.executable, "-m", "tests.sample.serve.fake", str(self.folder), str(self.gate)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().partition("  ")[0]

    def ask(self, path: str, values: Any = None) -> Any:
        body = None if values is None else json.dumps(values).encode()
        request = urllib.request.Request(
            self.address + path, body, {"Content-Type": "application/json", "Connection": "close"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def video(self, id: str) -> dict[str, Any]:
        return self.ask(f"/v1/videos/{id}")

    def end(self, number: int) -> tuple[int, str]:
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=120)
        return self.process.returncode, said


@pytest.fixture
def start(tmp_path):
    started = []

    def starting() -> Process:
        started.append(Process(tmp_path))
        return started[-1]

    yield starting
    for server in started:
        server.process.kill()
        server.process.communicate()


def test_a_killed_server_loses_nothing_and_a_stopped_one_neither(start):
    server = start()
    ids = [server.ask("/v1/videos", FORM | {"seed": seed})["id"] for seed in range(2)]
    until(lambda: server.video(ids[0])["status"] == "in_progress")
    (server.folder / "clips" / f".{ids[0]}.1-ab.mp4").write_text("half of a clip")
    assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL

    server = start()
    until(lambda: server.video(ids[0])["status"] == "in_progress")
    for number in (signal.SIGTERM, signal.SIGINT):
        assert server.end(number) == (0, "")
        server = start()
        until(lambda server=server: server.video(ids[0])["status"] == "in_progress")
    server.gate.touch()
    for id in ids:
        until(lambda id=id: server.video(id)["status"] == "completed")
    assert sorted(path.stem for path in (server.folder / "clips").iterdir()) == sorted(ids)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "host: others reach 0.0.0.0; give a token to ask them for with --token-file"),
        (["--token-file", "nowhere"], "nowhere: no such file or folder"),
        (["--token-file", "short"], "short: no token of 16 characters or more; write one with: openssl"),
        (["--token-file", "two"], "two: no token of 16 characters"),
        (["--token-file", "foreign"], "foreign: a token is ASCII"),
        (["--queue", "0"], "queue: 0; use 1 or more"),
        (["--port", "70000"], "port: 70000 is not in 0 .. 65535; choose another"),
        (["--host", "x" * 70, "--token-file", "long"], "use 127.0.0.1, or an address of this machine"),
        (["--weights", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_a_mistake_at_the_start_is_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    for name, text in (
        ("short", "abc"),
        ("two", "12345678 12345678"),
        ("long", "x" * 40),
        ("foreign", "ü" * 20),
    ):
        Path(name).write_text(text, encoding="utf-8")
    assert main(["sample", "serve", "--port", "0", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_port_that_is_taken_is_one_line(capsys):
    with listening("127.0.0.1", 0) as taken:
        assert main(["sample", "serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "already in use; choose another with --port" in capsys.readouterr().err


def test_a_release_is_served_with_its_adapters(monkeypatch, tmp_path, capsys):
    asked = {}

    def opened(source, **more):
        asked.update(more, source=source)
        raise UserError("opened")

    monkeypatch.setattr(Pipeline, "from_pretrained", opened)
    words = ["--weights", "mini", "--lora", "eight", "--lora", "own:0.5", "--folder", str(tmp_path), "--port"]
    assert main(["sample", "serve", *words, "0"]) == 2
    assert "opened" in capsys.readouterr().err
    assert (asked["source"], asked["lora"]) == ("mini", ["eight", "own:0.5"])
