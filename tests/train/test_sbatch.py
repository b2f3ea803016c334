"""configs/cluster/train.sbatch on stand-ins for SLURM's programs: what it starts, and how it ends."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.train.launching import ROOT, WAIT, begin, end, put

SCRIPT = ROOT / "configs" / "cluster" / "train.sbatch"
# Two tasks; the highest of their codes. SIGTERM kills them, as it does with the real one.
SRUN = """#!/bin/bash
trap 'kill -KILL $(jobs -p)' TERM
while [[ $1 == --* ]]; do echo "$1" >> "$0.options"; shift; done
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_STEP_NUM_TASKS=2 "$@" &
  tasks+=($!)
done
code=0
for task in "${tasks[@]}"; do
  while kill -0 "$task" 2> /dev/null; do wait "$task" || true; done
  wait "$task" || { one=$?; code=$((one > code ? one : code)); }
done
exit $code
"""
# Says who it is and what it was told. "steps=1000" goes on until SIGTERM, "stps=1" is a mistake.
PROGRAM = """#!/bin/bash
trap 'exit 143' TERM
printf '%s\\n' "$SLURM_PROCID of $SLURM_STEP_NUM_TASKS, $OMP_NUM_THREADS threads" "$@" > "$0.$SLURM_PROCID"
echo $$ > "$0.pid.$SLURM_PROCID"
mv "$0.pid.$SLURM_PROCID" "$0.begun.$SLURM_PROCID"
case "$*" in
  *steps=1000*) while true; do sleep 0.05; done ;;
  *stps=1*) exit 2 ;;
esac
"""
SCONTROL = '#!/bin/bash\necho "$*" >> "$0.told"\n'


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    return put(tmp_path / "bin", srun=SRUN, program=PROGRAM, scontrol=SCONTROL)


def submit(programs: Path, *words: str) -> subprocess.Popen:
    """The script as SLURM runs it on a job's first node, in a session of its own."""
    job = {"SLURM_JOB_ID": "812", "SLURM_CPUS_PER_TASK": "3", "PYTHON": str(programs / "program")}
    return begin(["setsid", "env", "-u", "OMP_NUM_THREADS", "bash", str(SCRIPT), *words], programs, **job)


def tasks(programs: Path, job: subprocess.Popen) -> list[int]:
    """The processes of a job that go on until a signal."""
    begun = [programs / f"program.begun.{rank}" for rank in (0, 1)]
    deadline = time.monotonic() + WAIT
    while not all(path.exists() for path in begun):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return [int(path.read_text()) for path in begun]


def queued_again(programs: Path) -> bool:
    told = programs / "scontrol.told"
    assert not told.exists() or told.read_text() == "requeue 812\n"
    return told.exists()


def test_it_is_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_every_process_gets_the_words(programs: Path) -> None:
    words = ["configs/models/dit_1b.yaml", "run=runs/a b", "data.buckets=[1x64x64@16 weight=2]"]
    codes, text = end([submit(programs, *words)])
    assert codes == [0], text
    assert (programs / "srun.options").read_text().split() == ["--cpus-per-task=3", "--kill-on-bad-exit=1"]
    for rank in (0, 1):
        said = (programs / f"program.{rank}").read_text().splitlines()
        assert said == [f"{rank} of 2, 3 threads", "-m", "kinoflow.train", *words]
    assert not queued_again(programs)


def test_a_mistake_does_not_come_again(programs: Path) -> None:
    codes, text = end([submit(programs, "stps=1")])
    assert codes == [2], text
    assert not queued_again(programs)


def test_a_job_whose_processes_saved_queues_again(programs: Path) -> None:
    """SLURM sends --signal and the notice of a preemption to a job's steps alone."""
    job = submit(programs, "steps=1000")
    for process in tasks(programs, job):
        os.kill(process, signal.SIGTERM)
    codes, text = end([job])
    assert codes == [143], text
    assert queued_again(programs)


def test_a_cancelled_job_stays_away(programs: Path) -> None:
    """All that it consists of gets SIGTERM."""
    job = submit(programs, "steps=1000")
    tasks(programs, job)
    os.killpg(job.pid, signal.SIGTERM)
    codes, text = end([job])
    assert codes == [-signal.SIGTERM], text
    assert not queued_again(programs)


def test_what_it_asks_of_slurm() -> None:
    asked = re.findall(r"^#SBATCH (--[\w-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.MULTILINE)
    assert len(asked) == SCRIPT.read_text().count("#SBATCH")
    # Without B:, which would spare the processes.
    assert dict(asked)["--signal"] == "TERM@300" and ("--requeue", "") in asked
