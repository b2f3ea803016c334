"""Lists of prompts for `kinoflow sample --prompts`: text, JSONL or CSV with settings, JSON of VBench."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from kinoflow.configs.errors import UserError
from kinoflow.configs.terminal import parse_rate
from kinoflow.sample.generate import SolverName
from kinoflow.sample.guidance import GuidanceKind
from kinoflow.sample.options import parse_interval, parse_size
from kinoflow.sample.output import derived_seed
from kinoflow.sample.request import ClipRequest

STDIN = Path("-")


def _solver(text: str) -> str:
    if text not in get_args(SolverName):
        raise ValueError
    return text


def _kind(text: str) -> str:
    if text not in get_args(GuidanceKind):
        raise ValueError
    return text


_KEYS: dict[str, Callable[[str], Any]] = {
    "prompt": str,
    "negative": str,
    "seed": int,
    "steps": int,
    "guidance": float,
    "guidance-kind": _kind,
    "guidance-interval": parse_interval,
    "guidance-rescale": float,
    "cache": float,
    "best-of": int,
    "solver": _solver,
    "diffusion": float,
    "frames": int,
    "size": parse_size,
    "fps": parse_rate,
}


def read_prompts(
    path: Path, common: ClipRequest, *, classes: bool = False
) -> Iterator[tuple[str, ClipRequest]]:
    """(place, request) of each line of a file, or of standard input where the path is "-".

    A .jsonl file has an object a line, a .csv file a header and a row a clip; their keys are the options'
    names, and what a line leaves out is as in `common`. A .json file is a list of such objects, or of
    VBench's, whose prompt is `prompt_en` and whose other keys say how it is judged. Any other file has one
    prompt a line, and so has standard input unless its first line is a JSON object. A line's own seed is
    taken as it is; without one the seed is derived from that of `common`, the prompt, and how often the same
    prompt stood before it: not from its place, so that lines can be moved, added and removed. Of a release
    of `classes` the name or number of one stands in `label`, or where else a prompt would.

    Raises:
        UserError: a file that cannot be read or holds no prompt, or a line with a key or value that is none.
    """
    text = _read(path)
    kind = path.suffix.lower()
    if kind == ".jsonl" or (path == STDIN and text.lstrip().startswith("{")):
        rows = _json_rows(path, text)
    elif kind == ".json":
        rows = _list_rows(path, text)
    elif kind == ".csv":
        rows = _csv_rows(path, text)
    else:
        lines = enumerate(text.split("\n"), 1)
        rows = ((f"{path}:{number}", {"prompt": line.strip()}) for number, line in lines if line.strip())
    seen, empty = Counter[str](), True
    for place, row in rows:
        empty = False
        request = _request(place, _labelled(place, row) if classes else row, common)
        if "seed" not in row:
            seed = derived_seed(common.seed, request.prompt, repeat=seen[request.prompt])
            request = replace(request, seed=seed)
            seen[request.prompt] += 1
        yield place, request
    if empty:
        raise UserError(f"{path}: no prompt in it; write one a line")


def _read(path: Path) -> str:
    try:
        if path == STDIN:
            return sys.stdin.read().removeprefix("\ufeff")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path}: {reason}; give a text file with one prompt a line") from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f'{path}:{number}: no JSON object; write {{"prompt": "…", "seed": 7}}')
        yield f"{path}:{number}", {key: value for key, value in row.items() if value is not None}


def _list_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        rows = None
    if not isinstance(rows, list):
        raise UserError(f'{path}: no JSON list; write [{{"prompt": "…"}}], or take VBench_full_info.json')
    for number, row in enumerate(rows, 1):
        place = f"{path}, object {number}"
        if not isinstance(row, dict):
            raise UserError(f'{place}: no JSON object; write {{"prompt": "…"}}')
        if "prompt_en" in row:
            yield place, {"prompt": row["prompt_en"]}
        else:
            yield place, {key: value for key, value in row.items() if value is not None}


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise UserError(f"{path}:{reader.line_num}: more fields than the header; quote commas")
            yield f"{path}:{reader.line_num}", {key: value for key, value in row.items() if value}
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}; write a row as a spreadsheet does") from None


def _labelled(place: str, row: dict[str, Any]) -> dict[str, Any]:
    if "label" not in row:
        return row
    if "prompt" in row:
        raise UserError(f"{place}: a label and a prompt; give one of the two")
    return {("prompt" if key == "label" else key): value for key, value in row.items()}


def _request(place: str, row: dict[str, Any], common: ClipRequest) -> ClipRequest:
    values: dict[str, Any] = {}
    for key, value in row.items():
        values |= setting(place, key, value)
    if "prompt" not in values:
        raise UserError(f"{place}: no prompt; write what the clip shows")
    return replace(common, **values)


def setting(place: str, key: str, value: object) -> dict[str, Any]:
    """What a setting, named and written as an option of the command, means for a ClipRequest.

    Raises:
        UserError: no such setting, or a value that it does not take; the line begins with `place`.
    """
    name = key.replace("_", "-")
    if name == "label":
        raise UserError(f"{place}: label: the release reads prompts and has no classes; write a prompt")
    if name not in _KEYS:
        raise UserError(f"{place}: {key}: no setting of a clip; known are {', '.join(_KEYS)}")
    try:
        read = _KEYS[name](str(value))
    except UserError as error:
        raise UserError(f"{place}: {key}: {error}") from None
    except ValueError:
        raise UserError(f"{place}: {key}: {value!r} does not fit; write it as --{name} takes it") from None
    return {"width": read[0], "height": read[1]} if name == "size" else {name.replace("-", "_"): read}
