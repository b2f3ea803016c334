"""ZeRO 0 to 3 on two gloo processes against one plain AdamW loop: parameters, EMA, log, resume, export."""

import json
import os
import shutil
import signal
import time

import pytest
import torch

from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import load
from kinoflow.train.run.averages import AveragedState
from kinoflow.train.run.config import RunConfig
from tests.train.parallel_jobs import SMALL
from tests.train.plain import plain
from tests.train.toys import Toy

STEPS = 12
COMMON = [f"steps={STEPS}", "log_every=1", "checkpoint_every=6", "preview_every=12", "ema_decay=0.9",
          "optimizer.lr=0.02", "optimizer.warmup_steps=3", "optimizer.schedule=cosine", "seed=3",
          "optimizer.grad_clip=11", "optimizer.weight_decay=0.1"]  # fmt: skip
CASES = {
    "zero0": ["deepspeed.zero_stage=0"],
    "zero1": ["deepspeed.zero_stage=1"],
    "zero2": ["deepspeed.zero_stage=2"],
    "zero3": ["deepspeed.zero_stage=3", "deepspeed.persistent=0"],
    "zero3_persistent": ["deepspeed.zero_stage=3", "deepspeed.persistent=100"],
    "accumulation": ["deepspeed.zero_stage=2", "deepspeed.accumulation=2"],
}
# Less than the mean: it bites in nearly every step.
ADAPTIVE = {
    f"adaptive_{name}": [*CASES[name], "optimizer.adaptive_clip=0.9"] for name in ("zero0", "zero2", "zero3")
}
CRITIC = {
    "critic0": ["deepspeed.zero_stage=0", "deepspeed.accumulation=2"],
    "critic2": ["deepspeed.zero_stage=2"],
}
BF16 = {"bf16": ["deepspeed.zero_stage=1", "deepspeed.precision=bf16"]}
# In fp16 the first loss scales are too large: their steps are skipped, and halve the scale.
FP16 = {
    f"fp16_zero{stage}": [
        f"deepspeed.zero_stage={stage}",
        "deepspeed.precision=fp16",
        "deepspeed.persistent=0",
    ]
    for stage in (1, 2, 3)
}
ALL = CASES | ADAPTIVE | CRITIC | BF16 | FP16
SLICES = 64  # of a global batch, on two ranks
SUMMED = {
    f"{precision}_zero{stage}_{offload}_{persistent}": [
        f"deepspeed.precision={precision}", f"deepspeed.zero_stage={stage}", f"deepspeed.offload={offload}",
        f"deepspeed.accumulation={SLICES // 2}", f"data.batch_size={SLICES}", "optimizer.grad_clip=0",
        f"deepspeed.persistent={persistent}",
    ]
    for precision, stage, offload, persistent in (
        ("fp32", 2, "none", 0), ("bf16", 0, "none", 0), ("bf16", 1, "none", 0), ("bf16", 2, "none", 0),
        ("bf16", 3, "none", 0), ("bf16", 3, "none", 100), ("bf16", 1, "optimizer", 0),
        ("bf16", 2, "optimizer", 0), ("bf16", 3, "optimizer", 0), ("bf16", 3, "parameters", 0),
    )
}  # fmt: skip


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def only_checkpoint(source, target, step):
    """A run folder as a kill right after this checkpoint leaves it."""
    shutil.copytree(source / "checkpoints" / f"{step:08d}", target / "checkpoints" / f"{step:08d}")
    shutil.copy(source / "log.jsonl", target / "log.jsonl")


@pytest.fixture(scope="module")
def runs(start_job, tmp_path_factory):
    """Per case: `first` trains 12 steps; `second` resumes at 6 with an EMA that copies the weights.

    Between its steps `second` makes previews, which must leave the weights as they are.
    """
    folder = tmp_path_factory.mktemp("zero")
    for name, more in (("first", []), ("second", ["ema_decay=0", "preview_every=2"])):
        cases = []
        for case, own in ALL.items():
            if name == "second":
                only_checkpoint(folder / case / "first", folder / case / "second", 6)
            cases.append(
                ([*COMMON, *own, *more, f"run={folder / case / name}"], {"adversarial": case in CRITIC})
            )
        job = start_job("toys", cases, size=2)
        assert job.wait() == [0, 0], job.text()
    return folder


@pytest.fixture(scope="module")
def references():
    config = load(RunConfig, COMMON)
    found = {
        adversarial: plain(Toy(config, adversarial=adversarial), config) for adversarial in (False, True)
    }
    config = load(RunConfig, [*COMMON, *ADAPTIVE["adaptive_zero0"]])
    return found | {"adaptive": plain(Toy(config), config)}


def of(case):
    """Which reference a case has."""
    return "adaptive" if case in ADAPTIVE else case in CRITIC


@pytest.mark.parametrize("case", CASES | ADAPTIVE | CRITIC)
def test_parameters_equal_a_plain_loop(runs, references, case):
    reference = references[of(case)]
    state = AveragedState(runs / case / "second" / "checkpoints" / f"{STEPS:08d}")
    assert set(state) == set(reference.model.state_dict())
    start = Toy(load(RunConfig, COMMON)).model.state_dict()
    for name, value in reference.model.state_dict().items():
        assert (state[name] - value).abs().max() <= 1e-5, name
        assert name == "scale" or (start[name] - value).abs().max() > 1e-2, "training must have moved it"


@pytest.mark.parametrize("case", CASES | ADAPTIVE | CRITIC)
def test_average_equals_a_plain_one(runs, references, case):
    reference = references[of(case)]
    state = AveragedState(runs / case / "first" / "checkpoints" / f"{STEPS:08d}")
    for name, value in reference.average.items():
        assert (state[name] - value).abs().max() <= 1e-5, name
        assert (reference.model.state_dict()[name] - value).abs().max() > 1e-4, "an average lags behind"


@pytest.mark.parametrize("case", CASES)
def test_log_has_the_global_loss_and_norm(runs, references, case):
    reference = references[False]
    logged = lines(runs / case / "first")
    assert [line["step"] for line in logged] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in logged] == pytest.approx(reference.losses, rel=1e-5)
    assert [line["grad_norm"] for line in logged] == pytest.approx(reference.norms, rel=1e-4)
    assert max(reference.norms) > 11 > min(reference.norms), "clipping must bite in some steps only"
    assert logged[-1]["tokens_per_second"] == pytest.approx(7 * logged[-1]["samples_per_second"])
    assert logged[-1]["peak_memory_bytes"] > 2**20


@pytest.mark.parametrize("case", ALL)
def test_resume_is_exact(runs, case):
    first, second = lines(runs / case / "first"), lines(runs / case / "second")
    assert [line["step"] for line in second] == list(range(1, STEPS + 1)), (
        "lines after the checkpoint are replaced"
    )
    for key in ("loss", "error", "grad_norm", "lr"):
        assert [line.get(key) for line in second] == [line.get(key) for line in first]


@pytest.mark.parametrize("case", ADAPTIVE)
def test_the_bound_follows_the_norm(runs, references, case):
    logged = lines(runs / case / "first")
    assert [line["grad_norm"] for line in logged] == pytest.approx(references["adaptive"].norms, rel=1e-4)
    bounds = [line["clip_bound"] for line in logged]
    assert bounds[0] == 11 and len(set(bounds)) == STEPS
    assert any(norm > bound for norm, bound in zip(references["adaptive"].norms, bounds, strict=True))
    assert references["adaptive"].losses != references[False].losses


@pytest.mark.parametrize("case", CASES)
def test_preview_shows_the_average(runs, case):
    folder = runs / case / "first"
    model = Toy(load(RunConfig, COMMON)).model
    model.load_state_dict(AveragedState(folder / "checkpoints" / f"{STEPS:08d}"))
    shown = torch.load(folder / "previews" / f"{STEPS:08d}" / "output.pt")
    assert torch.allclose(shown, model(torch.ones(2, 7)), atol=1e-4)


def test_bf16_learns_beside_fp32_masters(runs, references):
    losses = [line["loss"] for line in lines(runs / "bf16" / "first")]
    assert losses == pytest.approx(references[False].losses, rel=0.1)
    state = AveragedState(runs / "bf16" / "first" / "checkpoints" / "00000012")
    shift = state["shift"]
    assert shift.dtype == torch.float32 and not torch.equal(shift, shift.bfloat16().float())


@pytest.mark.parametrize("case", FP16)
def test_fp16_scales_its_losses(runs, references, case):
    logged = lines(runs / case / "first")
    skipped = [line["skipped"] == 1 for line in logged]
    assert skipped[0] and sum(skipped) < STEPS / 2
    scales = [line["loss_scale"] for line in logged]
    assert scales[0] == 2**16, "DeepSpeed forgives the first"
    assert scales[1:] == [scale / 2**skip for scale, skip in zip(scales, skipped[1:], strict=False)]
    assert [("grad_norm" not in line) for line in logged] == skipped
    assert logged[-1]["loss"] < 0.9 * logged[0]["loss"]
    state = AveragedState(runs / case / "first" / "checkpoints" / "00000012")
    assert not torch.equal(state["shift"], state["shift"].half().float()), "masters are fp32"


@pytest.fixture(scope="module")
def sums(start_job, tmp_path_factory):
    """The gradient norms that each of two ranks tells, by case."""
    folder = tmp_path_factory.mktemp("sums")
    job = start_job("summed", SUMMED, str(folder), size=2)
    assert job.wait() == [0, 0], job.text()
    return {case: [torch.load(folder / f"{case}.{rank}.pt") for rank in range(2)] for case in SUMMED}


@pytest.mark.parametrize("case", SUMMED)
def test_gradients_are_summed_in_fp32(sums, case):
    """Over micro-batches and ranks; in bf16 all but the first would be lost, or the last bits of the sum."""
    sum_of_slices = torch.tensor(1 + (SLICES - 1) * SMALL)
    assert sum_of_slices.bfloat16() != sum_of_slices, "bf16 cannot hold it"
    expected = (sum_of_slices / SLICES * 3**0.5).item()
    for norms in sums[case]:
        assert norms == pytest.approx([expected, expected], rel=1e-6)


def test_critic_trains(runs):
    logged = lines(runs / "critic2" / "first")
    assert ["discriminator_loss" in line for line in logged] == [False] * 3 + [True] * 9


def test_sigterm_stops_all_ranks_at_one_step(start_job, tmp_path):
    sources = [*COMMON, "steps=1000", "log_every=5", "deepspeed.zero_stage=1", f"run={tmp_path}"]
    job = start_job("toy", sources, False, 0.02, size=2)
    deadline = time.monotonic() + 900
    while not (tmp_path / "checkpoints" / "00000006").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(job.processes[1].pid, signal.SIGTERM)
    assert job.wait() == [143, 143], job.text()
    saved = int((tmp_path / "checkpoints" / "latest").read_text())
    assert 6 <= saved < 1000
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if "partial" in path.name] == []


def test_missing_shard_is_refused(runs, tmp_path):
    checkpoint = tmp_path / "00000012"
    shutil.copytree(runs / "zero2" / "first" / "checkpoints" / "00000012", checkpoint)
    (checkpoint / "ema_00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"a file ema_\*.safetensors is missing"):
        AveragedState(checkpoint)
