"""Captions of footage as people have them: a table by file name, or a text file beside each clip."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kinoflow.configs.errors import UserError, os_error_line

_NAMES, _TEXTS = ("source", "path", "file_name"), ("caption", "text")
_FORM = (
    'one object a line, {"source": "a.mp4", "caption": "..."}, or a CSV with the columns source and caption'
)


def read_table(path: Path) -> dict[str, str]:
    """Captions by file name, of JSON lines or a CSV; folders in the names do not count.

    The columns may also be called path or file_name, and text, as lists of clips and data sets have them.

    Raises:
        UserError: a file that cannot be read, or a row without a name and a caption.
    """
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise UserError(f"--captions: {path} ends neither in .jsonl nor in .csv; write {_FORM}")
    text = _text(path)
    rows = csv.DictReader(io.StringIO(text, newline="")) if path.suffix.lower() == ".csv" else _objects(text)
    found: dict[str, str] = {}
    try:
        for number, row in enumerate(rows, start=1):
            name, caption = (_value(row, keys) for keys in (_NAMES, _TEXTS))
            if not name or caption is None:
                raise UserError(f"--captions: {path} row {number} has no name or no caption; write {_FORM}")
            found[Path(name).name] = " ".join(caption.split())
    except (ValueError, RecursionError, csv.Error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--captions: {path} cannot be read ({error}); write {_FORM}") from error
    if not found:
        raise UserError(f"--captions: {path} has no rows; write {_FORM}")
    return found


def caption_of(source: Path, table: Mapping[str, str]) -> str:
    """The caption of a source: that of the table, else of a file of its name in .txt beside it, else none.

    Raises:
        UserError: a text file that cannot be read.
    """
    if source.name in table:
        return table[source.name]
    beside = source.with_suffix(".txt")
    return " ".join(_text(beside).split()) if beside.is_file() else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from error


def _objects(text: str) -> Iterable[Any]:
    return (json.loads(line) for line in text.split("\n") if line.strip())


def _value(row: Any, keys: Iterable[str]) -> str | None:
    """The first of the keys that holds text."""
    values = (row.get(key) for key in keys) if isinstance(row, Mapping) else ()
    return next((value for value in values if isinstance(value, str)), None)
