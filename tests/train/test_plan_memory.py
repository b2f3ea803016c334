"""The plan's memory against what two DeepSpeed processes hold, kind by kind."""

import json
from dataclasses import replace
from math import prod

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from kinoflow.configs.schema import load
from kinoflow.dit_video.parallel import parallelize
from kinoflow.dit_video.video_dit import VideoDiT
from kinoflow.tae.model.config import TAEConfig
from kinoflow.tae.model.tae import TAE
from kinoflow.train.plan.config import PlanConfig, read_inputs
from kinoflow.train.plan.memory import Slice, dit_activations, tae_activations, zero_states
from kinoflow.train.plan.workload import optimizer_sizes
from tests.train.held import LATENT, TEXT_TOKENS, Saved, batch, loss

MODEL = ["model=dit", "dit.width=320", "dit.depth=3", "dit.heads=4", "dit.ffn=896",
         "dit.text_widths=[64,48,32]", "dit.max_tokens=[4,8,8]", "data.batch_size=4"]  # fmt: skip
# ZeRO 3 keeps weights of fewer than 100,000 elements whole: only its cases need a model as wide as that.
NARROW = ["dit.width=160", "dit.ffn=448"]
CASES = {
    name: [*MODEL, f"deepspeed.precision={name[:4]}", f"deepspeed.zero_stage={name[9]}", *more]
    for name, more in {
        "fp32_zero0": NARROW,
        "fp32_zero1": NARROW,
        "fp32_zero2": NARROW,
        "fp32_zero3": [],
        "bf16_zero1": NARROW,
        "bf16_zero2": NARROW,
        "bf16_zero3": [],
        "bf16_zero2_sequence": [*NARROW, "parallel.sequence=2"],
        "bf16_zero2_plain_keys": [*NARROW, "parallel.sequence=2", "dit.qk_norm=false"],
        "fp32_zero3_checkpoint": ["parallel.checkpoint_every=2"],
        "bf16_zero2_both": ["parallel.sequence=2", "parallel.checkpoint_every=1"],
    }.items()
}
TOKENS = prod(LATENT) // 4
KINDS = ("parameters", "gradients", "optimizer", "ema", "step")


@pytest.fixture(scope="module")
def held(start_job, tmp_path_factory):
    """The figures of each case, a list over ranks."""
    folder = tmp_path_factory.mktemp("held")
    job = start_job("held", CASES, str(folder), size=2)
    assert job.wait() == [0, 0], job.text()
    return {
        case: [json.loads((folder / f"{case}.{rank}.json").read_text()) for rank in range(2)]
        for case in CASES
    }


def sizes(config):
    with torch.device("meta"):
        return optimizer_sizes(VideoDiT(config.dit))


def piece(config, clips):
    parallel = config.parallel
    return Slice(tokens=TOKENS, text_tokens=TEXT_TOKENS, clips=clips, precision=config.deepspeed.precision,
                 sequence=parallel.sequence, checkpoint_every=parallel.checkpoint_every)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_states_are_what_two_processes_hold(held, case):
    config = load(PlanConfig, CASES[case])
    sharding = replace(read_inputs(config).sharding, ranks=2)
    planned = zero_states(sizes(config), sharding)
    for kind in KINDS:
        if config.deepspeed.zero_stage == 0 and kind == "step":
            continue
        most = max(figures[kind] for figures in held[case])
        assert getattr(planned, kind) == pytest.approx(most, rel=0.1), kind


@pytest.mark.parametrize("case", CASES)
def test_activations_are_what_two_processes_save(held, case):
    config = load(PlanConfig, CASES[case])
    clips = config.data.batch_size // (2 // config.parallel.sequence)
    planned = dit_activations(config.dit, piece(config, clips))
    for figures in held[case]:
        assert planned.saved == pytest.approx(figures["activations"], rel=0.1)


def make(*changes):
    """A model ready for its loss, its gradients there, and the context that the engine runs it in."""
    config = load(PlanConfig, [*MODEL, "deepspeed.zero_stage=3", *changes])
    model = VideoDiT(config.dit)
    model.init_weights()
    parallelize(model, config.parallel, None)
    bf16 = config.deepspeed.precision == "bf16"
    model = model.bfloat16() if bf16 else model
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return config, model, torch.autocast("cpu", torch.bfloat16, enabled=bf16)


@pytest.mark.parametrize(
    "changed", ["dit.qk_norm=true", "dit.qk_norm=false", "dit.depth=7", "dit.ffn=64", "dit.heads=20"]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_follow_every_size(precision, changed):
    config, model, mixed = make(f"deepspeed.precision={precision}", changed)
    with Saved(model) as saved, mixed:
        loss(model, batch(config, 3), 0)
    assert dit_activations(config.dit, piece(config, 3)).saved == pytest.approx(saved.bytes, rel=0.05)


@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_of_a_backward_pass(precision, every):
    """Activations and all that comes and goes with them, seen by torch's own tracker of every storage."""
    config, model, mixed = make(f"deepspeed.precision={precision}", f"parallel.checkpoint_every={every}")
    inputs, tracker = batch(config, 4), MemTracker()
    tracker.track_external(model)
    with tracker:
        with mixed:
            value = loss(model, inputs, 0).total
        value.backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    lasting = sum(2 * p.nbytes for p in model.parameters())
    planned = dit_activations(config.dit, piece(config, 4))
    assert planned.saved + planned.workspace == pytest.approx(peak["Total"] - lasting, rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [(16, 32, 32), (9, 16, 32)])
def test_activations_of_the_autoencoder(precision, size):
    one = (1, 1, 1, 1)
    config = TAEConfig(channels=32, multipliers=(1, 2, 2, 2), encoder_blocks=one, decoder_blocks=one)
    model = TAE(config)
    model.init_weights()
    bf16 = precision == "bf16"
    model = model.bfloat16() if bf16 else model
    with Saved(model) as saved, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(torch.rand(1, 3, *size))
    assert tae_activations(config, size, precision) == saved.bytes
