"""`python -m train CONFIG.yaml … key=value …` trains; also `precompute`, `plan` and `export`."""

import errno
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from configs import ConfigError, dump, load
from train.config import RunConfig
from train.task import Task

USAGE = """usage: python -m train CONFIG.yaml … [key=value …]            train or resume the run in run=FOLDER
       python -m train precompute CONFIG.yaml … [key=value …]  clips to latent shards in out=FOLDER
       python -m train plan CONFIG.yaml … [key=value …]        memory, FLOPs and days on a cluster; --json
       python -m train export RUN RELEASE                      averaged weights into a release folder"""
PACKAGES = {"configs", "data", "tae", "conditioning", "dit_video", "sample", "train"}


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 on success, 2 after a user's error (one line), 130 by Ctrl-C, 143 by SIGTERM."""
    arguments = sys.argv[1:] if argv is None else argv
    return guard(lambda: _command(arguments))


def guard(command: Callable[[], int]) -> int:
    """The exit code of a command, with a user's errors as one line on stderr instead of a traceback."""
    try:
        return command()
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    except ValueError as error:
        if type(error).__module__.partition(".")[0] not in PACKAGES:
            raise
        print(f"train: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        print(f"train: {error.filename or 'a file'}: {error.strerror}; free space or permit it, then run the "
              "same command again", file=sys.stderr)  # fmt: skip
        return 2


def _command(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "precompute":
        from train.precompute import main as precompute

        return precompute(argv[1:])
    if argv[0] == "plan":
        from train.plan_report import main as plan

        return plan(argv[1:])
    if argv[0] == "export":
        return _export(argv[1:])
    return _train(argv)


def _train(sources: list[str]) -> int:
    config = load(RunConfig, sources)
    if not config.run:
        raise ConfigError("run: name the folder of this run, for example run=runs/first")
    if config.model == "text":
        from train import text

        return text.main(config)
    if config.model == "judge":
        from train import judge

        return judge.main(config)
    return run(config, _task)


def _export(arguments: list[str]) -> int:
    from train import checkpoint

    if len(arguments) != 2:
        raise ConfigError("export: name the run and the release folder: python -m train export RUN RELEASE")
    folder, release = Path(arguments[0]), Path(arguments[1])
    config = load(RunConfig, [str(folder / "config.yaml")])
    found = checkpoint.export(folder, release, _task(config), Path(config.release))
    print(f"{release}: {config.model} from {found}")
    return 0


def run(config: RunConfig, build: Callable[[RunConfig], Task]) -> int:
    """Train the task that build makes, inside a process group, leaving config.yaml and env.json."""
    from train import engine, loop

    world = engine.start(config.threads, config.parallel.sequence)
    try:
        slices = world.replicas * config.deepspeed.accumulation
        if config.data.batch_size % slices:
            raise ConfigError(f"data.batch_size: {config.data.batch_size} does not divide into {slices} "
                              f"(processes / parallel.sequence x deepspeed.accumulation)")  # fmt: skip
        if world.rank == 0:
            record(config, Path(config.run))
        return loop.train(build(config), config, world)
    finally:
        engine.stop()


def _task(config: RunConfig) -> Task:
    if config.model == "tae":
        from train.tae import TAETask

        return TAETask(config)
    from train.dit import DiTTask

    return DiTTask(config)


def record(config: object, folder: Path) -> None:
    """Write config.yaml and env.json into the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    dump(config, folder / "config.yaml")
    environment = {"git": _git_hash(), "python": platform.python_version(), "platform": platform.platform(),
                   "packages": {name: _version(name) for name in ("kinoflow", "torch", "deepspeed", "numpy")},
                   "command": sys.argv}  # fmt: skip
    aside = folder / "env.json.partial"
    aside.write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")
    aside.replace(folder / "env.json")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_hash() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
