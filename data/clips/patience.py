"""A disk that is away for a moment must not cost a clip, nor one that stays away all of them."""

import errno
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import TypeVar

from kinoflow.configs.errors import UserError

T = TypeVar("T")
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds
_DISK = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH,
         errno.ENETDOWN, errno.ENETUNREACH, errno.ENODEV, errno.ENXIO}  # fmt: skip


class OutageError(UserError):
    """What hinders is no clip's fault: nothing is to be set aside."""


class GoneError(UserError):
    """There is no such file; at another time there may be."""


def patiently(read: Callable[[], T], path: Path, waits: tuple[float, ...] = WAITS) -> T:
    """What `read` gives, which reads the file `path`; tried again while its folder or disk is away.

    Raises:
        UserError: what `read` raised twice while the file could be reached: it is a bad one.
        GoneError: other files are there and this one is not, or its folder did not come.
        OutageError: the disk did not come back, or left an empty mount point.
    """
    chances = 2
    for wait in (*waits, None):
        try:
            return read()
        except UserError as error:
            state = _state(path)
            chances -= state == "there"
            if state == "gone":
                raise GoneError(f"{path}: is not there") from error
            if chances == 0:
                raise
            if wait is None:
                if state == "folder":
                    raise GoneError(f"{path}: its folder is not there") from error
                line = f"its disk is away, and was for {sum(waits):.0f} s; when it is back"
                raise OutageError(f"{path}: {line} run the same command again") from error
            if state != "there":
                sleep(wait)
    raise AssertionError("the last turn returns or raises")


def _state(path: Path) -> str:
    """Of a file: there, gone, or what of it is away: its folder, or the disk."""
    try:
        if path.is_file():  # what hangs when it is opened is none
            with path.open("rb") as file:
                file.read(1)
            return "there"
        if path.exists():
            return "there"
        return "gone" if any(path.parent.iterdir()) else "disk"
    except FileNotFoundError:
        return "folder"
    except OSError as error:
        return "disk" if error.errno in _DISK else "there"
