"""Samples of the averaged model while it trains, and its figures on held-out clips."""

from pathlib import Path

from kinoflow.train.run.ema import EMA
from kinoflow.train.run.engine import Engine
from kinoflow.train.run.processes import from_first
from kinoflow.train.run.task import Parts, Task


def preview(task: Task, engine: Engine, ema: EMA, folder: Path, step: int) -> None:
    """Let the task write samples of the averaged model; every process calls it."""
    processes = engine.processes
    if processes.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    with engine.averaged(ema) as model:
        from_first(None, processes)  # the folder exists
        task.preview(model, folder, step, processes)


def validate(task: Task, engine: Engine, ema: EMA) -> Parts:
    """What the task says of the averaged model; every process calls it."""
    with engine.averaged(ema) as model:
        return task.validate(model, engine.processes)
