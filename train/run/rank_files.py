"""What one process writes of a checkpoint: its files, and beside them a list with their sizes and hashes."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_WAITS = (0.5, 2.0)  # seconds after which a file is tried again: a shared disk may be away for a moment


def write(folder: Path, rank: int, files: Mapping[str, Callable[[Path], None]], about: Any) -> None:
    """Write each file by its function, then `rank_<rank>.json`: what it holds, `about` and that all is there.

    Everything is on the disk when this returns, not only in the system's memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, save in files.items():
        save(folder / name)
        sync(folder / name)
    known = {name: _fingerprint(folder / name) for name in files}
    listed = folder / f"rank_{rank:05d}.json"
    listed.write_text(json.dumps({"files": known, "about": about}), encoding="utf-8")
    sync(listed)
    sync(folder)


def read(folder: Path, rank: int) -> Any:
    """What `write` was told of this rank."""
    return _listed(folder, rank)["about"]


def damage(
    folder: Path,
    ranks: int,
    share: slice = slice(None),
    kinds: tuple[str, ...] = ("",),
    *,
    sizes_only: bool = False,
) -> str | None:
    """Why a checkpoint of so many ranks cannot be read; None when every byte is what was written.

    Several processes ask for a share of the files each. `kinds` are how the names begin that count. With
    `sizes_only` nothing is read of the files, however large they are.
    """
    try:
        known = [item for rank in range(ranks) for item in _listed(folder, rank)["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"a rank_*.json is missing or unreadable ({error})"
    for name, expected in [item for item in known if item[0].startswith(kinds)][share]:
        if problem := _problem(folder / name, expected, sizes_only):
            return f"{name} {problem}"
    return None


def _listed(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"rank_{rank:05d}.json").read_text(encoding="utf-8"))


def _problem(path: Path, expected: dict[str, Any], sizes_only: bool) -> str | None:
    """What is wrong with a file; one that cannot be read is tried again, one that was changed is not."""
    for wait in (*_WAITS, None):
        try:
            if (size := path.stat().st_size) != expected["bytes"]:
                return f"has {size} of {expected['bytes']} bytes"
            same = sizes_only or _fingerprint(path) == expected
            return None if same else "has another SHA-256 than when it was written"
        except OSError as error:
            if wait is None:
                return "is missing" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
            time.sleep(wait)
    raise AssertionError("the last turn returns")


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
