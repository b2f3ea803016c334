"""A run goes on on fewer and on more processes, and at another ZeRO stage, as if nothing had changed."""

import json
import shutil

import pytest

from kinoflow.configs.schema import load
from kinoflow.train.run.averages import AveragedState
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.shards import Shards
from tests.train.plain import plain
from tests.train.toys import Toy

STEPS, LEFT = 12, 6
COMMON = [f"steps={STEPS}", "log_every=4", f"checkpoint_every={LEFT}", "ema_decay=0.9", "optimizer.lr=0.02",
          "optimizer.warmup_steps=3", "optimizer.grad_clip=11", "seed=3", "data.batch_size=12",
          "deepspeed.persistent=0"]  # fmt: skip
# Stages before and after (and what is offloaded then), by the number of processes after; two were before.
THEN = {
    1: [(0, 0), (1, 3), (2, 1), (3, 0)],
    2: [(1, 3), (3, 2), (0, 1), (2, 0), (3, "2 deepspeed.offload=optimizer"),
        (2, "3 deepspeed.offload=parameters")],
    3: [(1, 1), (2, 3), (3, 2), (0, 3)],
    4: [(1, 2), (2, 2), (3, 3), (0, 0)],
}  # fmt: skip


@pytest.fixture(scope="module")
def before(start_job, tmp_path_factory):
    """A run on two processes at each stage, with a critic."""
    folder = tmp_path_factory.mktemp("two")
    cases = []
    for stage in range(4):
        sources = [*COMMON, f"deepspeed.zero_stage={stage}", f"run={folder / str(stage)}"]
        cases.append((sources, {"adversarial": True}))
    job = start_job("toys", cases, size=2)
    assert job.wait() == [0, 0], job.text()
    return folder


@pytest.fixture(scope="module", params=THEN)
def after(before, start_job, tmp_path_factory, request):
    """What other processes make of their checkpoints, by the stages before and after."""
    folder, cases = tmp_path_factory.mktemp("others"), []
    for old, new in THEN[request.param]:
        run = folder / f"{old} {new}"
        shutil.copytree(
            before / str(old) / "checkpoints" / f"{LEFT:08d}", run / "checkpoints" / f"{LEFT:08d}"
        )
        shutil.copy(before / str(old) / "log.jsonl", run)
        cases.append(([*COMMON, *f"deepspeed.zero_stage={new}".split(), f"run={run}"], {"adversarial": True}))
    job = start_job("toys", cases, size=request.param)
    assert job.wait() == [0] * request.param, job.text()
    return folder, request.param


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference():
    config = load(RunConfig, COMMON)
    return plain(Toy(config, adversarial=True), config)


def test_other_processes_go_on(before, after, reference):
    """The interval that was open when the processes changed has the means of all its steps."""
    folder, size = after
    for old, new in THEN[size]:
        found = AveragedState(folder / f"{old} {new}" / "checkpoints" / f"{STEPS:08d}")
        for name, value in reference.average.items():
            assert (found[name] - value).abs().max() <= 1e-5, (old, new, name)
        for key in ("loss", "error", "grad_norm", "discriminator_loss"):
            there, here = (
                [line.get(key) for line in lines(run)] for run in (before / str(old), folder / f"{old} {new}")
            )
            assert here == pytest.approx(there, rel=1e-4 if key == "grad_norm" else 1e-5), (old, new, key)


def test_every_element_is_written_once_and_read_where_it_belongs(before):
    """The pieces of all stages are the same tensors; slices of them are what the whole has there."""
    found = [Shards(before / str(stage) / "checkpoints" / f"{STEPS:08d}", "model") for stage in range(4)]
    for key in found[0]:
        whole = found[0][key]
        for other in found[1:]:
            assert (other[key] - whole).abs().max() <= 1e-5
            count = whole.numel()
            begin, end = count // 3, count - count // 4
            part = other.parts({key: (begin, end)})[key]
            assert (part == other[key].flatten()[begin:end]).all()
    kinds = {key.partition("/")[0] for key in found[0]}
    assert kinds == {"master", "exp_avg", "exp_avg_sq"}
