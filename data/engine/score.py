"""From the signals of a video's frames to its shots and their scores, without a look at the video."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from kinoflow.data.engine import borders, motion, quality
from kinoflow.data.engine.config import ShotConfig
from kinoflow.data.engine.parts import FLOATS, Signals, read_signals, write_rows
from kinoflow.data.engine.shots import boundaries, pieces, shots
from kinoflow.data.engine.sources import Source

SCORES = (
    "damaged", "variable_rate", "seconds", "shorter_side", "aspect", "text", "borders", "motion", "shake",
    "jumps", "sharpness", "exposure", "contrast", "flicker",
)  # fmt: skip
LEARNED = ("aesthetic", "match")  # what a model says of kept shots (`learned`), beside the scores
CLUSTERED = ("cluster", "cluster_size")  # which of its clusters a shot is in, and of how many
SCHEMA = {
    "path": "string", "caption": "string", "shot": "int32", "first_frame": "int64", "frames": "int64",
    "begin": "string", "end": "string", "width": "int32", "height": "int32", "fps": "string",
    "error": "string", "camera": "string", "hashes": "hashes", "picture": "binary",
    **dict.fromkeys(SCORES, "float64"),
}  # fmt: skip
"""The columns of the scores. `begin` and `end` are exact seconds of the video, such as 1001/24000."""


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What is known of all frames of a video; `known` is false for those that nothing is known of."""

    values: Mapping[str, np.ndarray]
    hashes: np.ndarray
    pictures: Mapping[int, bytes]
    begins: np.ndarray
    ends: np.ndarray
    known: np.ndarray
    time_base: Fraction

    @classmethod
    def of(cls, parts: Sequence[Signals], frames: int) -> "Whole":
        """Join the pieces."""
        values = {key: np.full(frames, np.nan, np.float32) for key in FLOATS}
        hashes, known = np.zeros(frames, np.uint64), np.zeros(frames, bool)
        begins, ends = np.zeros(frames, np.int64), np.zeros(frames, np.int64)
        for part in parts:
            here = slice(part.first, part.first + len(part))
            for key in FLOATS:
                values[key][here] = part.values[key]
            hashes[here], known[here] = part.hashes, True
            begins[here], ends[here] = part.ticks[:-1], part.ticks[1:]
        pictures = {part.first + index: picture for part in parts
                    for index, picture in enumerate(part.pictures) if picture is not None}  # fmt: skip
        base = next((Fraction(part.time_base) for part in parts if part.time_base), Fraction(1))
        return cls(
            values=values,
            hashes=hashes,
            pictures=pictures,
            begins=begins,
            ends=ends,
            known=known,
            time_base=base,
        )

    def of_shot(self, key: str, shot: range, skip: int = 0) -> np.ndarray:
        """What was measured in a shot, without its first `skip` frames."""
        values = self.values[key][shot.start + skip : shot.stop].astype(np.float64)
        return values[~np.isnan(values)]


def score_to(
    out: Path,
    source: Source,
    facts: Mapping[str, Any],
    parts: Sequence[tuple[range, Path | str]],
    config: ShotConfig,
) -> int:
    """Write the scores of a video's shots, from the parts of its pieces or why there is none; how many.

    A piece that is not known has a row with an `error`. Raises UserError when parts cannot be read.
    """
    if "fault" in facts:
        rows = [{"path": source.path, "caption": source.caption, "error": facts["fault"]}]
    else:
        signals = [read_signals(part) for _, part in parts if isinstance(part, Path)]
        lost = [(span, part) for span, part in parts if isinstance(part, str)]
        ends = {span.start: span.stop for span, _ in parts}
        lost += [
            (range(each.first + len(each), ends[each.first]), each.fault) for each in signals if each.fault
        ]
        rows = score(source, facts, signals, lost, config)
    write_rows(out, rows, SCHEMA)
    return len(rows)


def score(
    source: Source,
    facts: Mapping[str, Any],
    signals: Sequence[Signals],
    lost: Sequence[tuple[range, str]],
    config: ShotConfig,
) -> list[dict[str, Any]]:
    """A row for each piece of a shot, and one for each range of frames that is lost."""
    frames, fps = int(facts["frames"]), Fraction(facts["fps"])
    whole = Whole.of(signals, frames)
    cut, mixed = boundaries(whole.values, config)
    common = {
        "path": source.path, "caption": source.caption, "fps": str(fps), "width": int(facts["width"]),
        "height": int(facts["height"]), "damaged": float(bool(lost)),
        "variable_rate": float(facts["variable_rate"]),
        "shorter_side": float(min(facts["width"], facts["height"])),
        "aspect": facts["width"] / facts["height"],
    }  # fmt: skip
    longest = max(1, int(config.longest * fps))
    rows = [
        {**common, "shot": number, **_row(whole, piece, float(fps), config)}
        for number, shot in enumerate(shots(whole.known, cut, mixed, config.margin))
        for piece in pieces(shot, longest)
    ]
    rows += [{**common, "first_frame": span.start, "frames": len(span), "error": why} for span, why in lost]
    return sorted(rows, key=lambda row: row["first_frame"])


def _row(whole: Whole, shot: range, fps: float, config: ShotConfig) -> dict[str, Any]:
    """Where a piece of a shot is, and its scores; None for what nobody looked at."""
    begin = int(whole.begins[shot.start]) * whole.time_base
    end = int(whole.ends[shot.stop - 1]) * whole.time_base
    seconds = float(end - begin)
    keys = ("flow", "flow_x", "flow_y", "zoom", "roll")
    flow, x, y, zoom, roll = (whole.of_shot(key, shot, skip=1) for key in keys)
    sides = np.stack([whole.of_shot(side, shot) for side in borders.SIDES], axis=1)
    change = whole.of_shot("change", shot, skip=1)
    jumps = int((change >= config.content).sum())
    middle = (shot.start + shot.stop) // 2
    seen = min((at for at in whole.pictures if at in shot), key=lambda at: abs(at - middle), default=None)
    sharp, text = whole.of_shot("sharpness", shot), whole.of_shot("text", shot)
    return {
        "first_frame": shot.start, "frames": len(shot), "begin": str(begin), "end": str(end),
        "seconds": seconds, "picture": None if seen is None else whole.pictures[seen],
        "hashes": whole.hashes[shot.start : shot.stop][whole.hashes[shot.start : shot.stop] != 0].tolist(),
        "text": _mean(text), "borders": borders.share(sides) if len(sides) else None,
        "camera": motion.camera(x, y, zoom, roll, fps), "motion": motion.amount(flow, fps),
        "shake": motion.shake(x, y, fps),
        "jumps": jumps / max(seconds, 1e-9),
        "sharpness": float(np.median(sharp)) if len(sharp) else None,
        "exposure": _mean(whole.of_shot("clipped", shot)), "contrast": _mean(whole.of_shot("contrast", shot)),
        "flicker": quality.flicker(whole.of_shot("luma", shot)),
    }  # fmt: skip


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
