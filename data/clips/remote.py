"""Lists and clips that lie at a URL: each is fetched whole when it is read, and forgotten.

`http://` and `https://` are read by Python itself, others (`s3://`, `gs://`, `file://`, …) by fsspec. A clip
of some seconds is one request then, and what reads it sees a file like any other: FFmpeg and Pillow ask for
many small pieces of a clip, and open it more than once.
"""

import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from string import punctuation
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

from kinoflow.configs.errors import UserError, one_line

_URL = re.compile(r"[a-z][a-z0-9+.-]+://.+", re.IGNORECASE | re.DOTALL)
_SECONDS = 30.0  # without a byte
_MISSING, _FORBIDDEN = (404, 410), (401, 403)
_VERSION = ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
GONE = "gone"  # the stamp of what cannot be asked
_HEADERS = ("Content-Length", "ETag", "Last-Modified")


@dataclass(frozen=True)
class Url:
    """Where something lies that is no path; what stands behind a `?` belongs to it alone."""

    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def kind(self) -> str:
        """s3, http, …"""
        return self.text.partition(":")[0].lower()

    @property
    def name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(self.text.partition("?")[0]).name

    def beside(self, path: str) -> "Url":
        """What a path means in the folder that this lies in."""
        return Url(f"{self.text.partition('?')[0].rpartition('/')[0]}/{path.removeprefix('./')}")


Place = Path | Url


def place(text: str | Path) -> Place:
    """A path, or a URL."""
    return Url(text) if isinstance(text, str) and _URL.fullmatch(text) else Path(text)


@contextmanager
def local(where: Place) -> Iterator[Path]:
    """The path itself; of a URL a copy that is there as long as the block lasts, and goes by the URL's name.

    Raises:
        UserError: it cannot be fetched, or what the block raises.
    """
    if isinstance(where, Path):
        yield where
        return
    with TemporaryDirectory(prefix="kinoflow-") as folder:
        copy = Path(folder, where.name or "clip")
        try:
            _fetch(where, copy)
        except UserError:
            raise
        except Exception as error:  # each of fsspec's libraries has errors of its own
            raise UserError(f"{where}: cannot be fetched ({_reason(error)}); check the URL and your rights"
                            ) from error  # fmt: skip
        try:
            yield copy
        except UserError as error:
            raise type(error)(str(error).replace(str(copy), str(where))) from error


def version(where: Url) -> str:
    """Another text where another thing lies at the URL.

    Raises:
        FileNotFoundError: nothing does.
        PermissionError: one may not ask.
        Exception: nobody answers; each of fsspec's libraries has errors of its own.
    """
    if _is_http(where):
        with _answer(where, "HEAD") as response:
            return " ".join(str(response.headers.get(key)) for key in _HEADERS)
    system, path = filesystem(where)
    info = system.info(path)
    return " ".join(str(info.get(key)) for key in _VERSION)


def stamp(where: Place) -> str:
    """Another text when the file or what lies at the URL has changed; `GONE` where it cannot be asked."""
    try:
        if isinstance(where, Url):
            return version(where)
        stat = where.stat()
    except Exception:  # what a server may say has no common kind
        return GONE
    return f"{stat.st_size} {stat.st_mtime_ns}"


def filesystem(where: Url) -> tuple[Any, str]:
    """fsspec's way to a URL, and the path there.

    Raises:
        UserError: there is no such kind, or what knows it is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(str(where), use_listings_cache=False)
    except ImportError as error:
        missing = getattr(error.__cause__, "name", None)
        remedy = f"pip install {missing}" if missing else one_line(error)
        raise UserError(f"{where}: cannot be read without another package; {remedy}") from error
    except ValueError as error:
        raise UserError(f"{where}: is no URL that fsspec knows ({one_line(error)}); correct it") from error


def require(where: Url) -> None:
    """See that URLs of this kind can be read.

    Raises:
        UserError: as `filesystem`.
    """
    if not _is_http(where):
        filesystem(where)


def _is_http(where: Url) -> bool:
    return where.kind in ("http", "https")


def _fetch(where: Url, copy: Path) -> None:
    if not _is_http(where):
        system, path = filesystem(where)
        system.get_file(path, str(copy))
        return
    with _answer(where, "GET") as response, copy.open("wb") as file:
        shutil.copyfileobj(response, file)
        told, came = response.headers.get("Content-Length"), file.tell()
    if told is not None and int(told) != came:
        raise OSError(f"{came} of {told} bytes came")


def _answer(where: Url, method: str) -> HTTPResponse:
    try:
        asked = urllib.request.Request(quote(where.text, safe=punctuation), method=method)
        return urllib.request.urlopen(asked, timeout=_SECONDS)
    except urllib.error.HTTPError as error:
        kind = {**dict.fromkeys(_MISSING, FileNotFoundError), **dict.fromkeys(_FORBIDDEN, PermissionError)}
        raise kind.get(error.code, OSError)(f"{error.code} {error.reason}") from error
    except (ValueError, HTTPException) as error:  # not what a URL looks like, or no HTTP comes back
        raise OSError(one_line(error)) from error


def _reason(error: Exception) -> str:
    return "there is nothing" if isinstance(error, FileNotFoundError) else one_line(error)
