"""Killed at moments nobody chose, the command goes on and leaves what it leaves undisturbed, no row twice."""

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.engine.planting import shot, write
from tests.data.engine.test_pools import begin, table
from tests.data.making import real_clip

pytest.importorskip("cv2")
pytestmark = pytest.mark.slow
KILLS = 3


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough to do that a moment of the work is a moment of work: 21 pieces."""
    folder = tmp_path_factory.mktemp("raw")
    for number in range(6):
        for name in ("bikes", "bigbuckbunny"):
            (folder / f"{name}_{number}.mp4").symlink_to(real_clip(f"{name}.mp4"))
    write(folder / "car.mp4", shot("car"))
    (folder / "bad.mp4").write_bytes(b"nothing")
    return folder


def first_file(run: subprocess.Popen, out: Path) -> None:
    """Wait for it, or for the end of the command."""
    while run.poll() is None and not any(path.is_file() for path in out.rglob("*")):
        time.sleep(0.005)


def left(out: Path) -> tuple[list[dict], str, str]:
    """Table, manifest and ledger."""
    return table(out), *((out / name).read_text() for name in ("manifest.jsonl", "ledger.jsonl"))


@pytest.mark.parametrize("words", [("--workers", "2"), ("--ray", "local", "--workers", "2")])
def test_random_kills_change_nothing(raw: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    """The moments are drawn over the time from the first file to the end of an undisturbed command."""
    if "--ray" in words:
        pytest.importorskip("ray")
    calm, out, rng = tmp_path / "calm", tmp_path / "killed", np.random.default_rng(len(words))
    run = begin(raw, calm, *words)
    first_file(run, calm)
    started = time.perf_counter()
    said = run.communicate()[0].decode()
    assert run.returncode == 0, said
    lasts, alive, before = time.perf_counter() - started, [], 0
    for share in rng.uniform(0, 1 / KILLS, KILLS):
        run = begin(raw, out, *words)
        if before == 0:
            first_file(run, out)
        else:
            while run.poll() is None and len([*out.rglob("*.parquet")]) <= before:
                time.sleep(0.005)
        time.sleep(share * lasts)
        alive.append(run.poll() is None)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        before = len([*out.rglob("*.parquet")])
    run = begin(raw, out, *words)
    said = run.communicate()[0].decode()
    assert run.returncode == 0, said
    print(f"{sum(alive)} of {KILLS} kills found the command at work, which lasts {lasts:.1f} s")
    assert left(out) == left(calm)
    rows = [(row["path"], row["first_frame"]) for row in table(out)]
    assert len(set(rows)) == len(rows) > 20
