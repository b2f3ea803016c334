"""Sweeps: one row of figures for each combination of settings, as a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from kinoflow.configs.errors import UserError
from kinoflow.sample.evaluation.world import Costs, Evaluation
from kinoflow.sample.prompts import setting
from kinoflow.sample.request import ClipRequest

KEYS = ("guidance", "guidance-kind", "guidance-interval", "guidance-rescale", "steps", "solver", "cache",
        "best-of")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """Figures of one combination, whose settings are as they were written."""

    settings: dict[str, str]
    evaluation: Evaluation
    costs: Costs

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        return {"settings": self.settings} | asdict(self.evaluation) | asdict(self.costs)


def combinations(sweeps: Sequence[str], common: ClipRequest) -> list[tuple[dict[str, str], ClipRequest]]:
    """Every combination of "key=value,value,…", the last key changing fastest, with its request.

    Raises:
        UserError: what is no such line, a key that is not swept or twice, or a value that it does not take.
    """
    axes: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, _, values = sweep.partition("=")
        if key not in KEYS:
            raise UserError(f"sweep: {key!r} is not swept; use KEY=VALUE,VALUE with one of {', '.join(KEYS)}")
        if key in axes:
            raise UserError(f"sweep: {key} comes twice; give all its values in one")
        axes[key] = values.split(",")
        if not all(axes[key]) or len(set(axes[key])) < len(axes[key]):
            raise UserError(f"sweep: {sweep!r} lacks a value or has one twice; write {key}=VALUE,VALUE")
    rows = []
    for values in product(*axes.values()):
        settings, request = dict(zip(axes, values, strict=True)), common
        for key, value in settings.items():
            request = replace(request, **setting("sweep", key, value))
        rows.append((settings, request))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Adherence, distance and cost of each row."""
    first = rows[0].evaluation
    keys = list(rows[0].settings)
    heads = [*keys, "adherence", "95 %", "Fréchet", "passes", "saved", "s a clip"]
    if first.word is not None:
        heads.insert(len(keys) + 2, "words")
    if first.strict is not None:
        heads.insert(len(keys) + 2, "wholly right")
    lines = [heads]
    for row in rows:
        found, costs = row.evaluation, row.costs
        joint, word = found.joint, found.word
        cells = [*row.settings.values(), f"{100 * joint.share:.1f} %"]
        cells.append(f"{100 * joint.low:.1f}-{100 * joint.high:.1f}")
        if found.strict is not None:
            cells.append(f"{100 * found.strict.wholly.share:.1f} %")
        if word is not None:
            cells.append(f"{round(word.share * word.count)}/{word.count}")
        cells += [
            f"{found.frechet:.2f}",
            f"{costs.passes:.1f}",
            f"{costs.reused:.1f}",
            f"{costs.seconds:.2f}",
        ]
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    real = f"adherence {100 * first.joint.real:.1f} %, Fréchet {first.frechet_real:.2f}"
    if first.strict is not None:
        real += f", wholly right {100 * first.strict.wholly.real:.1f} %"
    return "\n".join([*text, "", f"real clips: {real}"])
