"""What the processes of test_parallel.py and test_zero.py run: a spread backbone, ZeRO-3 from meta, sums."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from kinoflow.configs.schema import load
from kinoflow.dit_video.parallel import ParallelConfig, parallelize
from kinoflow.train.run import engine
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.spread import Spread
from kinoflow.train.run.task import Loss
from kinoflow.train.tasks.flow_task import FlowTask
from tests.dit_video.test_attention import ragged_text
from tests.dit_video.test_model import CONFIG, build, latent, text

SHAPE = (3, 6, 6)  # 27 tokens: neither two nor four divides them
KERNELS = ("math", "sdpa")
ONE_BLOCK = replace(CONFIG, depth=1)
SMALL = 2**-9  # what a sum of 1 and more loses in bf16, one at a time


def result(model, *, packed=False):
    """Velocities of a batch of uneven length, its text padded or packed, and all gradients of a loss."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(5)
    clip = torch.randn(4, *SHAPE, generator=generator, dtype=torch.float64)
    time = torch.rand(2, generator=generator, dtype=torch.float64)
    with mock.patch("kinoflow.dit_video.video_dit.packs", lambda _: packed):
        found = model(torch.stack((clip, -clip)), time, ragged_text()).flatten()
    (found.square() + found).sum().backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def sequence(folder):
    """Every rank's outputs and mean gradients of every case, written by rank 0 once they are equal on all."""
    processes = engine.start(1)
    try:
        group = dist.new_group(list(range(processes.size)))
        saved = {}
        for kernel in KERNELS:
            for every in (0, 1):
                model = build(config(kernel))
                parallelize(model, ParallelConfig(sequence=processes.size, checkpoint_every=every), group)
                for packed in (False, True):
                    found, gradients = result(model, packed=packed)
                    for gradient in gradients.values():
                        dist.all_reduce(gradient)
                        gradient.div_(processes.size)
                    first = found.clone()
                    dist.broadcast(first, 0)
                    assert torch.equal(first, found), "the output differs between ranks"
                    saved[kernel, every, packed] = (found, gradients)
        if processes.rank == 0:
            torch.save(saved, Path(folder) / "sequence.pt")
        return 0
    finally:
        engine.stop()


def compiled(folder):
    """Outputs and gradients of compiled blocks, kept and recomputed, with the counts of breaks and graphs."""
    saved = {}
    for every in (0, 1):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = build(ONE_BLOCK)
        parallelize(model, ParallelConfig(compile=True, checkpoint_every=every), None)
        found, gradients = result(model)
        counters = torch._dynamo.utils.counters
        saved[every] = (found, gradients, dict(counters["graph_break"]), counters["stats"]["unique_graphs"])
    torch.save(saved, Path(folder) / "compiled.pt")
    return 0


def config(kernel):
    return replace(CONFIG, attention=kernel)


def sharded(folder, sources):
    """The model from the meta device under ZeRO-3; this rank's masters before and after one step."""
    settings = load(RunConfig, sources)
    processes = engine.start(1, settings.parallel.sequence)
    try:
        task = FlowTask(settings)
        model = task.model
        assert all(p.is_meta for p in model.parameters())
        filled, fill = {}, task._fill

        def watched(name, value):
            filled[name] = sum(p.numel() for p in model.parameters() if not p.is_meta)
            fill(name, value)

        # Graphs are those of inductor, without the minutes that it takes.
        traced = partial(torch.compile, backend="aot_eager")
        with mock.patch.object(task, "_fill", watched), mock.patch("torch.compile", traced):
            task.prepare(Spread(config=settings, processes=processes))
        run = engine.Engine(model, loss, settings, processes)
        before = [(f.name, f.shape, f.start, f.read().clone()) for f in run.fragments()]
        assert all(p.numel() < max(p.ds_numel, 2) for p in model.blocks.parameters()), (
            "a block lies here whole"
        )
        for step in range(3):
            run.backward(processes.replica, step)
            run.update(1e-2)
        after = [(f.name, f.shape, f.start, f.read().clone()) for f in run.fragments()]
        counters = torch._dynamo.utils.counters
        graphs = dict(counters["graph_break"]), counters["stats"]["unique_graphs"]
        torch.save((before, after, filled, graphs), Path(folder) / f"{processes.rank}.pt")
        return 0
    finally:
        engine.stop()


def loss(model, replica, step):
    """A regression on one clip of the replica's own."""
    x, time = latent(2)
    target = x.roll(1, -1)[replica : replica + 1].float()
    own = [type(e)(hidden=e.hidden[:1].float(), mask=e.mask[:1]) for e in text(2)]
    velocity = model(x[replica : replica + 1].float(), time[replica : replica + 1].float(), own)
    return Loss(total=F.mse_loss(velocity, target))


class Weight(nn.Module):
    """Each of its weights has the gradient 1 in the first slice, and SMALL in the others."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


def summed(cases, folder):
    """The global gradient norm of one step, and of a second that nothing of the first may be left in."""
    processes = engine.start(1)
    try:
        for name, sources in cases.items():
            settings = load(RunConfig, sources)
            model = Weight()
            if settings.deepspeed.precision == "bf16" and settings.deepspeed.zero_stage > 0:
                model = model.bfloat16()
            run = engine.Engine(model, weighed, settings, processes)
            norms = []
            for _ in range(2):
                for micro in range(settings.deepspeed.accumulation):
                    run.backward(1.0 if (processes.rank, micro) == (0, 0) else SMALL)
                norms.append(float(run.update(1e-3)["grad_norm"]))
            torch.save(norms, Path(folder) / f"{name}.{processes.rank}.pt")
        return 0
    finally:
        engine.stop()


def weighed(model, factor):
    return Loss(total=(model.weight * factor).float().sum())
