"""Samples of the averaged model while it trains."""

import tempfile
from pathlib import Path

from kinoflow.train.run.ema import EMA
from kinoflow.train.run.engine import Engine
from kinoflow.train.run.task import Task


def preview(task: Task, engine: Engine, ema: EMA, folder: Path, step: int) -> None:
    """Let the task write samples of the averaged model; ranks that share it compute too, rank 0 keeps."""
    with engine.averaged(ema) as model, tempfile.TemporaryDirectory() as discarded:
        if engine.processes.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            task.preview(model, folder, step)
        elif engine.stage == 3 or engine.processes.sequence > 1:
            task.preview(model, Path(discarded), step)
