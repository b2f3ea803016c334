"""`funnel.html`: how many clips each stage lets through beside the paper's, and what it lets through."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.configs.files import replacing
from kinoflow.data.engine.selection import READABLE, Selection, Stage, read_pictures, scored

PAGE, _TEMPLATE = "funnel.html", "funnel.html.j2"
# Per cent of the raw videos that are left behind the paper's stages (Movie Gen, data curation).
_PAPER = {
    "seconds": 100.0, "shorter_side": 25.0, "aspect": 7.0, "text": 1.94, "borders": 1.87, "motion": 1.32,
    "jumps": 1.22, "duplicates": 1.15, "resample": 0.94,
}  # fmt: skip
_ABOUT = {
    READABLE: "a video, or a piece of it, that could be decoded",
    "damaged": "1 where anything of the video is damaged",
    "variable_rate": "1 where frames last differently long",
    "seconds": "length of the shot",
    "shorter_side": "pixels",
    "aspect": "width over height",
    "text": "share of the picture covered by written text",
    "borders": "share of the picture that is letter or pillar box",
    "motion": "thousandths of the longer side in a 24th of a second",
    "shake": "thousandths of the longer side from the camera's smooth path",
    "jumps": "changes like cuts, a second",
    "sharpness": "variance of the Laplacian",
    "exposure": "share of the pixels that are black or white",
    "contrast": "levels of 255",
    "flicker": "levels of 255",
    "aesthetic": "what the linear layer says of the pictures",
    "match": "cosine of caption and pictures",
    "duplicates": "bits in which the hashes of like pictures differ",
    "resample": "shots of large clusters, at random",
}
_BINS, _WIDTH, _HEIGHT, _SHOWN = 48, 480, 90, 4


@dataclass(frozen=True, kw_only=True)
class _Bar:
    """Of a histogram: in units of its picture; `css` says whether its clips stay."""

    x: float
    y: float
    width: float
    height: float
    css: str


def write_page(out: Path, selection: Selection) -> None:
    """Write the page.

    Raises:
        UserError: it cannot be written.
    """
    scores = {key: selection.table[key].to_numpy(zero_copy_only=False) for key in scored(selection.table)}
    examples = {stage.name: _examples(selection, stage, scores) for stage in selection.stages}
    rows = {row for kept, dropped in examples.values() for row in (*kept, *dropped)}
    pictures = read_pictures(out, rows)
    stages = []
    for stage in selection.stages:
        kept, dropped = examples[stage.name]
        values = scores.get(stage.name)
        shown = [
            (title, [_example(selection, stage, row, values, pictures) for row in chosen])
            for title, chosen in (("nearest that stay", kept), ("nearest that go", dropped))
            if chosen
        ]
        stages.append({
            "name": stage.name.replace("_", " "), "about": _ABOUT.get(stage.name, ""), "stage": stage,
            "share": 100 * stage.stayed / max(1, len(selection.table)), "paper": _PAPER.get(stage.name),
            "histogram": None if values is None else _histogram(values, stage), "examples": shown,
        })  # fmt: skip
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    seconds = scores["seconds"]
    page = templates.get_template(_TEMPLATE).render(
        stages=stages, shots=len(selection.table), kept=len(selection.kept), size=(_WIDTH, _HEIGHT),
        minutes=float(np.nansum(seconds)) / 60, kept_minutes=float(seconds[selection.kept].sum()) / 60,
        videos=len(set(selection.table["path"].to_pylist())),
    )  # fmt: skip
    try:
        with replacing(out / PAGE) as aside:
            aside.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(os_error_line(out / PAGE, error)) from error


def _examples(
    selection: Selection, stage: Stage, scores: dict[str, np.ndarray]
) -> tuple[list[int], list[int]]:
    """Rows that stay and rows that go, those nearest to the limit first; none where nothing goes."""
    gone = np.array([row for row, why in selection.ledger.items() if why["stage"] == stage.name], int)
    if stage.name not in scores:
        return [], sorted(gone.tolist())[:_SHOWN]
    values, limits = scores[stage.name], [x for x in (stage.least, stage.most) if x is not None]
    if len(gone) == 0 or not limits:
        return [], []

    def nearest(rows: np.ndarray) -> list[int]:
        rows = rows[~np.isnan(values[rows])]
        distance = np.min([np.abs(values[rows] - limit) for limit in limits], axis=0)
        return rows[np.argsort(distance, kind="stable")][:_SHOWN].tolist()

    return nearest(selection.kept), nearest(gone)


def _example(
    selection: Selection, stage: Stage, row: int, values: np.ndarray | None, pictures: dict[int, bytes]
) -> dict[str, Any]:
    told = {key: selection.table[key][row].as_py() for key in ("path", "begin", "error", "first_frame")}
    why = selection.ledger.get(row, {})
    text = "" if values is None else f"{values[row]:.4g}"
    if stage.name == READABLE:
        text = str(told["error"])
    elif "like" in why:
        text = f"like {Path(why['like']['path']).name}, frame {why['like']['first_frame']}"
    elif "cluster" in why:
        text = f"cluster {why['cluster']} of {why['cluster_size']} shots"
    picture = pictures.get(row)
    uri = None if picture is None else f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
    return {"name": Path(told["path"]).name, "frame": told["first_frame"], "text": text, "uri": uri}


def _histogram(values: np.ndarray, stage: Stage) -> dict[str, Any] | None:
    """Bars from the 0.5th to the 99.5th percentile of the clips, and lines at the limits."""
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return None
    limits = [x for x in (stage.least, stage.most) if x is not None]
    low, high = np.percentile(values, [0.5, 99.5])
    low, high = min([float(low), *limits]), max([float(high), *limits])
    high = high if high > low else low + 1
    low, high = low - 0.02 * (high - low), high + 0.02 * (high - low)
    counts, edges = np.histogram(np.clip(values, low, high), _BINS, (low, high))
    scale, step = _HEIGHT / max(1, counts.max()), _WIDTH / _BINS
    middles = (edges[:-1] + edges[1:]) / 2
    bars = [
        _Bar(x=index * step, y=_HEIGHT - count * scale, width=step - 1, height=count * scale,
             css="stay" if _stays(middle, stage) else "go")
        for index, (count, middle) in enumerate(zip(counts.tolist(), middles.tolist(), strict=True))
        if count
    ]  # fmt: skip
    lines = [(float((limit - low) / (high - low) * _WIDTH), f"{limit:g}") for limit in limits]
    return {
        "bars": bars,
        "lines": lines,
        "low": f"{low:.3g}",
        "high": f"{high:.3g}",
        "most": int(counts.max()),
    }


def _stays(value: float, stage: Stage) -> bool:
    bounds: Sequence[float | None] = (stage.least, stage.most)
    least, most = bounds
    return (least is None or value >= least) and (most is None or value <= most)
