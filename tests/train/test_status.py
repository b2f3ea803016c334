"""`kinoflow train status` of a run that is done, one that runs, one that stopped, and none."""

import json
import os
import signal
import time

import pytest

from kinoflow.train.__main__ import main
from kinoflow.train.run.status import plot, status

COMMON = ["steps=12", "log_every=2", "checkpoint_every=4", "optimizer.lr=0.02", "seed=3"]


def test_of_a_finished_run(start_job, tmp_path, capsys):
    job = start_job("toy", [*COMMON, f"run={tmp_path}"], False, 0.0, 23, (5,))
    assert job.wait() == [0], job.text()
    assert main(["status", str(tmp_path)]) == 0
    first, loss, last, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path}: finished, step 12 of 12, ") and first.endswith(" ago")
    assert loss.startswith("loss  ") and len(loss.split()[1]) == 6 and last.startswith("last  ")
    assert "data_wait" in last and "skipped 0" in last
    assert rest[0] == "checkpoints  8, 12"
    assert rest[1].startswith("event  step 6: a loss is no finite number") and len(rest) == 3
    assert rest[2] == f"next  kinoflow train export {tmp_path} RELEASE"
    assert main(["status", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["events"] == {"skipped": 1} and len(found["losses"]) == 6
    told = {12: [], 8: []}
    for step in told:
        os.truncate(tmp_path / "checkpoints" / f"{step:08d}" / "rest.safetensors", 3)
        assert main(["status", str(tmp_path)]) == 0
        told[step] = capsys.readouterr().out.splitlines()
    assert "checkpoints  8" in told[12] and any(
        line.startswith("broken  checkpoint 12: rest.safetensors has 3 of ") for line in told[12]
    )
    assert told[12][-1] == "next  the command that began it goes on from step 8, 4 steps again"
    assert "checkpoints  none yet" in told[8] and told[8][-1].startswith("next  no checkpoint is whole")


def test_of_a_run_that_runs_and_then_was_stopped(start_job, tmp_path, capsys):
    sources = [*COMMON, "steps=100000", "patience=4", f"run={tmp_path}"]
    job = start_job("toy", sources, False, 0.02)
    deadline = time.monotonic() + 900
    while not (tmp_path / "beats" / "0.json").exists():
        assert time.monotonic() < deadline and job.processes[0].is_alive(), job.text()
        time.sleep(0.05)
    found = status(tmp_path)
    assert found["state"] == "running" and found["by"].startswith(f"process {job.processes[0].pid} on")
    assert found["processes"][0]["rank"] == 0 and found["seconds_left"] > 0
    os.kill(job.processes[0].pid, signal.SIGKILL)
    job.wait()
    assert main(["status", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    newest = max((int(path.name) for path in (tmp_path / "checkpoints").glob("0*")), default=0)
    assert ": stopped, step " in lines[0] and lines[-1].startswith(
        f"next  the command that began it goes on from step {newest}"
    )


def test_of_a_folder_without_a_run(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "no run has begun here" in capsys.readouterr().err
    assert main(["status"]) == 2


@pytest.mark.parametrize(("values", "line"), [
    ([1.0], "▁"), ([2, 2, 2], "▁▁▁"), ([0, 7], "▁█"), (list(range(8)), "▁▂▃▄▅▆▇█"),
    ([2**i for i in range(8)], "▁▂▃▄▅▆▇█"),
])  # fmt: skip
def test_plot(values, line):
    assert plot(values) == line


def test_a_long_plot_has_means():
    assert plot([0.0, 1.0] * 640) == "▁" * 64
    rising = plot(range(-500, 500))
    assert len(rising) == 64 and rising == "".join(sorted(rising)) and set(rising) == set("▁▂▃▄▅▆▇█")
