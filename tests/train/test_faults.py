"""What goes wrong in a month: numbers that are none, damaged files, a second run, a rank that stops."""

import json
import os
import pickle
import shutil
import signal
import time

import pytest
import torch.distributed as dist
from torch._C import _distributed_c10d

from kinoflow.configs.schema import load
from kinoflow.train.run import checkpoint
from kinoflow.train.run.averages import AveragedState
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.watch import COLLECTIVES, STOOD_STILL, record_collectives
from tests.train.plain import plain
from tests.train.toys import Toy

STEPS, SPOILED = 12, (4, 8, 9)
COMMON = [f"steps={STEPS}", "log_every=3", "checkpoint_every=4", "ema_decay=0.9", "optimizer.lr=0.02",
          "optimizer.warmup_steps=3", "optimizer.grad_clip=11", "deepspeed.persistent=0"]  # fmt: skip
CASES = {
    f"{precision}_zero{stage}{name}": (
        [f"deepspeed.zero_stage={stage}", f"deepspeed.precision={precision}", *more]
    )
    for precision in ("fp32", "bf16")
    for stage in range(4)
    for name, more in {"": [], "_unclipped": ["optimizer.grad_clip=0"]}.items()
}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def until(condition, job):
    deadline = time.monotonic() + 900
    while not condition():
        assert time.monotonic() < deadline, job.text()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def spoiled(start_job, tmp_path_factory):
    """Runs of two processes, in three of whose steps a sample of the second one is no number."""
    folder = tmp_path_factory.mktemp("spoiled")
    how = {"spoiled": SPOILED, "adversarial": True}
    job = start_job(
        "toys", [([*COMMON, *more, f"run={folder / case}"], how) for case, more in CASES.items()], size=2
    )
    assert job.wait() == [0, 0], job.text()
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_step_without_a_finite_gradient_is_left_out(spoiled, case):
    config = load(RunConfig, [*COMMON, *CASES[case]])
    state = AveragedState(spoiled / case / "checkpoints" / f"{STEPS:08d}")
    if config.optimizer.grad_clip > 0 and config.deepspeed.precision == "fp32":
        reference = plain(Toy(config, spoiled=SPOILED, adversarial=True), config)
        for name, value in reference.average.items():
            assert (state[name] - value).abs().max() <= 1e-5, name
    assert all(state[name].isfinite().all() for name in state)
    logged = lines(spoiled / case / "log.jsonl")
    assert [line["skipped"] for line in logged] == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    assert all(line["loss"] < 1e3 for line in logged), "means of the steps that count"


def test_the_clips_of_a_skipped_step_are_named(spoiled):
    """Those of the process whose loss was no number, and not the others'."""
    for case in CASES:
        events = lines(spoiled / case / "events.jsonl")
        assert [(event["step"], event["event"]) for event in events] == [
            (step + 1, "skipped") for step in SPOILED
        ]
        assert [event["clips"] for event in events] == [[f"toy {step} 1/2"] for step in SPOILED]


@pytest.mark.parametrize("stage", range(4))
def test_three_steps_in_a_row_end_the_run(start_job, tmp_path, stage):
    sources = [*COMMON, f"deepspeed.zero_stage={stage}", f"run={tmp_path}"]
    job = start_job("toy", sources, False, 0.0, 23, (5, 6, 7), size=2)
    assert job.wait() == [2, 2], job.text()
    assert "steps 6 to 8: no finite gradient, the last in toy 7 1/2" in job.text()
    assert (tmp_path / "checkpoints" / "latest").read_text() == "00000004\n"
    assert [event["step"] for event in lines(tmp_path / "events.jsonl")] == [6, 7, 8]
    assert start_job("toy", sources, size=2).wait() == [0, 0], "with good clips it goes on"


@pytest.fixture(scope="module")
def whole(start_job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    job = start_job("toy", [*COMMON, f"run={folder}"], True)
    assert job.wait() == [0], job.text()
    return folder


def flip(path):
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


TENSORS = [f"{kind}_00000.safetensors" for kind in ("model", "discriminator", "ema")] + ["rest.safetensors"]
FILES = [*TENSORS, "state.json", "rank_00000.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(whole, start_job, tmp_path, name):
    """The run goes on from the checkpoint before and ends where it would have ended."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / f"{STEPS:08d}").rename(tmp_path / "away")
    before = {path.name: path.read_bytes() for path in (tmp_path / "away").iterdir()}
    flip(tmp_path / "checkpoints" / "00000008" / name)
    shutil.copytree(whole / "checkpoints" / "00000008", tmp_path / "checkpoints" / "00000004")
    record = json.loads((tmp_path / "checkpoints" / "00000004" / "state.json").read_text())
    assert record["step"] == 8, "a whole one, under an earlier number"
    job = start_job("toy", [*COMMON, f"run={tmp_path}"], True)
    assert job.wait() == [0], job.text()
    assert "00000008 is damaged" in job.text()
    done = tmp_path / "checkpoints" / f"{STEPS:08d}"
    assert all((done / key).read_bytes() == before[key] for key in TENSORS)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "00000004",
        done.name,
        "latest",
    ]


def test_a_run_whose_checkpoints_are_all_damaged_waits_for_its_user(whole, start_job, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for found in checkpoint.folders(tmp_path / "checkpoints"):
        flip(found / "model_00000.safetensors")
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    job = start_job("toy", [*COMMON, f"run={tmp_path}", "steps=20"], True)
    assert job.wait() == [2], job.text()
    assert "no checkpoint is whole (00000012: model_00000.safetensors has another SHA-256" in job.text()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before


def test_what_was_given_up_goes_and_milestones_stay(start_job, tmp_path):
    """A run that went on from an earlier checkpoint drops the later ones, not those it writes."""
    sources = [*COMMON, "checkpoint_every=2", "keep_checkpoints=2", "keep_every=6", f"run={tmp_path}"]
    assert start_job("toy", [*sources, "steps=10"]).wait() == [0]
    there = [path.name for path in checkpoint.folders(tmp_path / "checkpoints")]
    assert there == ["00000006", "00000008", "00000010"]
    for name in there[1:]:
        shutil.rmtree(tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints" / "00000099").mkdir()
    job = start_job("toy", [*sources, "steps=12"])
    assert job.wait() == [0], job.text()
    there = [path.name for path in checkpoint.folders(tmp_path / "checkpoints")]
    assert there == ["00000006", "00000010", "00000012"]


def test_fewer_steps_than_are_done(whole, start_job, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    job = start_job("toy", [*COMMON, f"run={tmp_path}", "steps=5"], True)
    assert job.wait() == [2]
    assert "00000012 has done 12 already, more than 5" in job.text()


def test_two_runs_do_not_share_a_folder(start_job, tmp_path):
    sources = [*COMMON, "steps=100000", f"run={tmp_path}"]
    first = start_job("toy", sources, False, 0.05, size=2)
    until((tmp_path / "checkpoints" / "00000004").exists, first)
    second = start_job("toy", sources, size=2)
    assert second.wait() == [2, 2], second.text()
    assert f"{tmp_path} is in use by process {first.processes[0].pid} on" in second.text()
    os.kill(first.processes[0].pid, signal.SIGUSR1)
    assert first.wait() == [143, 143], first.text()


def test_a_rank_that_is_stopped_ends_the_run_with_its_name(start_job, tmp_path):
    sources = [*COMMON, "steps=100000", "patience=30", f"run={tmp_path}"]
    job = start_job("toy", sources, False, 0.05, size=2)
    until((tmp_path / "beats" / "1.json").exists, job)
    os.kill(job.processes[1].pid, signal.SIGSTOP)
    try:
        job.processes[0].join(900)
        assert job.processes[0].exitcode == STOOD_STILL, job.text()
    finally:
        job.processes[1].kill()
    assert "rank 0 has stood still for" in job.text() and "Rank 1 has not been heard of for" in job.text()
    recorded = pickle.loads((tmp_path / COLLECTIVES / "rank_0").read_bytes())
    names = {entry["profiling_name"] for entry in recorded["entries"]}
    assert names & {"gloo:all_reduce", "gloo:broadcast"} and recorded["entries"][-1]["frames"]


def test_nccl_has_a_recorder_of_its_own(monkeypatch, tmp_path):
    """Of which a build for CPUs has none; nothing is written where there is no group."""
    monkeypatch.setattr(_distributed_c10d, "_dump_nccl_trace", lambda: b"nccl", raising=False)
    record_collectives(tmp_path / "rank_3")
    assert not (tmp_path / "rank_3").exists()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    record_collectives(tmp_path / "rank_3")
    assert (tmp_path / "rank_3").read_bytes() == b"nccl"
