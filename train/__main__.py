"""`python -m kinoflow.train CONFIG.yaml … key=value …` trains; other verbs prepare, plan and measure."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from kinoflow.configs.errors import UserError, run
from kinoflow.configs.launch import without_local_rank

if TYPE_CHECKING:
    from kinoflow.train.run.config import RunConfig
    from kinoflow.train.run.task import Task

USAGE = """usage: kinoflow train CONFIG.yaml … [key=value …]            train or resume the run in run=FOLDER
       kinoflow train precompute CONFIG.yaml … [key=value …]  clips to latent shards in out=FOLDER
       kinoflow train plan CONFIG.yaml … [key=value …]        memory, FLOPs and days on a cluster; --json
       kinoflow train export RUN RELEASE                      averaged weights into a release; --adapter
       kinoflow train average OUT RELEASE RELEASE …           the mean of several backbones
       kinoflow train validate RELEASE LATENTS                flow loss on held-out clips; --json
       kinoflow train status RUN                              how far a run is, and what went wrong; --json
       with --help each says which keys, or words, it takes"""
_PRECOMPUTE = """usage: kinoflow train precompute CONFIG.yaml … [key=value …]

Clips and captions to latents and text states in out=FOLDER. Shards that are there already are skipped,
unless a clip of a list or its caption has changed since. Pictures with a class each (source=images:PATH: a
folder with a folder for each class, an .npz with images and labels, a .csv, MNIST's IDX files) are stored
with their labels, without release= as pixels; one in ten is held out, for source=images:PATH:heldout."""
_EXPORT = """usage: kinoflow train export RUN RELEASE [--adapter [--int8]]

  RUN      folder of a training run (its run=FOLDER), with config.yaml and checkpoints/
  RELEASE  folder to write or update: the run's part is made of the averaged weights of the newest checkpoint,
           parts that RELEASE lacks are copied from the release that the run was trained with (release=),
           but for those that a release around RELEASE has;
           its kinoflow.yaml gets the name of RUN's folder, and says what the run went on from (init_from=)

Adapters (lora.rank=) are merged into the weights of init_from. With --adapter they alone are written into a
folder RELEASE, as peft writes them: kinoflow sample --lora RELEASE adds them to that release. With --int8
as well they take half the bytes, and peft does not read them."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 on success, 2 after a user's mistake, 143 when SIGTERM ended a training."""
    return run(lambda: _command(sys.argv[1:] if argv is None else argv), "kinoflow train")


def _command(argv: list[str]) -> int:
    argv = without_local_rank(argv)
    if not argv:
        print(USAGE)
        return 2
    if {"-h", "--help"} & set(argv):
        print(_help(next((word for word in argv if not word.startswith("-")), "")))
        return 0
    match argv[0]:
        case "precompute":
            from kinoflow.train.tasks.precompute import main as command
        case "plan":
            from kinoflow.train.plan.report import main as command
        case "status":
            from kinoflow.train.run.status import main as command
        case "average":
            from kinoflow.train.tasks.average import main as command
        case "validate":
            from kinoflow.train.tasks.held_out import main as command
        case "export":
            from kinoflow.train.tasks.export import main as export

            return export(argv[1:], task_of)
        case _:
            return _train(argv)
    return command(argv[1:])


def _help(verb: str) -> str:
    """What a command does, and its keys with their defaults."""
    from kinoflow.configs.keys import key_table

    match verb:
        case "export":
            text = _EXPORT
        case "status":
            from kinoflow.train.run import status

            text = status.USAGE
        case "average":
            from kinoflow.train.tasks import average

            text = average.USAGE
        case "validate":
            from kinoflow.train.tasks import held_out

            text = held_out.USAGE
        case "precompute":
            from kinoflow.train.tasks.precompute import PrecomputeConfig

            text = f"{_PRECOMPUTE}\n\n{key_table(PrecomputeConfig)}"
        case "plan":
            from kinoflow.train.plan import config, report

            text = f"{report.USAGE}\n\n{key_table(config.PlanConfig)}"
        case _:
            from kinoflow.train.run.config import RunConfig

            text = f"{USAGE}\n\n{key_table(RunConfig)}"
    return text


def _train(sources: list[str]) -> int:
    from kinoflow.configs.schema import load
    from kinoflow.train.run.config import RunConfig

    config = load(RunConfig, sources)
    if not config.run:
        raise UserError("run: name the folder of this run, for example run=runs/first")
    if config.model == "text":
        from kinoflow.train.mini import text

        return text.main(config)
    if config.model == "judge":
        from kinoflow.train.mini import judge

        return judge.main(config)
    if config.model in ("strict", "verifier"):
        from kinoflow.train.mini import strict

        return strict.main(config)
    return start(config, task_of)


def start(config: RunConfig, build: Callable[[RunConfig], Task]) -> int:
    """Train the task that build makes, inside a process group."""
    from kinoflow.train.run import engine, loop
    from kinoflow.train.run.spread import Spread

    processes = engine.start(config.threads, config.parallel.sequence)
    try:
        slices = Spread(config=config, processes=processes).slices
        if config.data.batch_size % slices:
            raise UserError(f"data.batch_size: {config.data.batch_size} does not divide into {slices} "
                              f"(processes / parallel.sequence x deepspeed.accumulation)")  # fmt: skip
        code = loop.train(build(config), config, processes)
        if processes.rank == 0:
            _closing(config, code)
        return code
    except KeyboardInterrupt:
        if processes.rank == 0:
            line = "interrupted; the same command goes on from the newest checkpoint"
            print(f"kinoflow train: {line}", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        engine.stop()


def _closing(config: RunConfig, code: int) -> None:
    """Where the run is, and what comes next."""
    if code:
        print("kinoflow train: told to end; the same command goes on from here", file=sys.stderr)
    else:
        print(
            f"{config.run}: trained to step {config.steps}; next: kinoflow train export {config.run} RELEASE"
        )


def task_of(config: RunConfig) -> Task:
    """What the loop trains: the autoencoder or the backbone."""
    if config.model == "tae":
        from kinoflow.train.tasks.tae import TAETask

        return TAETask(config)
    from kinoflow.train.tasks.flow_task import FlowTask

    return FlowTask(config)


if __name__ == "__main__":
    sys.exit(main())
