"""The front door: ``kinoflow X ...`` runs what ``python -m X ...`` runs.

Nothing heavy is imported before the command is known, so that ``kinoflow --help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

__version__ = "0.1.0"

PACKAGES = ("configs", "data", "conditioning", "tae", "dit_video", "sample", "train")
INTERRUPTED = 130  # 128 + SIGINT, what a shell reports
USER_ERROR = 2

Main = Callable[[list[str]], int]


def _sample() -> Main:
    from sample.__main__ import main as entry

    return entry


def _tae() -> Main:
    from tae.__main__ import main as entry

    return entry


def _train() -> Main:
    from train.__main__ import main as entry

    return entry


def _data() -> Main:
    from data.__main__ import main as entry

    return entry


COMMANDS: dict[str, tuple[Callable[[], Main], str]] = {
    "sample": (_sample, 'make a video: kinoflow sample "a red star moves left on a gray background"'),
    "tae": (_tae, "encode, decode and reconstruct clips with the temporal autoencoder"),
    "train": (_train, "train from YAML files, precompute latents, export a release"),
    "data": (_data, "draw captioned clips and check clip lists"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    command, rest = _parse(sys.argv[1:] if argv is None else argv)
    load, _ = COMMANDS[command]
    try:
        return load()(rest)
    except KeyboardInterrupt:
        print("kinoflow: interrupted", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or missing in PACKAGES:
            raise
        extra = "train" if command == "train" else "dev"
        print(f'kinoflow: {missing} is not installed; run: pip install "kinoflow[{extra}]"', file=sys.stderr)
        return USER_ERROR
    except (ValueError, OSError) as error:
        if not _is_users(error):
            raise
        print(f"kinoflow: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR


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


def _is_users(error: BaseException) -> bool:
    """Our ValueErrors and the system's errors (a full disk) take one line; bugs show a traceback."""
    ours = type(error).__module__.partition(".")[0] in PACKAGES
    return ours or (isinstance(error, OSError) and error.errno is not None)


if __name__ == "__main__":
    sys.exit(main())
