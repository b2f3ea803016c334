"""Clip lists: one row per clip, as JSON lines or Parquet, with paths relative to the list."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.configs.files import replacing
from kinoflow.data import video

if TYPE_CHECKING:
    import types

_COLUMNS = ("path", "caption", "frames", "fps", "width", "height")
_COUNTS = ("frames", "width", "height")
# Containers round rates (23.976 for 24000/1001); a declared rate this near is the same.
_FPS_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class ClipEntry:
    """One row: `path` relative to the list (or absolute), `caption`, and what is known about the clip.

    `frames`, `fps` (exact), `width`, `height` (displayed pixels) may be None: not said. `extra` keeps all
    other columns. Raises UserError naming the key.
    """

    path: str
    caption: str = ""
    frames: int | None = None
    fps: Fraction | None = None
    width: int | None = None
    height: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError("path: is empty; name a clip")
        for key in (*_COUNTS, "fps"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise UserError(f"{key}: {value} must be positive")
        taken = [key for key in self.extra if key in _COLUMNS]
        if taken:
            raise UserError(f"extra: {taken[0]} is a column of its own")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A clip list as read from `path`."""

    path: Path
    entries: tuple[ClipEntry, ...]

    def __len__(self) -> int:
        return len(self.entries)

    def resolve(self, entry: ClipEntry) -> Path:
        """Where the clip is."""
        return self.path.parent / entry.path


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A row that can't be used: its number (from 1), its path, and why."""

    row: int
    path: str
    reason: str


def _fraction(value: object) -> Fraction:
    """Exact for integers and text; a float is read as the decimal that it prints as."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    return Fraction(value) if isinstance(value, int) else Fraction(str(value).strip())


def _entry(row: Mapping[str, Any], where: str) -> ClipEntry:
    """Check and convert one row; a value of None is the same as no value."""
    row = {key: value for key, value in row.items() if value is not None}
    known: dict[str, Any] = {}
    for key in ("path", "caption"):
        value = row.get(key, "")
        if not isinstance(value, str):
            raise UserError(f"{where}: {key}: {value!r} is not text; write it in quotes")
        known[key] = value
    for key in _COUNTS:
        if key in row:
            value = row[key]
            if isinstance(value, bool) or not (isinstance(value, int | float) and float(value).is_integer()):
                raise UserError(f"{where}: {key}: {value!r} is not a whole number")
            known[key] = int(value)
    if "fps" in row:
        try:
            known["fps"] = _fraction(row["fps"])
        except (ValueError, ZeroDivisionError) as error:
            message = f'{where}: fps: {row["fps"]!r} is not a rate; write 16, 23.976 or "24000/1001"'
            raise UserError(message) from error
    known["extra"] = {key: value for key, value in row.items() if key not in _COLUMNS}
    try:
        return ClipEntry(**known)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _row(entry: ClipEntry) -> dict[str, Any]:
    known = {
        "path": entry.path,
        "caption": entry.caption,
        "frames": entry.frames,
        "fps": None if entry.fps is None else str(entry.fps),
        "width": entry.width,
        "height": entry.height,
    }
    return {key: value for key, value in known.items() if value is not None} | dict(entry.extra)


def _is_parquet(path: Path) -> bool:
    if path.suffix.lower() in (".parquet", ".pq"):
        return True
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        return False
    raise UserError(f"{path}: a clip list ends in .jsonl or .parquet")


def _pyarrow(path: Path) -> "types.ModuleType":
    try:
        import pyarrow.parquet  # an optional extra, needed for Parquet only
    except ImportError as error:
        raise UserError(
            f"{path}: Parquet needs pyarrow; pip install 'kinoflow[train]', or use a .jsonl list"
        ) from error
    return pyarrow


def read(path: str | Path) -> Manifest:
    """Read a clip list (.jsonl or .parquet); blank lines are skipped, unknown columns kept in `extra`.

    Raises UserError: missing, empty or malformed file; a value of the wrong kind.
    """
    path = Path(path)
    parquet = _is_parquet(path)
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: is empty; list at least one clip")
        rows = list(_parquet_rows(path) if parquet else _json_rows(path))
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error
    if not rows:
        raise UserError(f"{path}: has no rows; list at least one clip")
    return Manifest(path=path, entries=tuple(_entry(row, where) for where, row in rows))


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path} line {number}"
                try:
                    row = json.loads(line, parse_constant=_no_constant)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where}: not JSON ({error}); write one object per line") from error
                if not isinstance(row, dict):
                    raise UserError(f'{where}: is not an object; write {{"path": ..., "caption": ...}}')
                yield where, row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    pyarrow = _pyarrow(path)
    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a Parquet file ({reason}); export it again") from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path} row {number}", row


def write(path: str | Path, entries: Iterable[ClipEntry]) -> None:
    """Write a clip list (.jsonl or .parquet); the file appears whole or not at all.

    Raises UserError: another suffix, no pyarrow for Parquet, a folder that can't be written.
    """
    path = Path(path)
    rows = [_row(entry) for entry in entries]
    parquet = _pyarrow(path) if _is_parquet(path) else None
    try:
        with replacing(path) as aside:
            if parquet is None:
                lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
                aside.write_text("".join(lines), encoding="utf-8")
            else:
                columns = dict.fromkeys(key for row in rows for key in row)
                table = parquet.table({key: [row.get(key) for row in rows] for key in columns})
                parquet.parquet.write_table(table, aside)
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: a column holds values that can't be written ({error})") from error


def check(manifest: Manifest, *, decode: bool = False) -> Iterator[Problem | None]:
    """Probe every clip in turn: None for a good one, a Problem for a bad one.

    A clip is bad when it can't be read, when a declared frame count, rate or size isn't the file's, or
    when an earlier row has the same path and caption. With `decode`, every frame is decoded.
    """
    seen: dict[tuple[str, str], int] = {}
    for row, entry in enumerate(manifest.entries, start=1):
        key = (PurePosixPath(entry.path).as_posix(), entry.caption)
        first = seen.setdefault(key, row)
        reason = f"repeats row {first}" if first != row else _reason(manifest.resolve(entry), entry, decode)
        yield Problem(row=row, path=entry.path, reason=reason) if reason else None


def _reason(path: Path, entry: ClipEntry, decode: bool) -> str:
    """Why the clip is bad, or an empty string."""
    try:
        info = video.probe(path)
        if decode:
            for _ in video.stream(path):
                pass
    except UserError as error:
        return str(error)
    for key in _COUNTS:
        declared, actual = getattr(entry, key), getattr(info, key)
        if declared is not None and declared != actual:
            return f"{key}: the list says {declared}, the file has {actual}"
    if entry.fps is not None and not math.isclose(entry.fps, info.fps, rel_tol=_FPS_TOLERANCE):
        return f"fps: the list says {entry.fps}, the file has {info.fps}"
    return ""
