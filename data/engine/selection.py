"""`kinoflow data select`: which of the scored shots are kept, and why each other one is not.

Decides on the tables alone, so that other thresholds cost seconds. Every clip that is dropped has one line in
`ledger.jsonl`, those that are kept make `manifest.jsonl`.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.configs.files import replacing, seeded
from kinoflow.data.clips import manifest
from kinoflow.data.clips.manifest import ClipEntry
from kinoflow.data.engine import captioning, parts
from kinoflow.data.engine.clusters import thinned
from kinoflow.data.engine.config import Rule, SelectConfig
from kinoflow.data.engine.curate import PARTS
from kinoflow.data.engine.duplicates import Hashed, duplicates
from kinoflow.data.engine.score import CLUSTERED, LEARNED, SCHEMA, SCORES

MANIFEST, LEDGER = "manifest.jsonl", "ledger.jsonl"
READABLE, DUPLICATES, RESAMPLE = "readable", "duplicates", "resample"  # the first stage and the last two
_HIGHER = {"seconds", "shorter_side", "sharpness", "contrast", "motion", *LEARNED}  # of which more is better
_LOWER = {"text", "borders", "shake", "jumps", "exposure", "flicker"}
_WHERE = ("path", "first_frame", "frames", "begin", "end")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one rule did: how many came and stayed, and the limits that it drew."""

    name: str
    came: int
    stayed: int
    least: float | None = None
    most: float | None = None
    rule: str = ""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The table, the stages in order, the rows that are kept, and why each other row is not."""

    table: Any
    stages: tuple[Stage, ...]
    kept: np.ndarray
    ledger: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


def read_scores(out: Path) -> Any:
    """The rows of all videos, in the order of their paths and frames.

    Raises:
        UserError: nothing was curated there.
    """
    import pyarrow

    listing = out / PARTS
    try:
        names = json.loads(listing.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{listing}: {error.strerror}; run kinoflow data curate SOURCE {out} first"
        ) from error
    columns = [key for key in SCHEMA if key != "picture"]  # those are many bytes
    tables = [parts.read(out / "scores" / name, columns)[0] for name in names]
    if not tables:
        raise UserError(f"{listing}: names no video; run kinoflow data curate SOURCE {out} again")
    return pyarrow.concat_tables(tables)


def read_pictures(out: Path, rows: Collection[int]) -> dict[int, bytes]:
    """Small JPEG of some of the rows of `read_scores`, those that have one.

    Raises:
        UserError: a part cannot be read.
    """
    wanted, found, first = set(rows), dict[int, bytes](), 0
    for name in json.loads((out / PARTS).read_text(encoding="utf-8")):
        path = out / "scores" / name
        count = parts.count(path)
        here = sorted(wanted & set(range(first, first + count)))
        pictures = parts.read(path, ["picture"])[0]["picture"] if here else ()
        found |= {row: pictures[row - first].as_py() for row in here}
        first += count
    return {row: picture for row, picture in found.items() if picture is not None}


def select(table: Any, config: SelectConfig) -> Selection:
    """Ask each rule in turn, then look for duplicates among what is left, and thin its clusters.

    Raises:
        UserError: "best" of a score of which neither more nor less is better; no clusters to resample.
    """
    scores = {key: table[key].to_numpy(zero_copy_only=False) for key in scored(table)}
    errors = table["error"].to_pylist()
    ledger: dict[int, Mapping[str, Any]] = {}
    alive = np.array([error is None for error in errors], bool)
    for index in np.flatnonzero(~alive).tolist():
        ledger[index] = {"stage": READABLE, "score": None, "threshold": None, "reason": errors[index]}
    stages = [Stage(name=READABLE, came=len(errors), stayed=int(alive.sum()))]
    for key, rule in config.rules().items():
        if key not in scores:
            raise UserError(f"select.{key}: nothing was looked at by a model; run kinoflow data embed first")
        least, most = _limits(key, rule, scores[key][alive])
        values = scores[key]
        # What was not looked at (too short for a large picture) is not dropped for it.
        bad = alive & ~np.isnan(values) & ((values < least) | (values > most))
        text = _text(rule, least, most)
        for index in np.flatnonzero(bad).tolist():
            ledger[index] = {"stage": key, "score": _rounded(values[index]), "threshold": text}
        stages.append(Stage(name=key, came=int(alive.sum()), stayed=int((alive & ~bad).sum()),
                            least=_finite(least), most=_finite(most), rule=text))  # fmt: skip
        alive &= ~bad
    if config.duplicates is not None:
        came = int(alive.sum())
        for index, like in _repeated(table, alive, config.duplicates).items():
            first = {key: table[key][like].as_py() for key in ("path", "first_frame")}
            ledger[index] = {"stage": DUPLICATES, "score": None, "threshold": f"{config.duplicates} bits",
                             "like": first}  # fmt: skip
            alive[index] = False
        rule = f"{config.duplicates} bits of 64"
        stages.append(Stage(name=DUPLICATES, came=came, stayed=int(alive.sum()), rule=rule))
    if config.resample is not None:
        stages.append(_resample(table, alive, ledger, config.resample, config.seed))
    return Selection(table=table, stages=tuple(stages), kept=np.flatnonzero(alive), ledger=ledger)


def scored(table: Any) -> list[str]:
    """The scores that a table has."""
    return [key for key in (*SCORES, *LEARNED, *CLUSTERED) if key in table.schema.names]


def write(selection: Selection, out: Path) -> None:
    """Write the ledger and the manifest, with the captions that `kinoflow data caption` made.

    Raises:
        UserError: they cannot be written, or nothing is kept.
    """
    captions = captioning.read(out)
    path = out / LEDGER
    try:
        with replacing(path) as aside, aside.open("w", encoding="utf-8") as file:
            for index in sorted(selection.ledger):
                row = {key: selection.table[key][index].as_py() for key in _WHERE} | dict(
                    selection.ledger[index]
                )
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error
    entries = _entries(selection)
    manifest.write(out / MANIFEST, entries if captions is None else map(captions.applied, entries))


def _entries(selection: Selection) -> Iterator[ClipEntry]:
    """The kept clips. One of a variable rate does not say its rate: who cuts it looks."""
    names = [key for key in SCHEMA if key not in ("hashes", "picture", "error", *SCORES)]
    table = selection.table.select([*names, *scored(selection.table)])
    for index in selection.kept.tolist():
        row = {key: table[key][index].as_py() for key in table.schema.names}
        extra = {key: _rounded(row[key]) for key in scored(table) if row[key] is not None}
        yield ClipEntry(
            path=row["path"], caption=row["caption"] or "", first_frame=row["first_frame"],
            frames=row["frames"], fps=None if row["variable_rate"] else Fraction(row["fps"]),
            width=row["width"], height=row["height"],
            extra={"shot": row["shot"], "begin": row["begin"], "end": row["end"],
                   "camera": row["camera"]} | extra,
        )  # fmt: skip


def _resample(
    table: Any, alive: np.ndarray, ledger: dict[int, Mapping[str, Any]], whole: float, seed: int
) -> Stage:
    """Thin large clusters: the draw of a shot depends on where it is, not on the others."""
    if CLUSTERED[0] not in table.schema.names:
        raise UserError("select.resample: there are no clusters; run kinoflow data embed with clip.clusters")
    came = np.flatnonzero(alive)
    cluster, size = (table[key].to_numpy(zero_copy_only=False)[came] for key in CLUSTERED)
    where = zip(table["path"].to_pylist(), table["first_frame"].to_pylist(), strict=True)
    draws = np.array([seeded("resample", seed, *each) / 2**63 if stays else 0.0
                      for each, stays in zip(where, alive, strict=True)])[came]  # fmt: skip
    for at, limit in thinned(cluster, size, draws, whole).items():
        ledger[int(came[at])] = {"stage": RESAMPLE, "score": _rounded(draws[at]), "threshold": f":{limit:g}",
                                 "cluster": int(cluster[at]), "cluster_size": int(size[at])}  # fmt: skip
        alive[came[at]] = False
    rule = f"clusters above {whole:g} by 1/sqrt(size)"
    return Stage(name=RESAMPLE, came=len(came), stayed=int(alive.sum()), rule=rule)


def _limits(key: str, rule: Rule, values: np.ndarray) -> tuple[float, float]:
    if rule.best is None:
        return (-np.inf if rule.least is None else rule.least), (np.inf if rule.most is None else rule.most)
    if key not in _HIGHER | _LOWER:
        raise UserError(f"select.{key}: of this score neither more nor less is better; write least:most")
    values = np.sort(values[~np.isnan(values)])
    if len(values) == 0:
        return -np.inf, np.inf
    count = max(1, round(rule.best * len(values)))
    return (float(values[-count]), np.inf) if key in _HIGHER else (-np.inf, float(values[count - 1]))


def _text(rule: Rule, least: float, most: float) -> str:
    limits = f"{'' if np.isinf(least) else format(least, 'g')}:{'' if np.isinf(most) else format(most, 'g')}"
    return limits if rule.best is None else f"best {100 * rule.best:g}% ({limits})"


def _finite(value: float) -> float | None:
    return None if np.isinf(value) else float(value)


def _rounded(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else float(f"{value:.6g}")


def _repeated(table: Any, alive: np.ndarray, bits: int) -> dict[int, int]:
    """Rows that repeat another one, and which: the largest picture stays, then the longest, the sharpest."""
    keys = ("path", "shot", "width", "height", "frames", "sharpness")
    facts = {key: table[key].to_pylist() for key in keys}

    def rank(row: int) -> tuple[float, ...]:
        pixels = facts["width"][row] * facts["height"][row]
        return float(-pixels), float(-facts["frames"][row]), -(facts["sharpness"][row] or 0.0), float(row)

    order = sorted(np.flatnonzero(alive).tolist(), key=rank)
    clips = [
        Hashed(
            hashes=np.array(table["hashes"][row].as_py(), np.uint64),
            shot=(facts["path"][row], facts["shot"][row]),
        )
        for row in order
    ]
    return {order[one]: order[other] for one, other in duplicates(clips, bits).items()}
