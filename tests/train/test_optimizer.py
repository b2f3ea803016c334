"""Learning rates, groups and the EMA's warm-up in closed form."""

import pytest
import torch
from torch import nn

from kinoflow.train.run.clipping import Clipping
from kinoflow.train.run.config import OptimizerConfig
from kinoflow.train.run.ema import EMA, Fragment, decay_at
from kinoflow.train.run.optimizer import learning_rate, parameter_groups
from kinoflow.train.run.shards import Shards, write_pieces


def rate(step, **settings):
    return learning_rate(OptimizerConfig(lr=2.0, **settings), step, 101)


def test_schedules():
    assert [rate(step, warmup_steps=4) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rate(100, schedule="constant") == 2.0
    assert rate(50, schedule="linear", final_fraction=0.1) == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert rate(25, schedule="cosine") == pytest.approx(2 * 0.5 * (1 + 0.5**0.5))
    for schedule in ("linear", "cosine"):
        assert rate(100, schedule=schedule, final_fraction=0.1, warmup_steps=10) == pytest.approx(0.2)
        assert rate(10, schedule=schedule, warmup_steps=10) == pytest.approx(2.0)
        assert rate(500, schedule=schedule, final_fraction=0.1) == pytest.approx(0.2), "longer than planned"


def test_only_matrices_decay_and_frozen_parameters_stay_out():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv3d(4, 2, 1))
    module[2].requires_grad_(False)
    decayed, plain = parameter_groups(module, 0.1)
    assert [p.shape for p in decayed["params"]] == [(4, 3)] and decayed["weight_decay"] == 0.1
    assert len(plain["params"]) == 3 and plain["weight_decay"] == 0.0


@pytest.mark.parametrize("offloaded", [False, True])
def test_average_of_a_constant_and_of_a_step(offloaded):
    master = torch.zeros(3)
    read = master.clone if offloaded else lambda: master  # offloaded masters come as copies
    ema = EMA([Fragment(name="w", shape=(3,), start=0, read=read)], 0.5)
    master.fill_(1.0)
    want = 0.0
    for step in range(20):
        ema.update(step)
        want += (1 - min(0.5, (1 + step) / (10 + step))) * (1 - want)
        assert ema.pieces()["w"].value.tolist() == pytest.approx([want] * 3)
    assert decay_at(0.9999, 10**6) == 0.9999 and decay_at(0.9999, 0) == 0.1


def test_average_keeps_the_memory_format(tmp_path):
    master = torch.randn(2, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d)
    ema = EMA([Fragment(name="w", shape=tuple(master.shape), start=0, read=lambda: master)], 0.9)
    assert ema.values[0].stride() == master.stride()
    pieces = ema.pieces()
    assert torch.equal(pieces["w"].value, master.contiguous().flatten())
    write_pieces(tmp_path / "ema_00000.safetensors", pieces)
    master.zero_()
    ema.update(0)
    assert not torch.equal(ema.pieces()["w"].value, pieces["w"].value)
    ema.load(Shards(tmp_path, "ema"))
    assert torch.equal(ema.pieces()["w"].value, pieces["w"].value)
    assert ema.values[0].stride() == master.stride()


def test_the_bound_is_a_multiple_of_the_running_mean():
    clipping = Clipping(OptimizerConfig(grad_clip=5.0, adaptive_clip=2.0))
    assert clipping.bound == 5.0, "nothing is known yet"
    clipping.saw(1.0)
    assert clipping.bound == pytest.approx(2.0)
    clipping.saw(1000.0)  # counts as 2
    mean = (0.98 * 1 + 2) / (0.98 + 1)
    assert clipping.bound == pytest.approx(2 * mean)
    again = Clipping(OptimizerConfig(grad_clip=5.0, adaptive_clip=2.0))
    again.load(clipping.counters())
    assert again.bound == clipping.bound
    for _ in range(1000):
        clipping.saw(100.0)
    assert clipping.bound == 5.0, "it grows step by step, to the fixed one"
    alone = Clipping(OptimizerConfig(grad_clip=0.0, adaptive_clip=2.0))
    assert alone.bound == 0.0
    alone.saw(3.0)
    assert alone.bound == pytest.approx(6.0)
    assert Clipping(OptimizerConfig(grad_clip=0.0)).bound == 0.0
