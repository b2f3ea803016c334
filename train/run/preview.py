"""Samples of the averaged model while it trains."""

from pathlib import Path

from kinoflow.train.run.ema import EMA
from kinoflow.train.run.engine import Engine
from kinoflow.train.run.processes import from_first
from kinoflow.train.run.task import Task


def preview(task: Task, engine: Engine, ema: EMA, folder: Path, step: int) -> None:
    """Let the task write samples of the averaged model; every process calls it."""
    processes = engine.processes
    if processes.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    with engine.averaged(ema) as model:
        from_first(None, processes)  # the folder exists
        task.preview(model, folder, step, processes)
