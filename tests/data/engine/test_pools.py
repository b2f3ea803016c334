"""Whoever does the work, and however often it is killed, the table is the same; a bad file costs one row."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kinoflow.configs.errors import UserError
from kinoflow.data.__main__ import main
from kinoflow.data.engine import curate, selection
from kinoflow.data.engine.pools import Call, LocalPool, RayPool
from tests.data.engine import calls
from tests.data.engine.planting import shot, write
from tests.data.making import real_clip

pytest.importorskip("cv2")
ROOT = Path(__file__).parents[3]
KEYS = ["--config", "scan.text=none", "scan.range_seconds=5"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos in five pieces, and one that is none."""
    folder = tmp_path_factory.mktemp("raw")
    for name in ("bikes.mp4", "bigbuckbunny.mp4"):
        (folder / name).symlink_to(real_clip(name))
    write(folder / "car.mp4", shot("car"))
    (folder / "bad.mp4").write_bytes(b"nothing")
    return folder


@pytest.fixture(scope="module")
def wanted(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("wanted")
    assert main(["curate", str(raw), str(out), "--workers", "0", *KEYS]) == 0
    found = table(out)
    assert sum(row["error"] is not None for row in found) == 1 and len(found) > 6
    return found


def table(out: Path) -> list[dict]:
    return selection.read_scores(out).to_pylist()


def begin(raw: Path, out: Path, *more: str) -> subprocess.Popen:
    words = [sys.executable, "-m", "kinoflow", "data", "curate", str(raw), str(out), *more, *KEYS]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_processes_give_the_same_table(raw: Path, wanted: list[dict], tmp_path: Path) -> None:
    run = begin(raw, tmp_path, "--workers", "2")
    said = run.communicate()[0].decode()
    assert run.returncode == 0, said
    assert table(tmp_path) == wanted


def test_a_killed_command_goes_on(raw: Path, wanted: list[dict], tmp_path: Path) -> None:
    """Killed when it has probed, when it has looked at one piece, and at four."""
    for pattern, count in (("frames/*/facts.json", 1), ("frames/*/*.parquet", 1), ("frames/*/*.parquet", 4)):
        run = begin(raw, tmp_path, "--workers", "1")
        while run.poll() is None and len(list(tmp_path.glob(pattern))) < count:
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
        run.communicate()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("frames/*/0*.parquet")}
    assert before
    assert main(["curate", str(raw), str(tmp_path), "--workers", "0", *KEYS]) == 0
    assert table(tmp_path) == wanted
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was there is not made again"


def test_a_cluster_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def init(**_: object) -> None:
        raise Exception("The current node timed out\nduring startup.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(
        UserError, match=r"^ray: local did not start \(.*timed out during startup.*run it again"
    ):
        RayPool("local", 2, 60.0)
    with pytest.raises(UserError, match=r"^ray: 10\.0\.0\.1:6379 did not start .*see that `ray status`"):
        RayPool("10.0.0.1:6379", 2, 60.0)


def test_ray_gives_the_same_table(raw: Path, wanted: list[dict], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    run = begin(raw, tmp_path, "--ray", "local", "--workers", "2")
    said = run.communicate()[0].decode()
    assert run.returncode == 0, said
    assert table(tmp_path) == wanted


@pytest.fixture
def pool() -> Iterator[LocalPool]:
    pool = LocalPool(1, seconds=2.0)
    yield pool
    pool.close()


def test_what_hangs_or_dies_costs_only_itself(pool: LocalPool) -> None:
    names = ["answer", "hang", "die", "refuse", "answer"]
    todo = (
        Call(key=at, function=getattr(calls, name), arguments=(f"{name}.mp4",))
        for at, name in enumerate(names)
    )
    found = dict(pool.run(todo))
    assert found[0] == found[4] == "ANSWER.MP4"
    assert str(found[1]) == "hang.mp4: not read within 2 s"
    assert "die.mp4: the process that read it died" in str(found[2])
    assert str(found[3]) == "refuse.mp4: is bad" and isinstance(found[3], UserError)


def test_what_failed_is_tried_again_when_asked(
    raw: Path, wanted: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a piece that could not be looked at, the table says which frames are lost."""
    real, failing = curate.scan_to, "000000125.parquet"

    def fails(path: str, span: range, out: Path, config: object) -> str:
        if out.name == failing and "bikes" in path:
            raise UserError(f"{path}: not read within 600 s")
        return real(path, span, out, config)

    words = ["curate", str(raw), str(tmp_path), "--workers", "0", *KEYS]
    monkeypatch.setattr(curate, "scan_to", fails)
    assert main(words) == 0
    lost = [row for row in table(tmp_path) if row["error"] and "bikes" in row["path"]]
    assert [(row["first_frame"], row["frames"], row["damaged"]) for row in lost] == [(125, 125, 1.0)]
    monkeypatch.setattr(curate, "scan_to", real)
    assert main(words) == 0
    assert len([row for row in table(tmp_path) if row["error"]]) == 2, "not by itself"
    assert main([*words, "--retry"]) == 0
    assert table(tmp_path) == wanted


@pytest.mark.slow
def test_two_nodes_of_a_cluster_give_the_same_table(raw: Path, wanted: list[dict], tmp_path: Path) -> None:
    """One worker each, on this machine."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    nodes = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=nodes)
    try:
        cluster.add_node(**{key: nodes[key] for key in ("num_cpus", "object_store_memory")})
        cluster.wait_for_nodes()
        run = begin(raw, tmp_path, "--ray", cluster.address)
        said = run.communicate()[0].decode()
    finally:
        cluster.shutdown()
    assert run.returncode == 0, said
    assert table(tmp_path) == wanted
