"""A student of few steps: what it is compared with, where it begins, and how it is sampled afterwards."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import load
from kinoflow.dit_video import VideoDiT
from kinoflow.dit_video.lora import LoRAConfig, read_adapter
from kinoflow.sample.adapters import read_adapters
from kinoflow.sample.generate import Sampling
from kinoflow.train.__main__ import main, task_of
from kinoflow.train.run.averages import AveragedState
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.processes import Processes
from kinoflow.train.run.spread import Spread
from kinoflow.train.tasks import flow_preview, lora
from kinoflow.train.tasks.distill import Distillation, sampling_of
from tests.train.plain import plain
from tests.train.test_tasks import BACKBONE, COMMON, STEPS

STUDENT = ["distill.steps=4", "distill.substeps=2", "lora.rank=2", "lora.alpha=2", "flow.drop_each=0"]
READING = ["dit.known=true", "known.first=0.2", "known.both=0.2", "known.prefix=0.3", "known.region=0.3"]
CASES = {
    "zero0": [],
    "zero1-accumulated": ["deepspeed.zero_stage=1", "deepspeed.accumulation=2"],
    "zero2-sequence": ["deepspeed.zero_stage=2", "parallel.sequence=2"],
    "zero3": ["deepspeed.zero_stage=3", "parallel.checkpoint_every=1"],
}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A release whose backbone has no zeros left, and reads what is known of a clip."""
    folder = tmp_path_factory.mktemp("earlier")
    model = VideoDiT(load(RunConfig, [*BACKBONE, "dit.known=true"]).dit)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    model.save_pretrained(folder / "dit")
    return folder


@pytest.fixture(scope="module")
def sources(keyframes, earlier):
    return [*COMMON, *BACKBONE, *READING, *STUDENT, f"data.latents={keyframes}", f"init_from={earlier}"]


def alone(config):
    return Spread(config=config, processes=Processes(rank=0, size=1, device=torch.device("cpu")))


def prepared(sources):
    config = load(RunConfig, sources)
    task = task_of(config)
    task.prepare(alone(config))
    return task


@pytest.fixture(scope="module")
def runs(start_job, sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled")
    cases = {name: [*sources, *words] for name, words in CASES.items()} | {"stopped": [*sources, "steps=2"]}
    job = start_job("trained", cases, str(folder), size=2)
    assert job.wait() == [0, 0], job.text()
    job = start_job("trained", {"stopped": sources}, str(folder), size=2)
    assert job.wait() == [0, 0], job.text()
    return folder


@pytest.fixture(scope="module")
def reference(sources):
    task = prepared(sources)
    return plain(task, task.config)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_a_plain_loop(runs, reference, case):
    logged = [json.loads(line) for line in (runs / case / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in logged] == pytest.approx(reference.losses, rel=1e-5)
    assert [line["grad_norm"] for line in logged] == pytest.approx(reference.norms, rel=1e-4)
    average = AveragedState(runs / case / "checkpoints" / f"{STEPS:08d}")
    for name in average:
        torch.testing.assert_close(average[name], reference.average[name], rtol=1e-4, atol=2e-5, msg=name)


def test_a_resumed_run_is_the_uninterrupted_one(runs):
    whole, resumed = (
        AveragedState(runs / name / "checkpoints" / f"{STEPS:08d}") for name in ("zero0", "stopped")
    )
    assert whole.keys() == resumed.keys() and len(whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def doubled(condition):
    return [replace(each, hidden=each.hidden.double()) for each in condition]


def test_the_target_is_the_way_of_the_guided_teacher(sources):
    """Two Euler steps written out, in float64; without anything known and with."""
    task = prepared(sources)
    distillation, batch = task._distillation, task.batch(1, 0, 1)
    teacher = distillation.teacher.double()
    batch = replace(
        batch, noise=batch.noise.double(), known=batch.known.to(torch.empty(0).double()),
        condition=doubled(batch.condition), null=doubled(batch.null),
    )  # fmt: skip
    x, times = batch.noise, (0.25, 0.5, 0.75)
    told, kept = batch.known, batch.known.kept > 0
    assert kept.any() and told.shown.any() and not kept.all()

    def velocity(x, time):
        times = torch.full((len(x),), time, dtype=torch.float64)
        with torch.no_grad():
            plain, blank = (teacher(x, times, c, told) for c in (batch.condition, batch.null))
        guided = -3 * blank + 4 * plain
        sigma = 1e-5
        return torch.where(kept, told.latent - (1 - sigma) * batch.noise, guided.float().double())

    half = x + 0.25 * velocity(x, 0.25)
    expected = (half + 0.25 * velocity(half, 0.5) - x) / 0.5
    with torch.no_grad():
        found = distillation.way(x, batch, times)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(sources):
    """Of one step without guidance; with guidance it has."""
    task = prepared([*sources, "distill.substeps=1", "distill.guidance_scale=1"])
    for step in range(4):
        assert task.loss(task.model, task.batch(step, 0, 1), step).total < 1e-10
    task = prepared([*sources, "distill.substeps=1"])
    assert task.loss(task.model, task.batch(1, 0, 1), 1).total > 1e-3


def test_steps_go_through_all_intervals_and_begin_in_both_ways(sources):
    config = load(RunConfig, sources)
    distillation = Distillation(config, alone(config))
    times = sampling_of(config).times().tolist()
    found = [distillation.interval(step) for step in range(80)]
    for first in range(0, 80, 4):
        own = sorted((each.begin, each.end) for each in found[first : first + 4])
        assert np.allclose(own, list(pairwise(times)), atol=1e-12)
    fine = replace(sampling_of(config), num_steps=8).times().tolist()
    ways = sorted({each.within for each in found})
    assert np.allclose(ways, [fine[i : i + 3] for i in range(0, 8, 2)], atol=1e-12)
    assert all(each.before[-1] == each.begin and not (each.rolled and each.begin == 0) for each in found)
    rolled = [each.rolled for each in found if each.begin > 0]
    assert 0.3 < sum(rolled) / len(rolled) < 0.7
    assert found == [distillation.interval(step) for step in range(80)]


def test_a_rolled_step_begins_where_the_student_comes_to(sources):
    task = prepared([*sources, "distill.rollout=1"])
    step = next(i for i in range(8) if len(task._distillation.interval(i).before) == 3)
    interval, batch = task._distillation.interval(step), task.batch(step, 0, 1)
    asked = []

    def student(x, time, condition, known):
        asked.append((x, time))
        return torch.ones_like(x)

    task.loss(student, batch, step)
    kept, reached = batch.known.kept > 0, batch.noise + interval.begin
    assert [time[0].item() for _, time in asked] == pytest.approx(interval.before)
    last = asked[-1][0]
    torch.testing.assert_close(last[~kept.expand_as(last)], reached[~kept.expand_as(last)])
    at = interval.begin * batch.known.latent + (1 - (1 - 1e-5) * interval.begin) * batch.noise
    torch.testing.assert_close(last[kept.expand_as(last)], at[kept.expand_as(last)])


def test_an_exported_student_says_how_it_is_sampled(runs, sources, tmp_path):
    release = tmp_path / "release"
    folder = release / "adapters" / "four"
    assert main(["export", str(runs / "zero0"), str(folder), "--adapter"]) == 0
    wanted = Sampling(guidance_scale=1.0, num_steps=4, schedule="shifted", shift=5.0)
    adapters, sampling = read_adapters([str(folder)], release)
    assert sampling == wanted and len(adapters) == 1
    named, _ = read_adapters(["four:0.5"], release)
    assert named[0].scale == adapters[0].scale / 2 and named[0].digest() == adapters[0].digest()
    small = tmp_path / "small"
    assert main(["export", str(runs / "zero0"), str(small), "--adapter", "--int8"]) == 0
    assert read_adapters([str(small)], release)[1] == wanted
    assert main(["export", str(runs / "zero0"), str(small), "--int8"]) == 2
    with pytest.raises(UserError, match=r"lora: five: no such folder, and .* has four"):
        read_adapters(["five"], release)


def test_adapters_can_begin_as_earlier_ones(runs, sources, tmp_path):
    folder = tmp_path / "adapter"
    assert main(["export", str(runs / "zero0"), str(folder), "--adapter"]) == 0
    words = [*sources, "distill.steps=2", f"distill.adapters=[{folder}]", f"lora.init_from={folder}",
             "distill.guidance_scale=1", "distill.substeps=1"]  # fmt: skip
    task = prepared(words)
    pairs = read_adapter(str(folder)).pairs
    found = dict(task.model.named_parameters())
    for name, (a, b) in pairs.items():
        layer = name.removesuffix(".weight")
        assert torch.equal(found[f"{layer}.lora_A.default.weight"], a)
        assert torch.equal(found[f"{layer}.lora_B.default.weight"], b)
    assert task.loss(task.model, task.batch(1, 0, 1), 1).total < 1e-10
    with pytest.raises(UserError, match=r"lora.init_from: .* has one of rank 2"):
        prepared([*words, "lora.rank=3"])


def test_adapters_in_bytes_are_half_as_large_and_nearly_the_same(tmp_path):
    config, rng = LoRAConfig(rank=32, alpha=32, targets=("qkv",)), torch.Generator().manual_seed(1)
    with torch.device("meta"):
        model = VideoDiT(replace(load(RunConfig, BACKBONE).dit, width=128))
    lora.inject(model, config, "")
    state = {n: torch.randn(v.shape, generator=rng) for n, v in model.named_parameters() if "lora_" in n}
    for folder, dtype in (("half", torch.float16), ("bytes", torch.int8)):
        (tmp_path / folder).mkdir()
        lora.write(model, state, tmp_path / folder, dtype)
    exact, small = (read_adapter(str(tmp_path / name)) for name in ("half", "bytes"))
    for name, pair in exact.pairs.items():
        for one, other in zip(pair, small.pairs[name], strict=True):
            level = one.float().abs().amax(1, keepdim=True) * 1.02 / 127
            assert ((one.float() - other).abs() <= level / 2 + 1e-3).all() and not torch.equal(
                one.float(), other
            )
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("half", "bytes")]
    assert sizes[1] < 0.6 * sizes[0]


def test_earlier_adapters_are_brought_to_a_rank_and_a_weight(tmp_path):
    """By the closed form: what the largest singular values leave, and s B A as it was."""
    earlier = LoRAConfig(rank=4, alpha=8)
    folder, rng = tmp_path / "adapter", torch.Generator().manual_seed(1)
    with torch.device("meta"):
        model = VideoDiT(load(RunConfig, BACKBONE).dit)
    lora.inject(model, earlier, "")
    state = {
        name: torch.randn(value.shape, generator=rng)
        for name, value in model.named_parameters()
        if "lora_" in name
    }
    folder.mkdir()
    lora.write(model, state, folder)
    before = read_adapter(str(folder))
    same = lora.earlier(LoRAConfig(rank=4, alpha=2, init_from=str(folder)))
    less = lora.earlier(LoRAConfig(rank=2, alpha=2, init_from=str(folder)))
    for name, (a, b) in before.pairs.items():
        whole = before.scale * (b.double() @ a.double())
        u, values, v = torch.linalg.svd(whole)
        pair, small = same.pairs[name], less.pairs[name]
        torch.testing.assert_close(same.scale * (pair.b @ pair.a), whole.float())
        assert small.a.shape[0] == small.b.shape[1] == 2
        nearest = u[:, :2] * values[:2] @ v[:2]
        torch.testing.assert_close(less.scale * (small.b @ small.a), nearest.float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(small.a.norm(dim=1), small.b.norm(dim=0))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["model=tae", "distill.steps=4"], r"^distill\.steps: needs a backbone"),
        ([*BACKBONE, "distill.steps=4"], r"^distill\.steps: needs a backbone .* and an init_from"),
        ([*BACKBONE, "init_from=x", "distill.steps=4", "flow.objective=score"], "learns velocities"),
        (["distill.steps=-1"], r"^distill\.steps: -1"),
        (["distill.substeps=0"], r"^distill\.substeps: 0"),
        (["distill.rollout=2"], r"^distill\.rollout: 2"),
        (["distill.shift=0"], r"^distill\.shift: 0"),
        (["lora.init_from=x"], r"^lora\.init_from: needs lora\.rank"),
    ],
)
def test_mistakes_name_the_key(words, line):
    with pytest.raises(UserError, match=line):
        load(RunConfig, words)


def test_previews_are_sampled_as_the_student_is(sources, monkeypatch):
    """Beside a teacher's: its steps, its grid, and no guidance."""
    asked = []

    def fake(model, *parts, frames, **settings):
        asked.append(settings)
        return torch.zeros(1, frames, 16, 16, 3, dtype=torch.uint8)

    monkeypatch.setattr(flow_preview, "generate", fake)
    for words in ([], ["distill.steps=0"]):
        task = prepared([*sources, *words])
        task.previews._frozen = (None, None)
        task.previews._generate(task.model, "a fox", 3, torch.device("cpu"))
    names = ("num_steps", "guidance_scale", "schedule", "shift")
    found = [tuple(settings[name] for name in names) for settings in asked]
    assert found == [(4, 1.0, "shifted", 5.0), (25, 4.0, "linear-quadratic", 3.0)]
    assert [settings["seeds"] for settings in asked] == [[3], [3]]


def test_a_teacher_that_reads_less_is_refused(sources, tmp_path):
    VideoDiT(load(RunConfig, BACKBONE).dit).save_pretrained(tmp_path / "dit")
    with pytest.raises(UserError, match=r"distill\.teacher: .* reads nothing that is known"):
        prepared([*sources, f"distill.teacher={tmp_path}"])
