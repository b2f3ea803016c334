"""What the processes of test_tasks.py run: the real tasks through task, loop and engine, case after case."""

from pathlib import Path
from unittest import mock

import torch

from kinoflow.configs.schema import load
from kinoflow.train.__main__ import task_of
from kinoflow.train.run import checkpoint, engine, loop
from kinoflow.train.run.config import RunConfig


def trained(cases, folder):
    """A run in FOLDER/CASE for each case, with the masters of this rank in weights.RANK.pt."""
    processes = engine.start(1)
    try:
        for name, sources in cases.items():
            config = load(RunConfig, [*sources, f"run={folder}/{name}"])
            own = type(processes)(**{**vars(processes), "sequence": config.parallel.sequence})
            with mock.patch.object(checkpoint, "save", _keeping(Path(folder, name), own.rank)):
                assert loop.train(task_of(config), config, own) == 0
        return 0
    finally:
        engine.stop()


def _keeping(folder, rank):
    write = checkpoint.save

    def save(to, state, step, pending):
        pieces = [(f.name, f.shape, f.start, f.read().clone()) for f in state.engine.fragments()]
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(pieces, folder / f"weights.{rank}.pt")
        write(to, state, step, pending)

    return save
