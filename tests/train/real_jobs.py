"""What the processes of test_tasks.py run: the real tasks through task, loop and engine, case after case."""

from kinoflow.configs.schema import load
from kinoflow.tae.model import chunks
from kinoflow.train.__main__ import task_of
from kinoflow.train.run import engine, loop
from kinoflow.train.run.config import RunConfig


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
