"""The tables that the engine leaves: a small Parquet file for each piece of work, so that it can go on.

A part's name holds all that it depends on: the file's path, size and time of change, and the configuration.
It is there whole or not at all, and never written again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.configs.files import replacing

FLOATS = (
    "change", "dissolve", "dissolve_half", "flow", "flow_x", "flow_y", "zoom", "roll", "luma",
    "contrast", "clipped", "sharpness", "top", "bottom", "left", "right", "text",
    "transnet", "transnet_all",
)  # fmt: skip
"""What is known of each frame, in Float32; nan where it was not looked at."""


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What is known of the frames first..first+n-1 of a video.

    `ticks` has the n + 1 times at which they begin and the last one ends, from the start of the video in
    units of `time_base` seconds. `hashes` are those of `duplicates.picture_hash`, 0 where there is none;
    `pictures` are small JPEG for people, None where there is none. Frames behind the first that does not
    decode are not in it; `fault` says why.
    """

    first: int
    values: Mapping[str, np.ndarray]
    hashes: np.ndarray
    pictures: Sequence[bytes | None]
    ticks: np.ndarray
    time_base: str
    fault: str = ""

    def __len__(self) -> int:
        return len(self.hashes)


def write_signals(path: Path, signals: Signals) -> None:
    """Write a part.

    Raises:
        UserError: it cannot be written.
    """
    import pyarrow

    columns: dict[str, Any] = {key: np.asarray(signals.values[key], np.float32) for key in FLOATS}
    columns |= {"hash": signals.hashes, "begin": signals.ticks[:-1], "end": signals.ticks[1:]}
    columns["picture"] = pyarrow.array(signals.pictures, pyarrow.binary())
    write(
        path, columns, {"first": str(signals.first), "time_base": signals.time_base, "fault": signals.fault}
    )


def read_signals(path: Path) -> Signals:
    """Read a part that `write_signals` wrote.

    Raises:
        UserError: it cannot be read.
    """
    table, told = read(path)
    columns = {name: table[name].to_numpy() for name in table.schema.names if name != "picture"}
    ticks = np.append(columns["begin"], columns["end"][-1:])
    return Signals(
        first=int(told["first"]), values={key: columns[key] for key in FLOATS}, hashes=columns["hash"],
        pictures=table["picture"].to_pylist(), ticks=ticks, time_base=told["time_base"], fault=told["fault"],
    )  # fmt: skip


def write(path: Path, columns: Mapping[str, Any], told: Mapping[str, str]) -> None:
    """Write columns of equal length, and texts about them all.

    Raises:
        UserError: it cannot be written.
    """
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table(dict(columns)).replace_schema_metadata(dict(told))
    try:
        with replacing(path) as aside:
            parquet.write_table(table, aside, compression="zstd")
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], schema: Mapping[str, str]) -> None:
    """Write rows whose columns have the types of `schema`, as pyarrow names them.

    Raises:
        UserError: it cannot be written.
    """
    import pyarrow

    types = {key: pyarrow.list_(pyarrow.uint64()) if kind == "hashes" else pyarrow.type_for_alias(kind)
             for key, kind in schema.items()}  # fmt: skip
    columns = {key: pyarrow.array([row.get(key) for row in rows], kind) for key, kind in types.items()}
    write(path, columns, {})


def read(path: Path, columns: Iterable[str] | None = None) -> tuple[Any, dict[str, str]]:
    """The table of a part, or some of its columns, and the texts about it.

    Raises:
        UserError: it cannot be read.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            table = file.read(columns=None if columns is None else list(columns))
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: is no part of ours ({reason}); delete it and curate again") from error
    return table, {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}


def count(path: Path) -> int:
    """How many rows a part has."""
    from pyarrow import parquet

    return parquet.read_metadata(path).num_rows
