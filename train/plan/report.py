"""The plan on paper: tables for people, one JSON object for scripts."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kinoflow.configs.schema import load, to_dict
from kinoflow.train.plan.config import PlanConfig
from kinoflow.train.plan.memory import GIB
from kinoflow.train.plan.plan import Plan, plan

USAGE = """usage: kinoflow train plan MODEL.yaml STAGE.yaml [key=value …] [--json]

Memory, FLOPs and days of a training run on a cluster; --json prints every figure as one JSON object."""


def main(arguments: Sequence[str]) -> int:
    """`train plan CONFIG.yaml … [key=value …] [--json]`; 0 whether or not the run fits, 2 for no word at all.

    Raises:
        UserError: a mistake in a file or a key.
    """
    if not arguments:
        print(USAGE)
        return 2
    sources = [argument for argument in arguments if argument != "--json"]
    found = plan(load(PlanConfig, sources))
    if len(sources) < len(arguments):
        print(json.dumps(as_json(found), indent=2))
    else:
        show(found)
    return 0


def as_json(plan: Plan) -> dict[str, Any]:
    """Every figure: bytes, FLOPs, seconds; with what it was computed from."""
    memory, inputs = plan.memory, plan.inputs
    clips = [
        {**asdict(clip), "tokens": clip.tokens, "micro_batch": inputs.micro_batch(clip.batch_size)}
        for clip in plan.clips
    ]
    return {
        "model": plan.model,
        "inputs": {**to_dict(inputs), "budget": inputs.budget},
        "clips": clips,
        "text_encoders": [asdict(encoder) for encoder in plan.encoders],
        "precomputation": plan.precomputation,
        "parameters": {"total": sum(plan.parameters.values()), "parts": plan.parameters},
        "flops": plan.flops,
        "memory": {**asdict(memory), "peak": memory.peak, "fits": memory.peak <= inputs.budget},
        "time": plan.time,
        "smallest_cluster": plan.smallest,
        "warnings": plan.warnings,
    }


def show(plan: Plan) -> None:
    """Tables on stdout, as wide as the terminal; warnings last."""
    from rich.console import Console

    console = Console(highlight=False)
    for title, columns, rows in _tables(plan):
        console.print(_table(title, columns, rows))
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == "total" else None)
    return table


Rows = list[Sequence[str]]


def _tables(plan: Plan) -> list[tuple[str, Sequence[str], Rows]]:
    return [
        ("Parameters", ("part", "count", "share"), _parameters(plan)),
        ("FLOPs", ("", "of a token", "of a step"), _flops(plan)),
        ("Memory of one GPU", ("kind", "GiB"), _memory(plan)),
        ("Time", ("", ""), _time(plan)),
        *([("Text, before training", ("", ""), _text(plan))] if plan.precomputation else []),
        ("Smallest cluster", ("", "GPUs", "GiB", "days", "settings"), _smallest(plan)),
    ]


def _parameters(plan: Plan) -> Rows:
    whole = sum(plan.parameters.values())
    rows: Rows = [(part, f"{count:,}", f"{count / whole:.2%}") for part, count in plan.parameters.items()]
    return [*rows, ("total", f"{whole:,}", "")]


def _flops(plan: Plan) -> Rows:
    token, step = plan.flops["per_token"], plan.flops["per_step"]
    names = {
        "forward": "forward",
        "backward": "backward",
        "recomputation": "recomputation, checkpointing",
        "fused_attention": "recomputation, fused attention",
    }
    rows: Rows = [(name, f"{token[key]:.3e}", f"{step[key]:.3e}") for key, name in names.items() if step[key]]
    return [*rows, ("total", f"{token['hardware']:.3e}", f"{step['hardware']:.3e}")]


def _memory(plan: Plan) -> Rows:
    memory = plan.memory
    rows: Rows = [
        (kind.replace("_", " "), f"{size / GIB:.2f}") for kind, size in memory.kinds.items() if size
    ]
    rows += [("total", f"{memory.peak / GIB:.2f}"), ("there is", f"{plan.inputs.budget / GIB:.2f}")]
    rows += [("in host memory", f"{memory.host / GIB:.2f}")] if memory.host else []
    return [*rows, ("largest bucket", memory.clip.split()[0])]


def _time(plan: Plan) -> Rows:
    inputs, time = plan.inputs, plan.time
    return [
        ("GPUs", f"{inputs.gpus:,} x {inputs.peak_flops / 1e12:.0f} TFLOP/s"),
        ("clips of a step", " / ".join(sorted({str(clip.batch_size) for clip in plan.clips}))),
        ("video tokens of a step", f"{plan.flops['tokens_per_step']:,.0f}"),
        ("MFU, assumed", f"{time['mfu']:.0%}"),
        ("use of the hardware that it takes", f"{time['hardware_utilization']:.0%}"),
        ("step", f"{time['step_seconds']:.3g} s"),
        ("tokens a second", f"{time['tokens_per_second']:,.0f}"),
        (f"{inputs.steps:,} steps", f"{_days(time['days'])} days"),
        ("GPU hours", f"{time['gpu_hours']:,.0f}"),
    ]


def _text(plan: Plan) -> Rows:
    found = plan.precomputation
    return [
        ("encoders on each GPU, bf16", f"{found['weights'] / GIB:.2f} GiB"),
        ("FLOPs of the longest prompt", f"{found['prompt_flops']:.3e}"),
        ("its states on the disk", f"{found['prompt_states'] / 2**20:.2f} MiB"),
        ("GPU hours of a million", f"{found['gpu_hours_per_million']:,.0f}"),
    ]


def _smallest(plan: Plan) -> Rows:
    rows: Rows = []
    for name, found in plan.smallest.items():
        label = name.replace("_", " ")
        if found is None:
            rows.append((label, "none", "", "", ""))
            continue
        settings = (
            f"ZeRO {found['zero_stage']}, parallel.sequence {found['sequence']}, "
            f"checkpoint_every {found['checkpoint_every']}, accumulation {found['accumulation']}"
        )
        size, peak = f"{found['gpus']:,}", f"{found['peak'] / GIB:.1f}"
        rows.append((label, size, peak, _days(found["days"]), settings))
    return rows


def _days(days: float) -> str:
    return f"{days:,.0f}" if days >= 100 else f"{days:.3g}"
