"""One door for every command: a user's mistake is one line and 2, a signal leaves nothing behind."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kinoflow.__main__ import main
from kinoflow.configs.errors import UserError, run
from kinoflow.configs.files import replacing, replacing_folder, seeded, write_json
from kinoflow.data import video
from tests.data.making import gradient

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
Command = Callable[[Path], list[str]]
TINY_LATENTS = (
    "source=world",
    "buckets=[1x32x32@16]",
    "clips=2",
    "shard_size=1",
    "workers=0",
    "batch_size=1",
    "release=sample/mini",
)


def status(command: Callable[[], int]) -> int:
    """The exit status that the shell would see."""
    try:
        return run(command, "kinoflow x")
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("steps: 0\nis too small"), "kinoflow x: steps: 0 is too small"),
        (OSError(28, "No space left on device", "/a/b.mp4"), "kinoflow x: /a/b.mp4: the disk is full"),
        (PermissionError(13, "Permission denied", "/a"), "kinoflow x: /a: permission denied"),
        (ModuleNotFoundError("no", name="deepspeed.ops"), 'pip install "kinoflow[train]"'),
        (ModuleNotFoundError("no", name="torchmetrics"), 'pip install "kinoflow[eval]"'),
        (ModuleNotFoundError("no", name="unheard_of"), "pip install unheard_of"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_two(error, line, capsys):
    assert status(raising(error)) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        ValueError("ours"),
        KeyError("k"),
        OSError("no number"),
        OSError(9, "Bad file descriptor"),
        RuntimeError("torch"),
        ModuleNotFoundError("no", name="kinoflow.data.x"),
    ],
)
def test_our_own_bugs_show_their_traceback(error):
    with pytest.raises(type(error)):
        run(raising(error), "kinoflow x")


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("aside", [replacing, replacing_folder])
def test_a_signal_cleans_up(tmp_path, number, aside):
    def command() -> int:
        with aside(tmp_path / "out"):
            os.kill(os.getpid(), number)
            signal.pause()
        return 0

    before = signal.getsignal(signal.SIGTERM)
    assert status(command) == SIGNALS[number]
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    "error",
    [RecursionError("maximum depth"), ModuleNotFoundError("no", name="zarr"), UserError("a.kino: damaged")],
)
def test_an_interrupt_that_an_import_swallowed_is_still_one_line(capsys, error):
    """As NumPy does: its half-imported module fails with something else later."""

    def command() -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
        except BaseException:
            pass
        raise error

    before = signal.getsignal(signal.SIGINT)
    assert status(lambda: run(command, "kinoflow x y")) == 130
    said = capsys.readouterr().err
    assert said == "kinoflow x y: interrupted; nothing is left half written\n"
    assert status(raising(UserError("another command"))) == 2
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("words", [["-m", "kinoflow"], ["-m", "kinoflow.train"]])
def test_the_door_is_open_before_anything_heavy_is_imported(words):
    """An interrupt in the seconds of those imports meets it."""
    code = (
        "import runpy, sys\nfrom kinoflow.configs import errors\n"
        "heavy = {'torch', 'numpy', 'yaml'}\nerrors.run = lambda *_: print(heavy & sys.modules.keys())\n"
        f"sys.argv = ['x', 'x']\ntry: runpy.run_module({words[1]!r}, run_name='__main__')\n"
        "except SystemExit: pass"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_what_is_replaced_is_whole_or_as_before(tmp_path):
    file, folder = tmp_path / "a.json", tmp_path / "folder"
    write_json(file, {"old": 1})
    with replacing_folder(folder) as aside:
        (aside / "old").touch()
    for target in (file, folder):
        aside_of = replacing_folder if target is folder else replacing
        with pytest.raises(RuntimeError), aside_of(target):
            raise RuntimeError
    assert json.loads(file.read_text()) == {"old": 1}
    with replacing_folder(folder) as aside:
        (aside / "new").touch()
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "folder"]
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_seeds_are_apart_and_for_ever():
    assert seeded("noise", 0, 1) == 1494093887166788459
    keys = [("a", i, j) for i in range(40) for j in range(40)] + [("b", 0, 0), ("a0", 0), ("a", 0, "0\ud800")]
    seeds = [seeded(*key) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.fixture(scope="module")
def supplies(tmp_path_factory) -> Path:
    """A clip, a picture and a latent file."""
    folder = tmp_path_factory.mktemp("supplies")
    video.write(folder / "clip.mp4", gradient(9), fps=16)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "picture.png")
    assert main(["tae", "encode", f"{folder}/clip.mp4", f"{folder}/clip.kino"]) == 0
    return folder


@pytest.fixture
def desk(tmp_path, monkeypatch, supplies) -> Path:
    """A folder with something for every command, beside the repository's own shipped release."""
    monkeypatch.chdir(tmp_path)
    root = Path(__file__).parents[1]
    for place in (root / "sample", root / "configs", *supplies.iterdir()):
        (tmp_path / place.name).symlink_to(place)
    return tmp_path


WRITERS: dict[str, Command] = {
    "sample": lambda out: ["sample", "a red star", "--steps", "1", "--frames", "1", "--out", f"{out}/a.png"],
    "evaluate": lambda out: [
        "sample", "evaluate", "--prompts", "2", "--steps", "1", "--sheet", f"{out}/a.png",
    ],
    "encode": lambda out: ["tae", "encode", "clip.mp4", f"{out}/a.kino"],
    "encode zarr": lambda out: ["tae", "encode", "clip.mp4", f"{out}/a.zarr"],
    "decode": lambda out: ["tae", "decode", "clip.kino", f"{out}/a.mp4"],
    "reconstruct": lambda out: [
        "tae", "reconstruct", "clip.mp4", f"{out}/a.mp4", "--report", f"{out}/a.html", "--perceptual", "0",
    ],
    "world": lambda out: ["data", "world", str(out), "--clips", "2", "--bucket", "4x32x32@16"],
    "cut": lambda out: ["data", "cut", "clip.mp4", "picture.png", str(out), "--frames", "5", "--side", "32"],
    "precompute": lambda out: ["train", "precompute", f"out={out}", *TINY_LATENTS],
}  # fmt: skip


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("name", WRITERS)
def test_a_signal_leaves_nothing_half_written(desk, monkeypatch, capsys, name, number):
    """The signal comes when the first file, complete and hidden, is about to get its name."""
    out, rename = desk / "out", Path.replace
    out.mkdir()

    def interrupted(path: Path, target: Path) -> Path:
        if path.is_relative_to(out):
            os.kill(os.getpid(), number)
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    monkeypatch.setattr(Path, "rename", interrupted)
    try:
        code = main(WRITERS[name](out))
    except SystemExit as stop:
        code = stop.code
    assert code == SIGNALS[number]
    assert [path for path in out.rglob("*") if path.is_file()] == []
    assert [path for path in out.rglob(".*")] == []


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        *(([command, "--help"], 0) for command in ("sample", "tae", "train", "data")),
        (["train", "precompute", "--help"], 0),
        (["train", "plan", "configs/models/dit_mini.yaml", "data.buckets=[8x64x64@16]"], 0),
        (["sample", "★ ein roter Stern, “schön” ─ 星", "--steps", "1", "--frames", "1"], 0),
        (["sample", "a star", "--size", "1x星"], 2),
        (["tae", "info", "clip.mp4"], 0),
        (["tae", "reconstruct", "clip.mp4", "─★.mp4", "--perceptual", "0"], 0),
        (["tae", "encode", "星★.mp4", "a.kino"], 2),
        (["data", "world", "─★", "--clips", "1", "--bucket", "1x32x32@16"], 0),
        (["train", "steps=★", "run=─"], 2),
        (["sample", "★", "--steps", "1", "--frames", "1", "--json"], 0),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_every_terminals_encoding_will_do(desk, monkeypatch, words, code):
    """A Windows console knows a few hundred characters: what it lacks is replaced, and nothing stops."""
    raw = {"stdout": io.BytesIO(), "stderr": io.BytesIO()}
    for name, buffer in raw.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(buffer, encoding="cp1252", errors="strict"))
    try:
        found = main(words)
    except SystemExit as stop:
        found = stop.code
    sys.stdout.flush(), sys.stderr.flush()
    said = {name: buffer.getvalue().decode("cp1252") for name, buffer in raw.items()}
    assert found == code, said
    if "--json" in words:
        assert json.loads(said["stdout"])["clips"][0]["prompt"] == "★"
    if code == 2:
        assert said["stderr"].count("\n") >= 1
        assert "Traceback" not in said["stderr"]
