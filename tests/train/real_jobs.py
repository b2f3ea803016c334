"""What the processes of test_tasks.py run: the real tasks through task, loop and engine, case after case."""

from functools import partial
from pathlib import Path
from unittest import mock

import torch

from kinoflow.configs.schema import load
from kinoflow.tae.model import chunks
from kinoflow.train.__main__ import task_of
from kinoflow.train.run import engine, loop
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.processes import Processes
from kinoflow.train.run.spread import Spread


def trained(cases, folder):
    """A run in FOLDER/CASE for each case."""
    chunks.CHUNK_BYTES["cpu"] = 1  # previews go frame by frame, as those of real clips do
    processes = engine.start(1)
    try:
        for name, sources in cases.items():
            config = load(RunConfig, [*sources, f"run={folder}/{name}"])
            own = type(processes)(**{**vars(processes), "sequence": config.parallel.sequence})
            assert loop.train(task_of(config), config, own) == 0
        return 0
    finally:
        engine.stop()


def adapted(sources, folder):
    """Breaks and graphs of a compiled model with adapters, the loss of its first step and its gradients."""
    config = load(RunConfig, sources)
    task = task_of(config)
    # Graphs are those of inductor, without the minutes that it takes.
    with mock.patch("torch.compile", partial(torch.compile, backend="aot_eager")):
        task.prepare(Spread(config=config, processes=Processes(rank=0, size=1, device=torch.device("cpu"))))
    loss = task.loss(task.model, task.batch(0, 0, 1), 0).total
    loss.backward()
    counters = torch._dynamo.utils.counters
    gradients = {n: p.grad for n, p in task.model.named_parameters() if p.grad is not None}
    found = dict(counters["graph_break"]), counters["stats"]["unique_graphs"], loss.detach(), gradients
    torch.save(found, Path(folder) / "adapted.pt")
    return 0
