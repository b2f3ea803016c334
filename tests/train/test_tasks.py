"""The real tasks on two processes, at every ZeRO stage and in every way, against one plain loop."""

import json

import pytest
import torch

from kinoflow.configs.schema import load
from kinoflow.data.video import read
from kinoflow.dit_video import MMDiT, UNet, VideoDiT
from kinoflow.dit_video.backbone import BACKBONES
from kinoflow.train.__main__ import task_of
from kinoflow.train.run.averages import AveragedState
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.processes import Processes
from kinoflow.train.run.shards import Shards
from kinoflow.train.run.spread import Spread
from kinoflow.train.tasks.held_out import HeldOut, held_out_loss
from tests.labelled import CLASSES, write_pictures
from tests.train.plain import plain
from tests.train.test_tae import SOURCES as TINY_TAE

STEPS = 3
# A large eps: where a gradient is all rounding, Adam would make steps of full size of it.
COMMON = [f"steps={STEPS}", "log_every=1", "checkpoint_every=100", "ema_decay=0.9", "seed=3",
          "data.workers=0", "optimizer.lr=0.01", "deepspeed.persistent=0", "data.batch_size=4",
          "optimizer.eps=1e-3"]  # fmt: skip
BACKBONE = ["model=dit", "dit.width=16", "dit.depth=2", "dit.heads=2", "dit.ffn=24", "dit.latent_channels=2",
            "dit.text_widths=[2,3]", "dit.max_tokens=[4,8,8]"]  # fmt: skip
PICTURES = ["model=unet", "unet.channels=[4,8]", "unet.layers=1", "unet.width=6", "unet.classes=3",
            "unet.groups=2", "unet.attention_levels=[1]", "unet.heads=2", "flow.drop_all=0.3"]  # fmt: skip
STREAMS = ["model=mmdit", "mmdit.width=16", "mmdit.depth=2", "mmdit.heads=2", "mmdit.latent_channels=2",
           "mmdit.text_widths=[2,3]", "mmdit.max_tokens=4", "mmdit.patch=1",
           "mmdit.dual_attention_layers=[0]"]  # fmt: skip
# The adversary joins in the second step.
AUTOENCODER = [*TINY_TAE, "loss.adversarial_start=1", "data.buckets=['4x8x8@16']", "data.batch_size=4",
               "data.workers=0", f"preview_every={STEPS}"]  # fmt: skip
EVERY_STAGE = {
    "plain": [],
    "accumulated": ["deepspeed.accumulation=2"],
    "recomputed": ["parallel.checkpoint_every=1"],
    "sequence": ["parallel.sequence=2"],
    "optimizer_offload": ["deepspeed.offload=optimizer"],
}
LAST_STAGE = {
    "parameters_offload": ["deepspeed.offload=parameters"],
    "all": ["deepspeed.accumulation=2", "parallel.sequence=2", "parallel.checkpoint_every=2",
            "deepspeed.offload=parameters"],
}  # fmt: skip
WAYS = {
    f"zero{stage}-{way}": [f"deepspeed.zero_stage={stage}", *words]
    for stage in range(4)
    for way, words in (EVERY_STAGE | (LAST_STAGE if stage == 3 else {})).items()
    if stage > 0 or "offload" not in way
}
# The engine's ways are the same for each backbone: one of them goes every way, the others each way once.
ONCE = {
    *(f"zero{stage}-plain" for stage in range(4)), "zero1-optimizer_offload", "zero2-accumulated",
    "zero3-parameters_offload", "zero3-recomputed",
}  # fmt: skip
PREVIEW = [f"preview_every={STEPS}"]
ALONE = {way: words for way, words in WAYS.items() if not any("parallel." in word for word in words)}
CASES = (
    {f"dit-{way}": words for way, words in WAYS.items()}
    | {f"tae-{way}": words for way, words in ALONE.items()}
    | {f"unet-{way}": [*ALONE[way], *PREVIEW] for way in sorted(ONCE & ALONE.keys())}
    | {f"mmdit-{way}": WAYS[way] for way in sorted(ONCE)}
    | {f"known-{way}": WAYS[way] for way in sorted({*ONCE, "zero1-sequence"})}
)


def kind(case: str) -> str:
    return case.partition("-")[0]


def backbone(case: str) -> str:
    """What a run calls it."""
    return "dit" if kind(case) == "known" else kind(case)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """Backbones that have no zeros left; the transformer's position tables are shorter."""
    folder = tmp_path_factory.mktemp("earlier")
    models = {
        "dit": VideoDiT(load(RunConfig, [*BACKBONE, "dit.max_tokens=[2,4,4]"]).dit),
        "unet": UNet(load(RunConfig, PICTURES).unet),
        "mmdit": MMDiT(load(RunConfig, [*STREAMS, "mmdit.max_tokens=2"]).mmdit),
    }
    for name, model in models.items():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def sources(request, earlier, tmp_path_factory):
    """What each task's runs have in common."""
    folders = ("latents", "held_out", "stills", "keyframes")
    latents, held_out, stills, keyframes = map(request.getfixturevalue, folders)
    data = [f"data.latents={latents}", f"validation.latents={held_out}", "validation.every=1"]
    folders = [write_pictures(tmp_path_factory.mktemp("pictures"), seed=seed) for seed in range(2)]
    pictures = [f"data.latents={folders[0]}", f"validation.latents={folders[1]}", "validation.every=1"]
    held = [f"validation.latents={held_out}", "validation.every=1", f"data.latents={keyframes}"]
    # It begins to read what is known: the earlier backbone reads nothing.
    reading = ["dit.known=true", "known.first=0.2", "known.both=0.2", "known.prefix=0.3", "known.region=0.3"]
    frames = [f"data.latents={stills[0]}", f"validation.latents={stills[1]}", "validation.every=1"]
    return {
        "dit": [*COMMON, *BACKBONE, *data, f"init_from={earlier}"],
        "tae": [*COMMON, *AUTOENCODER],
        "unet": [*COMMON, *PICTURES, *pictures, f"init_from={earlier}"],
        "mmdit": [*COMMON, *STREAMS, *frames, f"init_from={earlier}"],
        "known": [*COMMON, *BACKBONE, *reading, *held, f"init_from={earlier}"],
    }


@pytest.fixture(scope="module")
def runs(start_job, sources, tmp_path_factory):
    """The folder of a run for each case, on two processes."""
    folder = tmp_path_factory.mktemp("tasks")
    cases = {name: [*sources[kind(name)], *words] for name, words in CASES.items()}
    job = start_job("trained", cases, str(folder), size=2)
    assert job.wait() == [0, 0], job.text()
    return folder


@pytest.fixture(scope="module")
def references(sources):
    """Each task in one process, with torch alone."""
    found = {}
    for model, words in sources.items():
        config = load(RunConfig, words)
        task = task_of(config)
        processes = Processes(rank=0, size=1, device=torch.device("cpu"))
        task.prepare(Spread(config=config, processes=processes))
        start = {name: value.detach().clone() for name, value in task.model.named_parameters()}
        found[model] = start, plain(task, config)
    return found


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_a_plain_loop(runs, references, sources, case):
    start, reference = references[kind(case)]
    folder = runs / case
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in logged] == pytest.approx(reference.losses, rel=1e-5)
    assert [line["grad_norm"] for line in logged] == pytest.approx(reference.norms, rel=1e-4)
    last = folder / "checkpoints" / f"{STEPS:08d}"
    found, average = Shards(last, "model"), AveragedState(last)
    fixed = {name for name, value in reference.model.named_parameters() if not value.requires_grad}
    assert {f"master/{name}" for name in start.keys() - fixed} <= set(found) and set(start) == set(average)
    assert fixed == ({"positions.rows", "positions.columns"} if kind(case) == "mmdit" else set())
    assert all(torch.equal(average[name], start[name]) for name in fixed)
    if kind(case) != "tae":
        config = load(RunConfig, sources[kind(case)])
        model = BACKBONES[backbone(case)](getattr(config, backbone(case)))
        model.load_state_dict(reference.average)
        alone = Processes(rank=0, size=1, device=torch.device("cpu"))
        held_out = held_out_loss(model, HeldOut(config.validation.latents, 64, 3), config.flow, alone)
        assert {key: logged[-1][key] for key in held_out} == pytest.approx(held_out, rel=1e-4)
        assert len({line["validation_loss"] for line in logged}) == STEPS, "of another average each"
    moved = 0
    trained = ((n, value) for n, value in reference.model.named_parameters() if n not in fixed)
    for name, value in trained:
        torch.testing.assert_close(found[f"master/{name}"], value.detach(), rtol=1e-4, atol=2e-5, msg=name)
        torch.testing.assert_close(average[name], reference.average[name], rtol=1e-4, atol=2e-5, msg=name)
        moved += bool((value - start[name]).abs().max() > 1e-3)
    assert moved > len(start) / 2


@pytest.mark.parametrize("stage", range(4))
def test_a_preview_shows_each_class(runs, stage):
    folder = runs / f"unet-zero{stage}-plain" / "previews"
    (shown,) = folder.iterdir()
    assert {path.name for path in shown.iterdir()} == {
        "samples.png",
        *(f"{i}.png" for i in range(len(CLASSES))),
    }
    pictures = [read(shown / f"{i}.png") for i in range(len(CLASSES))]
    assert all(picture.shape == (1, 8, 8, 3) for picture in pictures)
    assert not (pictures[0] == pictures[1]).all()
