"""Adapters: what they are at the start, what is trained and kept of them, and what peft makes of them."""

import json
import shutil
from functools import partial

import pytest
import torch
from peft import PeftModel

from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.configs.errors import UserError
from kinoflow.configs.pretrained import Weights
from kinoflow.configs.schema import load
from kinoflow.dit_video import VideoDiT
from kinoflow.dit_video.lora import Merged, read_adapter
from kinoflow.train.__main__ import main, task_of
from kinoflow.train.run.averages import AveragedState
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.processes import Processes
from kinoflow.train.run.shards import Shards, opened
from kinoflow.train.run.spread import Spread
from kinoflow.train.tasks import lora
from tests.train.plain import plain
from tests.train.test_tasks import BACKBONE, COMMON, STEPS

ADAPTERS = ["lora.rank=2", "lora.alpha=6"]
LAYERS = 7  # of a block: two of self-attention, three of cross-attention, two of the feed-forward
CASES = {
    "zero0": [],
    "zero0-all": ["parallel.sequence=2", "parallel.checkpoint_every=1"],
    "zero1": ["deepspeed.zero_stage=1"],
    "zero2-accumulated": ["deepspeed.zero_stage=2", "deepspeed.accumulation=2"],
    "zero3": ["deepspeed.zero_stage=3"],
    "zero3-all": ["deepspeed.zero_stage=3", "parallel.sequence=2", "parallel.checkpoint_every=1",
                  "deepspeed.offload=parameters"],
}  # fmt: skip
RESUMED = ["deepspeed.zero_stage=3", "parallel.checkpoint_every=1", "lora.dropout=0.3"]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A release whose backbone has no zeros left; in fp64, values of fp32."""
    folder = tmp_path_factory.mktemp("earlier")
    model = VideoDiT(load(RunConfig, BACKBONE).dit)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    model.save_pretrained(folder / "dit", dtype=torch.float64)
    return folder


@pytest.fixture(scope="module")
def sources(latents, earlier):
    return [*COMMON, *BACKBONE, f"data.latents={latents}", f"init_from={earlier}", *ADAPTERS]


def prepared(sources):
    config = load(RunConfig, sources)
    task = task_of(config)
    task.prepare(Spread(config=config, processes=Processes(rank=0, size=1, device=torch.device("cpu"))))
    return task


def moved(task, seed=2):
    """The task with adapters that change something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in task.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return task


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    draw = partial(torch.randn, generator=generator, dtype=dtype)
    mask = torch.ones(2, 3, dtype=torch.bool)
    texts = [TextEmbedding(hidden=draw(2, 3, width), mask=mask) for width in (2, 3)]
    return draw(2, 2, 2, 4, 4), torch.tensor([0.3, 0.8], dtype=dtype), texts


@pytest.fixture(scope="module")
def runs(start_job, sources, tmp_path_factory):
    """The folder of a run for each case on two processes, and of one that was stopped after two steps."""
    folder = tmp_path_factory.mktemp("lora")
    cases = {name: [*sources, *words] for name, words in CASES.items()}
    cases["whole"] = [*sources, *RESUMED]
    cases["stopped"] = [*sources, *RESUMED, "steps=2"]
    job = start_job("trained", cases, str(folder), size=2)
    assert job.wait() == [0, 0], job.text()
    job = start_job("trained", {"stopped": [*sources, *RESUMED]}, str(folder), size=2)
    assert job.wait() == [0, 0], job.text()
    return folder


@pytest.fixture(scope="module")
def reference(sources):
    task = prepared(sources)
    start = {name: value.detach().clone() for name, value in task.model.named_parameters()}
    return start, plain(task, task.config)


def test_fresh_adapters_change_nothing(sources, earlier):
    base = VideoDiT.from_pretrained(earlier / "dit")
    task = prepared(sources)
    assert torch.equal(task.model(*inputs()), base(*inputs()))
    adapters = {n: p for n, p in task.model.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * LAYERS * 2  # A and B, two blocks
    assert all(bool(value.any()) == ("lora_A" in name) for name, value in adapters.items())
    assert not torch.equal(moved(task).model(*inputs()), base(*inputs()))


def test_merged_weights_are_the_adapters(sources, earlier):
    task = moved(prepared(sources))
    state = {n: p.detach().double() for n, p in task.model.named_parameters() if p.requires_grad}
    merged = Merged(Weights(earlier / "dit"), [lora.trained(task.config.lora, state, "here")])
    model = VideoDiT(task.config.dit).double()
    model.load_state_dict(merged)
    arguments = inputs(torch.float64)
    torch.testing.assert_close(task.model.double()(*arguments), model(*arguments), rtol=1e-10, atol=1e-10)


def test_only_adapters_are_trained(reference):
    start, trained = reference
    for name, value in trained.model.named_parameters():
        assert value.requires_grad == ("lora_" in name), name
        if value.requires_grad:
            assert (value - start[name]).abs().max() > 1e-4, name
        else:
            assert value.grad is None and torch.equal(value, start[name]), name


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_a_plain_loop(runs, reference, case):
    start, trained = reference
    logged = [json.loads(line) for line in (runs / case / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in logged] == pytest.approx(trained.losses, rel=1e-5)
    assert [line["grad_norm"] for line in logged] == pytest.approx(trained.norms, rel=1e-4)
    last = runs / case / "checkpoints" / f"{STEPS:08d}"
    found, average = Shards(last, "model"), AveragedState(last)
    adapters = {name for name in start if "lora_" in name}
    assert set(average) == adapters
    with opened(last / "rest.safetensors") as rest:
        assert list(rest.keys()) == []
    assert {name.partition("/")[2] for name in found} == adapters
    for name in adapters:
        value = dict(trained.model.named_parameters())[name].detach()
        torch.testing.assert_close(found[f"master/{name}"], value, rtol=1e-4, atol=2e-5, msg=name)
        torch.testing.assert_close(average[name], trained.average[name], rtol=1e-4, atol=2e-5, msg=name)


def test_a_resumed_run_is_the_uninterrupted_one(runs):
    """With dropout, which no state of a generator goes through."""
    ends = [runs / name / "checkpoints" / f"{STEPS:08d}" for name in ("whole", "stopped")]
    whole, resumed = (AveragedState(end) for end in ends)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    without = AveragedState(runs / "zero3" / "checkpoints" / f"{STEPS:08d}")
    assert not all(torch.equal(whole[name], without[name]) for name in whole)


def test_a_recomputed_block_drops_the_same(sources):
    found = []
    for words in ([], ["parallel.checkpoint_every=1"]):
        task = moved(prepared([*sources, "lora.dropout=0.5", *words]))
        loss = task.loss(task.model, task.batch(0, 0, 1), 0).total
        loss.backward()
        found.append({n: p.grad for n, p in task.model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_blocks_with_adapters_are_whole_graphs(start_job, sources, tmp_path):
    """The hook for jaxtyping, which the tests have, would break it: a job is without."""
    job = start_job("adapted", [*sources, "parallel.compile=true"], str(tmp_path))
    assert job.wait() == [0], job.text()
    breaks, graphs, found, gradients = torch.load(tmp_path / "adapted.pt")
    assert breaks == {} and graphs == 2  # nothing before the first block wants a gradient
    task = prepared(sources)
    loss = task.loss(task.model, task.batch(0, 0, 1), 0).total
    loss.backward()
    torch.testing.assert_close(found, loss.detach())
    for name, parameter in task.model.named_parameters():
        assert (name in gradients) == parameter.requires_grad
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


def exported(run, out, *words):
    assert main(["export", str(run), str(out), *words]) == 0
    return out


def test_peft_reads_what_is_exported(runs, earlier, tmp_path):
    folder = exported(runs / "zero3", tmp_path / "adapter", "--adapter")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    base = VideoDiT.from_pretrained(earlier / "dit")
    ours = VideoDiT.from_pretrained(earlier / "dit", adapters=[read_adapter(str(folder))])
    before = base(*inputs())
    theirs = PeftModel.from_pretrained(base, str(folder))
    assert not torch.allclose(before, ours(*inputs()), atol=1e-3)
    torch.testing.assert_close(theirs(*inputs()), ours(*inputs()), rtol=1e-5, atol=1e-5)


def test_an_exported_backbone_has_them_merged(runs, earlier, tmp_path):
    adapter = exported(runs / "zero1", tmp_path / "adapter", "--adapter")
    merged = VideoDiT.from_pretrained(exported(runs / "zero1", tmp_path / "release") / "dit")
    added = VideoDiT.from_pretrained(earlier / "dit", adapters=[read_adapter(str(adapter))])
    for (name, value), other in zip(merged.state_dict().items(), added.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=2**-9, atol=2**-11, msg=name)  # of a file in fp16


def test_longer_tables_and_adapters_go_together(sources, earlier):
    """They are stretched as without adapters, and stay."""
    task = prepared([*sources, "dit.max_tokens=[8,8,8]"])
    plain_task = prepared([word for word in sources if "lora" not in word] + ["dit.max_tokens=[8,8,8]"])
    assert torch.equal(task.model.positions.time, plain_task.model.positions.time)
    assert not task.model.positions.time.requires_grad


def test_a_base_that_changed_is_refused(runs, sources, earlier, tmp_path, capsys):
    run, release = tmp_path / "run", tmp_path / "release"
    shutil.copytree(runs / "zero0", run)
    model = VideoDiT.from_pretrained(earlier / "dit")
    model.head.weight.data += 1
    model.save_pretrained(release / "dit", dtype=torch.float64)
    words = [word for word in sources if not word.startswith("init_from")]
    assert main([*words, f"init_from={release}", f"run={run}"]) == 2
    assert "init_from: " in (said := capsys.readouterr().err) and said.count("\n") == 1
    text = (run / "config.yaml").read_text().replace(str(earlier), str(release))
    (run / "config.yaml").write_text(text)
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "was trained on other weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["model=dit", "lora.rank=2"], r"^lora\.rank: needs model: dit and an init_from"),
        (["model=tae", "lora.rank=2", "init_from=x"], r"^lora\.rank: needs model: dit"),
        (["lora.rank=-1"], r"^lora\.rank: -1"),
        (["lora.alpha=0"], r"^lora\.alpha: 0"),
        (["lora.targets=[]"], r"^lora\.targets: name at least one"),
        (["lora.dropout=1"], r"^lora\.dropout: 1"),
    ],
)
def test_mistakes_name_the_key(words, line):
    with pytest.raises(UserError, match=line):
        load(RunConfig, words)


def test_a_target_that_is_no_linear_layer_is_named(sources):
    for target in ("attention.kv", "attention", "norm.query"):
        with pytest.raises(UserError, match=rf"^lora\.targets: {target} is no linear.*attention\.qkv"):
            task_of(load(RunConfig, [*sources, f"lora.targets=['{target}']"]))


def test_what_has_no_adapters_exports_none(runs, sources, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    text = (runs / "zero0" / "config.yaml").read_text().replace("rank: 2", "rank: 0")
    (run / "config.yaml").write_text(text)
    assert main(["export", str(run), str(tmp_path / "out"), "--adapter"]) == 2
    assert "trains no adapters" in capsys.readouterr().err


def test_the_plan_says_that_it_counts_all_weights(sources, capsys):
    words = [word for word in sources if not word.startswith(("data.latents", "dit.text_widths"))]
    large = ["data.buckets=['4x16x16@16']", "dit.latent_channels=16", "dit.text_widths=[4096,1472,1024]"]
    assert main(["plan", *words, *large]) == 2
    assert "lora.rank: the plan" in capsys.readouterr().err
