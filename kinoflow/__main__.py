"""The front door: ``kinoflow X ...`` runs what ``python -m kinoflow.X ...`` runs.

Nothing heavy is imported before the command is known, so that ``kinoflow --help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from kinoflow import __version__
from kinoflow.configs.errors import run

Main = Callable[[list[str]], int]


def _sample() -> Main:
    from kinoflow.sample.__main__ import main as entry

    return entry


def _tae() -> Main:
    from kinoflow.tae.__main__ import main as entry

    return entry


def _train() -> Main:
    from kinoflow.train.__main__ import main as entry

    return entry


def _data() -> Main:
    from kinoflow.data.__main__ import main as entry

    return entry


COMMANDS: dict[str, tuple[Callable[[], Main], str]] = {
    "sample": (_sample, 'make a video: kinoflow sample "a red star moves left on a gray background"'),
    "tae": (_tae, "encode, decode and reconstruct clips with the temporal autoencoder"),
    "train": (_train, "train from YAML files, precompute latents, export a release"),
    "data": (_data, "draw captioned clips and check clip lists"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit status, as `kinoflow.configs.errors.run` has it."""

    def command() -> int:
        name, rest = _parse(sys.argv[1:] if argv is None else argv)
        load, _ = COMMANDS[name]
        return load()(rest)

    return run(command, "kinoflow")


def _parse(argv: list[str]) -> tuple[str, list[str]]:
    """The command and what belongs to it; everything behind the command is its own parser's."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="kinoflow",
        description="Text-to-video by flow matching, from a laptop to a cluster.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kinoflow {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command", help=", ".join(COMMANDS))
    parser.parse_args(argv[:1])
    return argv[0], argv[1:]


if __name__ == "__main__":
    sys.exit(main())
