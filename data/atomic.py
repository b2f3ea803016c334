"""Write a file aside and put it in place only when it is whole."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REMEDIES = {
    errno.ENOENT: "no such file or folder; check the path",
    errno.EISDIR: "is a folder; name a file",
    errno.ENOTDIR: "a part of the path is a file; name another folder",
    errno.EACCES: "permission denied; check the rights of the file and its folder",
    errno.EPERM: "permission denied; check the rights of the file and its folder",
    errno.EROFS: "the disk is read-only; write to another folder",
    errno.ENOSPC: "the disk is full; free some space or write to another disk",
    errno.EDQUOT: "the disk quota is used up; free some space or write to another disk",
    errno.EFBIG: "the file would exceed the size limit; free some space or write to another disk",
    errno.ENAMETOOLONG: "the file name is too long; choose a shorter one",
}


class VideoError(ValueError):
    """A clip or picture that cannot be read or written; one line that names the file and the remedy."""


def os_error_line(path: Path, error: OSError) -> str:
    """One line for the person at the keyboard: the file, what happened, what to do."""
    reason = _REMEDIES.get(error.errno or 0, f"{error.strerror or error}; check the disk")
    return f"{path}: {reason}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden name beside `path`; move it to `path` on success, remove it on any exception.

    Raises:
        OSError: the folder cannot be made or written, or `path` is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem[:100]}.{os.getpid()}{path.suffix}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
