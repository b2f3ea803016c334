"""What goes wrong, and the one door that every command leaves by: a user's mistake is one line."""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

USER_ERROR = 2
_INTERRUPTS: list[int] = []  # that came since the outermost door was opened
_SIGNALLED = 128  # plus the signal's number is what a shell reports

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


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the file or key and the remedy."""


def os_error_line(path: str | os.PathLike[str], error: OSError) -> str:
    """One line for the person at the keyboard: the file, what happened, what to do."""
    reason = _REMEDIES.get(error.errno or 0, f"{error.strerror or error}; check the disk")
    return f"{path}: {reason}"


def run(command: Callable[[], int], name: str) -> int:
    """The exit status of `command`: its own, or 2 after a user's mistake, which is one line on stderr.

    So is an error of the system (a full disk) and a library that is not installed. Anything else is a bug of
    ours and shows its traceback. Ctrl-C gives 130 and SIGTERM 143, after all that was begun is cleaned up.
    What a terminal's encoding cannot show is replaced.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with _signals_unwind():
            return command()
    except KeyboardInterrupt:
        print(f"{name}: interrupted; nothing is left half written", file=sys.stderr)
        return _SIGNALLED + signal.SIGINT
    except BrokenPipeError:  # the reader of a pipe has gone (| head): nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _SIGNALLED + signal.SIGPIPE
    except UserError as error:
        line = " ".join(str(error).split())
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "kinoflow"):
            raise
        line = f"{missing} is not installed; run: pip install {_installable(missing)}"
    except OSError as error:
        if error.errno not in _REMEDIES and error.filename is None:  # a file descriptor that is not open
            raise
        line = os_error_line(error.filename or "a file", error)
    print(f"{name}: {line}", file=sys.stderr)
    return USER_ERROR


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """SIGTERM and SIGINT as exceptions, so that whatever was begun is cleaned up.

    Libraries swallow one that comes while they are imported, and fail at something else later: what goes
    wrong after an interrupt is the interrupt.
    """

    def leave(number: int, _: object) -> NoReturn:
        raise SystemExit(_SIGNALLED + number)

    def interrupt(number: int, _: object) -> NoReturn:
        _INTERRUPTS.append(number)
        raise KeyboardInterrupt

    handlers = {signal.SIGTERM: leave}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored: in the background
        handlers[signal.SIGINT] = interrupt
        _INTERRUPTS.clear()
    try:
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    except ValueError:  # not the main thread: its owner decides
        yield
        return
    try:
        yield
    except Exception as error:
        if _INTERRUPTS:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _installable(module: str) -> str:
    """What pip is to install for a module: the extra of ours that brings it, else the module itself."""
    from importlib.metadata import PackageNotFoundError, requires  # slow, for the one line that needs it

    try:
        declared = requires("kinoflow") or []
    except PackageNotFoundError:
        declared = []
    for requirement in declared:
        extra = re.search(r'extra == "(\w+)"', requirement)
        if extra and re.match(rf"{re.escape(module)}\b", requirement) and extra[1] != "dev":
            return f'"kinoflow[{extra[1]}]"'
    return module


def one_line(error: BaseException, most: int = 200) -> str:
    """What an error of a library says, in one line."""
    return " ".join(str(error).split())[:most] or type(error).__name__
