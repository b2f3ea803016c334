"""The planner on the two-stream backbone: parameters, FLOPs and activations against the model."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import load
from kinoflow.dit_video.mmdit import MMDiT, MMDiTConfig
from kinoflow.dit_video.parallel import ParallelConfig, parallelize
from kinoflow.train.__main__ import main
from kinoflow.train.plan.config import PlanConfig
from kinoflow.train.plan.flops import mmdit_flops, total
from kinoflow.train.plan.memory import Slice
from kinoflow.train.plan.mmdit import mmdit_activations
from kinoflow.train.plan.plan import plan
from tests.train.held import Saved

CONFIG = MMDiTConfig(
    width=160, depth=4, heads=4, text_widths=(64, 48), pooled_width=32, max_tokens=12,
    dual_attention_layers=(0, 2),
)  # fmt: skip
STAGE = ["configs/models/sd3_8b.yaml", "configs/stages/sd3_256.yaml", "cluster.gpus=512"]


def inputs(config, clips, text_tokens=(30, 7), device="cpu", dtype=torch.float32):
    side = 8
    pooled = torch.randn(clips, config.pooled_width, device=device) if config.pooled_width else None
    text = [
        TextEmbedding(
            hidden=torch.randn(clips, tokens, width, device=device).to(dtype),
            mask=torch.ones(clips, tokens).bool(),
            pooled=None if index or pooled is None else pooled.to(dtype),
        )
        for index, (tokens, width) in enumerate(zip(text_tokens, config.text_widths, strict=True))
    ]
    latent = torch.randn(clips, config.latent_channels, 1, 2 * side, 2 * side, device=device)
    return latent.to(dtype), torch.rand(clips, device=device), text


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("changed", [{}, {"dual_attention_layers": ()}, {"pooled_width": 0}])
def test_flops_are_what_torch_counts(changed, backward):
    config = replace(CONFIG, **changed)
    with torch.device("meta"):
        model = MMDiT(config)
    with FlopCounterMode(display=False) as counter:
        output = model(*inputs(config, 1, device="meta"))
        if backward:
            output.sum().backward()
    planned = total(mmdit_flops(config, 64, (30, 7)))
    assert (planned.model if backward else planned.forward) == pytest.approx(
        counter.get_total_flops(), rel=1e-9
    )


@pytest.mark.parametrize(("every", "clips"), [(0, 3), (1, 3), (2, 3), (0, 1)])
@pytest.mark.parametrize(
    "changed", [{}, {"qk_norm": False}, {"depth": 7}, {"dual_attention_layers": ()}, {"pooled_width": 0}]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_saves(precision, changed, every, clips):
    config, dtype = replace(CONFIG, **changed), torch.bfloat16 if precision == "bf16" else torch.float32
    model = MMDiT(config)
    model.init_weights()
    parallelize(model, ParallelConfig(checkpoint_every=every), None)
    given = inputs(config, clips, dtype=dtype)
    with Saved(model.to(dtype)) as saved:
        torch.nn.functional.mse_loss(model(*given).float(), torch.randn(given[0].shape))
    piece = Slice(tokens=64, text_tokens=(30, 7), clips=clips, precision=precision, sequence=1,
                  checkpoint_every=every)  # fmt: skip
    assert mmdit_activations(config, piece).saved == pytest.approx(saved.bytes, rel=0.05)


def test_the_plan_of_the_largest_model():
    planned = plan(load(PlanConfig, STAGE))
    assert sum(planned.parameters.values()) == pytest.approx(8e9, rel=0.03)
    assert planned.clips[0].tokens == 256 and planned.warnings == []
    with torch.device("meta"):
        model = MMDiT(load(PlanConfig, STAGE).mmdit)
    assert sum(planned.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert planned.flops["per_step"]["model"] == pytest.approx(
        4096 * total(mmdit_flops(model.config, 256, (333,))).model
    )
    sizes = {each.name: each.parameters for each in planned.encoders}
    assert sizes == {"clip_l": pytest.approx(123.7e6, rel=0.01), "clip_g": pytest.approx(694.7e6, rel=0.01),
                     "t5": pytest.approx(4.762e9, rel=0.01)}  # fmt: skip


def test_the_command(capsys):
    assert main(["plan", *STAGE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["fits"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["data.buckets=[16x256x256@16]"], "an mmdit makes pictures"),
        (["mmdit.text_widths=[4096,4096]"], "are not three widths"),
        (["parallel.sequence=2"], "parallel.sequence: only model: dit"),
    ],
)
def test_mistakes_are_one_line(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        plan(load(PlanConfig, [*STAGE, *changes]))
    assert "\n" not in str(caught.value)


def test_tables_that_end_too_early_are_named():
    planned = plan(load(PlanConfig, [*STAGE, "mmdit.max_tokens=8"]))
    assert any("raise mmdit.max_tokens" in warning for warning in planned.warnings)
