"""Files that appear whole or not at all, and seeds that are the same everywhere."""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SAMPLE = 2**20


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden name beside `path`; move it to `path` on success, remove it on any exception.

    The file has the rights that any new file has, whatever the library that writes it gives it.

    Raises:
        OSError: the folder cannot be made or written, or `path` is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    try:
        aside.touch()
        mode = aside.stat().st_mode
        yield aside
        aside.chmod(mode)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside `path`; put it in the place of `path` on success, else remove it.

    Raises:
        OSError: it cannot be made or renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, old = _aside(path), _aside(path)
    try:
        aside.mkdir()
        yield aside
        if path.exists():
            path.rename(old)
        aside.rename(path)
    finally:
        for leftover in (aside, old):
            shutil.rmtree(leftover, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file for people and scripts, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json_lines(path: Path) -> list[Any]:
    """The values of a file of JSON lines; none without a file. Lines that a crash cut short are skipped."""
    if not path.is_file():
        return []
    values = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            values.append(json.loads(line))
        except ValueError:
            continue
    return values


def seeded(*key: str | int) -> int:
    """A seed in [0, 2^63) for each key (what it is for, seed, step, …): the same on every machine."""
    text = "\0".join(map(str, key)).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def folder_fingerprint(folder: Path) -> str:
    """A hash over names, sizes and both ends of every file: training changes all of a weight file."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(size - _SAMPLE, 0))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def _aside(path: Path) -> Path:
    """A name that no other process or thread takes, with the ending by which libraries know the format."""
    return path.with_name(f".{path.stem[:100]}.{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
