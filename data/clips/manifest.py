"""Clip lists: one row per clip, as JSON lines or Parquet, with paths relative to the list, or URLs.

A row that cannot be used costs that row: `read` tells of it beside the good ones.
"""

import codecs
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from kinoflow.configs.errors import UserError, one_line, os_error_line
from kinoflow.configs.files import replacing
from kinoflow.data import video
from kinoflow.data.clips.remote import Place, Url, local, place

if TYPE_CHECKING:
    import types

_COLUMNS = ("path", "caption", "first_frame", "frames", "fps", "width", "height")
_COUNTS = ("frames", "width", "height")
# Containers round rates (23.976 for 24000/1001); a declared rate this near is the same.
_FPS_TOLERANCE = 1e-3
_MOST = 10**9  # frames or pixels: more is a slip of the pen
_RATES = Fraction(1, 10**6), Fraction(10**6)


@dataclass(frozen=True, kw_only=True)
class ClipEntry:
    """One row: `path` relative to the list (or absolute, or a URL), `caption`, and what is known of the clip.

    `frames`, `fps` (exact), `width`, `height` (displayed pixels) may be None: not said. With `first_frame`
    (from 0) the clip is a piece of its file, from this frame on and `frames` long, which must then be said.
    `extra` keeps all other columns. Raises UserError naming the key.
    """

    path: str
    caption: str = ""
    first_frame: int | None = None
    frames: int | None = None
    fps: Fraction | None = None
    width: int | None = None
    height: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError("path: is empty; name a clip")
        for key in ("path", "caption"):
            if not _is_text(getattr(self, key)):
                raise UserError(f"{key}: {_shown(getattr(self, key))} is not valid text; write it again")
        if "\0" in self.path:
            raise UserError(f"path: {_shown(self.path)} has a zero byte in it; name a clip")
        for key in (*_COUNTS, "fps"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise UserError(f"{key}: {value} must be positive")
        if self.first_frame is not None and self.first_frame < 0:
            raise UserError(f"first_frame: {self.first_frame} must be 0 or more")
        if self.first_frame is not None and self.frames is None:
            raise UserError("frames: say how many there are from first_frame on")
        taken = [key for key in self.extra if key in _COLUMNS]
        if taken:
            raise UserError(f"extra: {taken[0]} is a column of its own")

    @property
    def piece(self) -> range | None:
        """The frames of the file that are the clip; None for all of them."""
        if self.first_frame is None:
            return None
        return range(self.first_frame, self.first_frame + (self.frames or 0))

    @property
    def key(self) -> str:
        """What tells the clip from others of the list: the path, and where in the file it begins."""
        return self.path if self.first_frame is None else f"{self.path}\0{self.first_frame}+{self.frames}"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A row that can't be used: its number (from 1; of a JSON list the line), its path, and why."""

    row: int
    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A clip list as read from `path`: its good rows, their numbers (from 1), and the bad ones."""

    path: Place
    entries: tuple[ClipEntry, ...]
    rows: tuple[int, ...]
    bad: tuple[Problem, ...] = ()

    @property
    def fingerprint(self) -> str:
        """A name for the clips in their order, wherever the list lies."""
        return hashlib.sha256(
            "\0".join(entry.key for entry in self.entries).encode(errors="replace")
        ).hexdigest()

    def __len__(self) -> int:
        return len(self.entries)

    def resolve(self, entry: ClipEntry) -> Place:
        """Where the clip is."""
        clip = place(entry.path)
        if isinstance(clip, Url) or clip.is_absolute():
            return clip
        return self.path.beside(entry.path) if isinstance(self.path, Url) else self.path.parent / clip

    @property
    def warning(self) -> str:
        """One line about the bad rows; empty where there are none."""
        if not self.bad:
            return ""
        first = self.bad[0]
        return (
            f"{self.path}: {len(self.bad)} of {len(self) + len(self.bad)} rows are bad and left out; "
            f"the first is row {first.row}: {first.reason}"
        )


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: JSON may hold halves of characters."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    """A value that somebody wrote, short and in plain characters."""
    return ascii(value) if len(ascii(value)) <= 60 else f"{ascii(value)[:57]}..."


def _fraction(value: object) -> Fraction:
    """Exact for integers, decimals and text; a float is read as the decimal that it prints as.

    Raises:
        ValueError, ArithmeticError: no number, or one that no clip has.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError
    text = str(value).strip()
    if "/" not in text and float(text) == 0:  # Fraction would write out an exponent of any size
        return Fraction(0)
    if "/" not in text and not _RATES[0] <= abs(float(text)) <= _RATES[1]:
        raise ValueError
    rate = Fraction(text)
    if not _RATES[0] <= abs(rate) <= _RATES[1]:
        raise ValueError
    return rate


def _count(value: object) -> int:
    """A whole number. Raises ValueError or ArithmeticError."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError
    if abs(value) > _MOST or value != int(value):
        raise ValueError
    return int(value)


def _entry(row: Mapping[str, Any]) -> ClipEntry:
    """Check and convert one row; a value of None is the same as no value."""
    row = {key: value for key, value in row.items() if value is not None}
    known: dict[str, Any] = {}
    for key in ("path", "caption"):
        value = row.get(key, "")
        if not isinstance(value, str):
            raise UserError(f"{key}: {_shown(value)} is not text; write it in quotes")
        known[key] = value
    for key in ("first_frame", *_COUNTS):
        if key in row:
            try:
                known[key] = _count(row[key])
            except (ValueError, ArithmeticError):
                message = f"{key}: {_shown(row[key])} is not a whole number that a clip can have"
                raise UserError(message) from None
    if "fps" in row:
        try:
            known["fps"] = _fraction(row["fps"])
        except (ValueError, ArithmeticError):
            message = f'fps: {_shown(row["fps"])} is not a rate; write 16, 23.976 or "24000/1001"'
            raise UserError(message) from None
    return ClipEntry(**known, extra={key: value for key, value in row.items() if key not in _COLUMNS})


def _row(entry: ClipEntry) -> dict[str, Any]:
    known = {
        "path": entry.path,
        "caption": entry.caption,
        "first_frame": entry.first_frame,
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

    Raises UserError: missing or empty file, one that is no such list, or a list without a good row.
    """
    where = place(path)
    with local(where) as file:
        return replace(_read(file), path=where)


def _read(path: Path) -> Manifest:
    parquet = _is_parquet(path)
    entries, numbers, bad = [], [], []
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: is empty; list at least one clip")
        for number, row in _parquet_rows(path) if parquet else _json_rows(path):
            try:
                if isinstance(row, UserError):
                    raise row
                entries.append(_entry(row))
                numbers.append(number)
            except UserError as error:
                named = row.get("path") if isinstance(row, Mapping) else None
                shown = named if isinstance(named, str) and named.isprintable() else ""
                bad.append(Problem(row=number, path=shown, reason=str(error)))
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error
    if not entries and not bad:
        raise UserError(f"{path}: has no rows; list at least one clip")
    if not entries:
        where = "row" if parquet else "line"
        raise UserError(f"{path}: has no good row; {where} {bad[0].row}: {bad[0].reason}")
    return Manifest(path=path, entries=tuple(entries), rows=tuple(numbers), bad=tuple(bad))


_Row = Mapping[str, Any] | UserError  # a row, or why it cannot be read


def _json_rows(path: Path) -> Iterator[tuple[int, _Row]]:
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    if len(lines) > 1 and isinstance(_json_row(lines[0][1]), UserError) and _is_json(content):
        raise UserError(f"{path}: is one JSON value; write one object per line, no commas between them")
    for number, line in lines:
        yield number, _json_row(line)


def _json_row(line: bytes) -> _Row:
    try:
        row = json.loads(line.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError:
        return UserError("is not UTF-8 text; save it as UTF-8")
    except (ValueError, RecursionError) as error:
        return UserError(f"not JSON ({one_line(error)}); write one object per line")
    return (
        row if isinstance(row, dict) else UserError('is not an object; write {"path": ..., "caption": ...}')
    )


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _parquet_rows(path: Path) -> Iterator[tuple[int, _Row]]:
    """Some thousand rows at a time: as Python objects they take many times their bytes."""
    pyarrow = _pyarrow(path)
    done = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from enumerate(_parquet_batch(pyarrow, batch), start=done + 1)
                done += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a Parquet file ({reason}); export it again") from error


def _parquet_batch(pyarrow: "types.ModuleType", batch: Any) -> Iterable[_Row]:
    try:
        return batch.to_pylist()
    except (pyarrow.ArrowException, ValueError, ArithmeticError):  # text that is none, impossible times
        return [_parquet_row(pyarrow, batch, index) for index in range(batch.num_rows)]


def _parquet_row(pyarrow: "types.ModuleType", batch: Any, index: int) -> _Row:
    row = {}
    for name in batch.schema.names:
        try:
            row[name] = batch[name][index].as_py()
        except (pyarrow.ArrowException, ValueError, ArithmeticError) as error:
            return UserError(f"{name}: cannot be read ({one_line(error)})")
    return row


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
    """Look at every row in turn, and probe its clip: None for a good one, a Problem for a bad one.

    A clip is bad when it can't be read, when a declared frame count, rate or size isn't the file's, or
    when an earlier row has the same path and caption. With `decode`, every frame is decoded.
    """
    seen: dict[tuple[str, range | None, str], int] = {}
    bad = {problem.row: problem for problem in manifest.bad}
    listed = dict(zip(manifest.rows, manifest.entries, strict=True))
    for row in sorted(bad.keys() | listed.keys()):
        if row in bad:
            yield bad[row]
            continue
        entry = listed[row]
        key = (PurePosixPath(entry.path).as_posix(), entry.piece, entry.caption)
        first = seen.setdefault(key, row)
        reason = f"repeats row {first}" if first != row else _reason(manifest.resolve(entry), entry, decode)
        yield Problem(row=row, path=entry.path, reason=reason) if reason else None


def _reason(where: Place, entry: ClipEntry, decode: bool) -> str:
    """Why the clip is bad, or an empty string."""
    try:
        with local(where) as path:
            info = video.probe(path)
            piece = entry.piece
            if piece is not None and piece.stop > info.frames:
                return f"first_frame: the list says {piece.start}:{piece.stop}, the file has 0:{info.frames}"
            span = (0, None) if piece is None else (piece.start, piece.stop)
            for _ in video.stream(path, *span) if decode else ():
                pass
    except UserError as error:
        return str(error)
    for key in _COUNTS:
        declared, actual = getattr(entry, key), getattr(info, key)
        if key == "frames" and piece is not None:
            continue
        if declared is not None and declared != actual:
            return f"{key}: the list says {declared}, the file has {actual}"
    if entry.fps is not None and not math.isclose(entry.fps, info.fps, rel_tol=_FPS_TOLERANCE):
        return f"fps: the list says {entry.fps}, the file has {info.fps}"
    return ""
