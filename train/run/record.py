"""What a run folder says of the run: its configuration, and the code and the packages that it ran with."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kinoflow.configs.files import write_json
from kinoflow.configs.schema import dump


def record(config: object, folder: Path) -> None:
    """Write config.yaml and env.json into the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    dump(config, folder / "config.yaml")
    environment = {"git": _git_hash(), "python": platform.python_version(), "platform": platform.platform(),
                   "packages": {name: _version(name) for name in ("kinoflow", "torch", "deepspeed", "numpy")},
                   "command": sys.argv}  # fmt: skip
    write_json(folder / "env.json", environment)


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
