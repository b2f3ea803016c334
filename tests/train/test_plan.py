"""The planner: parameters and FLOPs of every configuration against the model; what it says of a cluster."""

import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.configs.schema import load
from kinoflow.dit_video.video_dit import DiTConfig, VideoDiT
from kinoflow.train.plan.config import ClusterConfig, PlanConfig
from kinoflow.train.plan.flops import dit_flops, tae_flops, total
from kinoflow.train.plan.memory import GIB
from kinoflow.train.plan.plan import plan as make_plan
from kinoflow.train.plan.planner import Planner
from kinoflow.train.plan.workload import count_parts
from kinoflow.train.run.processes import Processes
from kinoflow.train.run.spread import Spread
from kinoflow.train.tasks.flow import FlowBatch
from kinoflow.train.tasks.flow_task import FlowTask

ROOT = Path(__file__).parents[2]
MOVIE_GEN = {"width": 6144, "depth": 48, "heads": 48, "ffn": 16384, "text_widths": (4096, 1536, 1024)}
DITS = sorted((ROOT / "configs" / "models").glob("dit_*.yaml"))
TAES = sorted((ROOT / "configs" / "models").glob("tae_*.yaml"))
# The published size on a stage of one bucket, so that a figure can be worked out by hand.
PAPER = (
    "model=dit", "dit.width=6144", "dit.depth=48", "dit.heads=48", "dit.ffn=16384",
    "dit.text_widths=[4096,1536,1024]", "dit.max_tokens=[32,48,48]", "data.buckets=[256x768x768@16]",
    "data.batch_size=1536", "deepspeed.zero_stage=3", "deepspeed.precision=bf16", "steps=74500",
    "parallel.sequence=8", "parallel.checkpoint_every=1", "cluster.gpus=6144",
)  # fmt: skip

BUCKETS = ("data.buckets=[16x64x64@16]",)
STAGE = ["configs/models/dit_30b.yaml", "configs/stages/t2iv_768.yaml", "cluster.gpus=6144"]

every_dit = pytest.mark.parametrize("path", DITS, ids=lambda path: path.stem)


def dit_of(path):
    return load(PlanConfig, [str(path)]).dit


@cache
def plan(*changes, base=PAPER):
    return make_plan(load(PlanConfig, [*base, *changes]))


def meta(config):
    with torch.device("meta"):
        return VideoDiT(replace(config, attention="sdpa"))


def count_flops(config, grid, text_tokens, backward):
    """torch's own counter around one clip on the meta device."""
    model = meta(config)
    with torch.device("meta"):
        sizes = [tokens * size for tokens, size in zip(grid, config.patch_size, strict=True)]
        latent = torch.empty(1, config.latent_channels, *sizes)
        text = [TextEmbedding(hidden=torch.empty(1, tokens, width), mask=torch.ones(1, tokens).bool())
                for tokens, width in zip(text_tokens, config.text_widths, strict=True)]  # fmt: skip
        with FlopCounterMode(display=False) as counter:
            output = model(latent, torch.empty(1), text)
            if backward:
                output.sum().backward()
    return counter.get_total_flops()


def closed_parameters(config):
    """Written out from the paper's architecture: what each part must have."""
    d, n, patch = config.width, config.depth, config.latent_channels * prod(config.patch_size)
    head_gains = 2 * d // config.heads if config.qk_norm else 0
    return {
        "embed": patch * d + d,
        "positions": sum(config.max_tokens) * d,
        "time": 256 * d + d + d * d + d,
        "modulation": 6 * d * (d + 1),
        "text": sum((width + 1) * d + 2 * d for width in config.text_widths),
        "blocks.modulation_bias": n * 6 * d,
        "blocks.attention": n * (4 * d * d + head_gains),
        "blocks.cross_norm": n * d,
        "blocks.cross_attention": n * (4 * d * d + head_gains),
        "blocks.ffn": n * 3 * d * config.ffn,
        "head_modulation": 2 * d * (d + 1),
        "head": (d + 1) * patch,
    }


@every_dit
def test_parameters_are_those_of_the_model_by_part(path):
    config = dit_of(path)
    planned = plan(str(path), *BUCKETS, "cluster.gpus=8", base=()).parameters
    assert planned == closed_parameters(config)
    assert sum(planned.values()) == sum(p.numel() for p in meta(config).parameters())


def test_the_paper_has_thirty_billion():
    parameters = plan().parameters
    assert 28.9e9 < sum(parameters.values()) < 31e9
    assert parameters == closed_parameters(DiTConfig(**MOVIE_GEN, max_tokens=(32, 48, 48)))


@pytest.mark.parametrize("path", TAES, ids=lambda path: path.stem)
def test_the_autoencoder_has_a_plan(path):
    alone = (*BUCKETS, "data.batch_size=8", "loss.adversarial=0")
    planned = plan(str(path), *alone, base=())
    from kinoflow.tae.model.tae import TAE

    with torch.device("meta"):
        model = TAE(planned_tae := load(PlanConfig, [str(path)]).tae)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 16, 64, 64)).video.sum().backward()
    assert planned.parameters == count_parts(model)
    assert total(tae_flops(planned_tae, 16, 64, 64)).model == counter.get_total_flops()
    assert planned.memory.kinds["activations"] > 0 and planned.encoders == () and planned.precomputation == {}


def test_a_discriminator_is_part_of_the_plan():
    alone, beside = (
        plan("model=tae", *BUCKETS, f"loss.adversarial={weight}", base=()) for weight in (0, 0.05)
    )
    added = beside.parameters["discriminator"]
    assert added > 1e6 and sum(beside.parameters.values()) == sum(alone.parameters.values()) + added
    assert beside.memory.kinds["optimizer"] > alone.memory.kinds["optimizer"]


@every_dit
@pytest.mark.parametrize("backward", [False, True])
def test_flops_are_what_torch_counts(path, backward):
    """Every width of the file with three blocks: a block more is the same figure once more."""
    config = replace(dit_of(path), depth=3)
    for grid, text in (((4, 8, 8), (30, 6, 20)), ((min(config.max_tokens), 8, 4), (512, 100, 256))):
        planned = total(dit_flops(config, prod(grid), text))
        counted = count_flops(config, grid, text, backward)
        assert (planned.model if backward else planned.forward) == pytest.approx(counted, rel=1e-9)


@pytest.mark.parametrize("backward", [False, True])
def test_flops_of_the_paper_at_its_longest(backward):
    config = DiTConfig(**{**MOVIE_GEN, "depth": 3}, max_tokens=(32, 48, 48))
    planned = total(dit_flops(config, 73_728, (512, 100, 256)))
    counted = count_flops(config, (32, 48, 48), (512, 100, 256), backward)
    assert (planned.model if backward else planned.forward) == pytest.approx(counted, rel=1e-9)


def test_recomputation_is_a_forward_pass_of_the_blocks():
    config = DiTConfig(attention="math")
    model = meta(config)
    for block in model.blocks:
        run = block.forward
        block.forward = lambda *args, run=run: torch.utils.checkpoint.checkpoint(
            run, *args, use_reentrant=False
        )
    with torch.device("meta"):
        text = [TextEmbedding(hidden=torch.empty(1, 9, width), mask=torch.ones(1, 9).bool())
                for width in config.text_widths]  # fmt: skip
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 16, 4, 16, 16), torch.empty(1), text).sum().backward()
    planned = total(dit_flops(config, 4 * 8 * 8, (9, 9, 9)))
    assert planned.model + planned.recomputed == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_a_step_adds_up():
    planned = plan()
    step, clip = (
        planned.flops["per_step"],
        total(dit_flops(load(PlanConfig, PAPER).dit, 73_728, (512, 100, 256))),
    )
    assert planned.clips[0].tokens == 73_728 and planned.flops["tokens_per_step"] == 1536 * 73_728
    assert step["forward"] == pytest.approx(1536 * clip.forward)
    assert step["hardware"] == pytest.approx(1536 * (clip.model + clip.recomputed + clip.attention / 2))
    assert planned.flops["per_token"]["model"] * 1536 * 73_728 == pytest.approx(step["model"])
    seconds = step["model"] / (6144 * 989e12 * 0.4)
    assert planned.time["step_seconds"] == pytest.approx(seconds)
    assert planned.time["days"] == pytest.approx(74_500 * seconds / 86_400)
    assert planned.time["hardware_utilization"] == pytest.approx(0.4 * step["hardware"] / step["model"])


@pytest.mark.parametrize("name", ["dit_1b", "dit_5b", "dit_30b"])
def test_text_is_planned_before_training_and_not_in_it(name):
    """Training reads its states: without encoders a step of the stage of images is within the GPUs' power."""
    stage = ["configs/stages/t2i_256.yaml", "cluster.gpus=1536"]
    planned = plan(f"configs/models/{name}.yaml", *stage, base=())
    before, step = planned.precomputation, planned.flops["per_step"]
    assert before["weights"] == sum(2 * encoder.parameters for encoder in planned.encoders) > 16 * GIB
    assert before["prompt_flops"] == sum(2 * e.parameters * e.tokens for e in planned.encoders)
    widths = load(PlanConfig, [f"configs/models/{name}.yaml"]).dit.text_widths
    assert before["prompt_states"] == 2 * sum(n * w for n, w in zip((512, 100, 256), widths, strict=True))
    hours = before["prompt_flops"] * 1e6 / (0.4 * 989e12) / 3600
    assert before["gpu_hours_per_million"] == pytest.approx(hours)
    parts = ("forward", "backward", "recomputation", "fused_attention")
    assert step["hardware"] == pytest.approx(sum(step[part] for part in parts))
    assert 0.4 < planned.time["hardware_utilization"] < 0.6
    assert "text_encoders" not in planned.memory.kinds
    assert not [warning for warning in planned.warnings if "cluster.mfu" in warning]


def test_every_other_block_costs_half_the_recomputation():
    whole, half, none = (plan(f"parallel.checkpoint_every={n}").flops["per_step"] for n in (1, 2, 0))
    assert half["recomputation"] == pytest.approx(whole["recomputation"] / 2)
    assert none["recomputation"] == 0 and none["hardware"] < half["hardware"] < whole["hardware"]


def test_buckets_share_the_steps_by_weight():
    both = plan("data.buckets=[256x768x768@16 weight=3, 1x768x768@16 weight=1 batch=512]")
    video, image = (
        plan(f"data.buckets=[{name}]").flops for name in ("256x768x768@16", "1x768x768@16 batch=512")
    )
    for key, value in both.flops["per_step"].items():
        assert value == pytest.approx(0.75 * video["per_step"][key] + 0.25 * image["per_step"][key])
    assert both.memory.clip.startswith("256x"), "memory is that of the largest"


@pytest.mark.parametrize(
    ("key", "larger", "kinds"),
    [
        ("deepspeed.zero_stage=2", True, ["parameters"]),
        ("deepspeed.zero_stage=2 deepspeed.precision=fp32", True, ["parameters", "gradients"]),
        ("cluster.gpus=48", True, ["optimizer", "ema"]),
        ("parallel.sequence=24 deepspeed.accumulation=6", False, ["activations"]),
        ("parallel.checkpoint_every=0", True, ["activations"]),
        ("parallel.checkpoint_every=4", True, ["activations"]),
        ("deepspeed.offload=optimizer", False, ["optimizer", "ema"]),
        ("deepspeed.offload=parameters", False, ["parameters"]),
        ("deepspeed.precision=fp32", True, ["parameters", "activations"]),
    ],
)
def test_memory_follows_the_settings(key, larger, kinds):
    before, after = plan().memory, plan(*key.split()).memory
    for kind in kinds:
        assert (after.kinds[kind] > before.kinds[kind]) == larger and after.kinds[kind] != before.kinds[kind]
    assert after.peak == sum(after.kinds.values())
    assert ("offload" in key) == (after.host > 0)


def test_the_smallest_cluster_fits_and_the_next_smaller_does_not():
    planner = Planner(load(PlanConfig, PAPER))
    found = planner.smallest([planner.inputs])
    assert found is not None and found["peak"] <= planner.inputs.budget
    assert found["gpus"] % 8 == 0 and 1536 % (found["gpus"] // 8) == 0
    held = {field: found[field] for field in ("gpus", "accumulation")}
    assert planner.memory(replace(planner.inputs, **held)).peak == found["peak"]
    halved = replace(planner.inputs, gpus=found["gpus"] // 2, accumulation=found["accumulation"] * 2)
    assert not planner.fits(halved)
    free = planner.smallest(planner.settings())
    assert free is not None and free["gpus"] <= found["gpus"]


def test_what_does_not_fit_is_said_with_a_remedy_that_fits():
    planned = plan("parallel.checkpoint_every=0", "cluster.memory_gib=60")
    line = next(warning for warning in planned.warnings if warning.startswith("memory:"))
    assert "256x768x768@16" in line and "activations" in line
    remedy = line.partition("; set ")[2].partition(", which")[0].split()
    assert remedy, line
    assert not [w for w in plan("cluster.memory_gib=60", *remedy).warnings if w.startswith("memory:")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["cluster.gpus=100"], "no whole nodes of 8"),
        (["parallel.sequence=7"], "does not divide dit.heads=48"),
        (["parallel.sequence=5", "cluster.gpus=6144"], "does not divide cluster.gpus"),
        (["parallel.sequence=16"], "more than a node"),
        (["data.batch_size=100"], "does not divide into 768 slices"),
        (["dit.max_tokens=[32,24,48]"], "position table ends at 24"),
        (["cluster.memory_gib=7", "cluster.reserve_gib=6.9"], "no setting of this batch fits"),
        (["cluster.mfu=0.8"], "recomputed leaves"),
        (["dit.attention=math"], "math keeps scores"),
    ],
)
def test_warnings(changes, words):
    assert any(words in warning for warning in plan(*changes).warnings)


def test_a_good_plan_has_no_warning():
    assert plan().warnings == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model=judge", "parallel.sequence=1", "parallel.checkpoint_every=0"], "model: judge"),
        (["cluster.mfu=40"], "cluster.mfu"),
        (["cluster.gpus=0"], "cluster.gpus"),
        (["cluster.reserve_gib=90"], "cluster.reserve_gib"),
        (["dit.text_widths=[4096,1536]"], "dit.text_widths"),
        (["dit.text_widths=[4096,1537,1024]"], "no byt5 is 1537 wide"),
        (["data.buckets=[256x769x768@16]"], "data.buckets: 256x769x768@16"),
        (["data.buckets=[1x8x8@16]"], "patch_size"),
        (["data.buckets=[1x64x64@16 weight=0]"], "weight above 0"),
        (["cluster.gpu=6"], "cluster.gpus"),
        (["data.buckets=null"], "data.buckets: the plan needs the clips"),
    ],
)
def test_mistakes_are_one_line(changes, words, capsys):
    from kinoflow.train.__main__ import main

    assert main(["plan", *PAPER, *changes]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_usage(capsys):
    from kinoflow.train.__main__ import main

    assert main(["plan"]) == 2 and main(["plan", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(key.name in shown for key in fields(ClusterConfig)) and "--json" in shown


def test_the_table_has_the_figures_of_the_json(capsys):
    from kinoflow.train.__main__ import main

    assert main(["plan", *PAPER, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert main(["plan", *PAPER]) == 0
    table = capsys.readouterr().out
    assert f"{figures['parameters']['total']:,}" in table
    assert f"{figures['memory']['peak'] / GIB:.2f}" in table
    assert f"{figures['time']['days']:.3g} days" in table
    assert figures["memory"]["fits"] and figures["warnings"] == []
    assert figures["inputs"]["sequence"] == 8 and figures["clips"][0]["micro_batch"] == 2
    assert [encoder["source"] for encoder in figures["text_encoders"]][:2] == [
        "google/ul2",
        "google/byt5-large",
    ]


# The mark of /proc, not ru_maxrss: that one begins at what the parent held when it started the process.
COMMAND = """
import sys
from pathlib import Path
from kinoflow.__main__ import main
status = main(["train", "plan", *sys.argv[1:]])
heavy = {"deepspeed", "transformers", "diffusers", "av", "zarr", "tensorboard", "kinoflow.train.run.loop"}
print(*(heavy & sys.modules.keys()), file=sys.stderr)
proc = Path("/proc/self/status")
mark = proc.read_text().partition("VmHWM:")[2].split()[0] if proc.exists() else 0
print(mark, file=sys.stderr)
sys.exit(status)
"""


def test_the_command_is_small_and_prints_what_the_page_shows():
    """docs/planning.md, as wide as a pipe; within 4 GiB for 30 billion parameters, without what trains."""
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    block = re.search(r"```console\n\$ kinoflow train plan ([^\n]+)\n(.*?)```", page, re.DOTALL)
    assert block is not None and block[1].split() == STAGE
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *STAGE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    printed = "\n".join(line.rstrip() for line in done.stdout.splitlines())
    assert block[2].strip() == printed.strip()
    assert 28.9e9 < int(re.search(r"total +([\d,]+)", printed)[1].replace(",", "")) < 31e9
    heavy, kilobytes = done.stderr.splitlines()
    assert heavy == ""
    assert int(kilobytes) < 4 * 2**20


@pytest.mark.parametrize("name", ["mini_dit", "mini_tae"])
def test_the_mini_recipes_have_a_plan(name):
    planned = plan(f"configs/{name}.yaml", "cluster.gpus=1", base=())
    assert planned.memory.peak < planned.inputs.budget
    assert [encoder.tokens for encoder in planned.encoders] in ([], [128, 64, 64]), (
        "of the release's tokenizers"
    )


def test_the_log_of_a_run_counts_the_same_flops():
    """What train.metrics turns into MFU."""
    config = load(PlanConfig, ["model=dit", "dit.depth=2"])
    task = FlowTask(config)
    task.prepare(Spread(config=config, processes=Processes(rank=0, size=1, device=torch.device("cpu"))))
    text = tuple(TextEmbedding(hidden=torch.zeros(3, n, width), mask=torch.ones(3, n).bool())
                 for n, width in zip((5, 2, 4), config.dit.text_widths, strict=True))  # fmt: skip
    latent = torch.zeros(3, 16, 2, 8, 6)
    batch = FlowBatch(
        latent=latent, noise=latent, time=torch.zeros(3), condition=text, dropout=torch.tensor(0)
    )
    with FlopCounterMode(display=False) as counter:
        task.loss(task.model, batch, 0).total.backward()
    # The counter does not know the fused backward pass of a CPU.
    assert task.flops(batch) == 3 * total(dit_flops(config.dit, 2 * 4 * 3, (5, 2, 4))).model
    assert 0.8 * task.flops(batch) < counter.get_total_flops() <= task.flops(batch)
