"""A disk or server that is away for a moment must not cost a clip, nor one that stays away all of them."""

import errno
from collections.abc import Callable
from time import sleep
from typing import TypeVar

from kinoflow.configs.errors import UserError
from kinoflow.data.clips.remote import Place, Url, version

T = TypeVar("T")
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds
_DISK = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH,
         errno.ENETDOWN, errno.ENETUNREACH, errno.ENODEV, errno.ENXIO}  # fmt: skip


class OutageError(UserError):
    """What hinders is no clip's fault: nothing is to be set aside."""


class GoneError(UserError):
    """There is no such file; at another time there may be."""


def patiently(read: Callable[[], T], path: Place, waits: tuple[float, ...] = WAITS) -> T:
    """What `read` gives, which reads `path`; tried again while its folder, disk or server is away.

    Raises:
        UserError: what `read` raised twice while the file could be reached: it is a bad one.
        GoneError: other files are there and this one is not, or its folder did not come.
        OutageError: disk or server did not come back, or the disk left an empty mount point.
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
                remote = isinstance(path, Url)
                away = "server does not answer, nor did it" if remote else "disk is away, and was"
                line = f"its {away} for {sum(waits):.0f} s; when it is back"
                raise OutageError(f"{path}: {line} run the same command again") from error
            if state != "there":
                sleep(wait)
    raise AssertionError("the last turn returns or raises")


def _state(path: Place) -> str:
    """Of a file: there, gone, or what of it is away: its folder, or the disk (of a URL the server)."""
    if isinstance(path, Url):
        return _state_there(path)
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


def _state_there(url: Url) -> str:
    try:
        version(url)
    except FileNotFoundError:
        return "gone"
    except PermissionError:  # an answer
        return "there"
    except Exception:  # each of fsspec's libraries has errors of its own
        return "disk"
    return "there"
