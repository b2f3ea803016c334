"""`kinoflow sample evaluate`: a release on the world's held-out scenes, with one or with many settings."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kinoflow.configs.devices import name_of
from kinoflow.configs.errors import UserError
from kinoflow.configs.terminal import print_json, progress_bar
from kinoflow.data.clips.buckets import Bucket
from kinoflow.sample.evaluation.judge import ATTRIBUTES
from kinoflow.sample.evaluation.plot import plot
from kinoflow.sample.evaluation.statistics import Share
from kinoflow.sample.evaluation.sweep import KEYS, Row, combinations, table
from kinoflow.sample.evaluation.whole import Whole
from kinoflow.sample.evaluation.world import Evaluation, HeldOut
from kinoflow.sample.options import add_best_of, add_guidance, add_hardware, add_lora, named_as_options
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.request import ClipRequest
from kinoflow.sample.settings import described


def main(argv: list[str]) -> int:
    """Print a table, or one JSON object with every figure."""
    args = _parser().parse_args(argv)
    pipeline = _pipeline(args)
    asked = combinations(args.sweep, _common(args))
    with named_as_options():
        plans = [pipeline.plan(request) for _, request in asked]
    torch.set_num_threads(args.threads)  # of what is done beside sampling
    started, rows = time.perf_counter(), []
    held_out = HeldOut(pipeline, args.prompts, first=args.first, kept=args.keep, frames=args.frames)
    with progress_bar() as bar:
        task = bar.add_task("clips", total=args.prompts * len(asked))
        for settings, request in asked:
            found, costs = held_out.evaluate(request, sheet=args.sheet, progress=lambda: bar.advance(task))
            rows.append(Row(settings=settings, evaluation=found, costs=costs))
    known = _known(pipeline, held_out.bucket, args.seed, args.first) | {
        "seconds": round(time.perf_counter() - started, 1)
    }
    if args.plot is not None:
        plot(args.plot, rows, title=f"{known['release']}, {known['clip']}, {args.prompts} prompts")
    if args.sweep:
        figures = known | {"prompts": args.prompts, "rows": [row.figures() for row in rows]}
        _print(args, figures, f"{_line(known)}\n\n{table(rows)}")
        return 0
    (row,), (plan,) = rows, plans
    known |= {"best_of": plan.best_of}
    figures = known | asdict(plan.sampling) | asdict(row.evaluation) | {"costs": asdict(row.costs)}
    _print(args, figures, _table(row, known | described(plan.sampling)))
    return 0


def _print(args: argparse.Namespace, figures: dict[str, Any], text: str) -> None:
    if args.json:
        print_json(figures)
    else:
        print(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kinoflow sample evaluate",
        description="Share of clips that show the colour, shape, motion and word of their prompts, and that "
        "are wholly right: all that is named, and nothing else; with --sweep for each of several settings.",
    )
    add = parser.add_argument
    add("--release", metavar="RELEASE", help="release folder or hub id (default: the shipped mini release)")
    add_lora(add)
    add("--prompts", type=int, default=200, help="number of held-out scenes (default 200)")
    add("--first", type=int, default=0, help="number of the first scene (default 0); the others follow")
    add("--seed", type=int, default=0, help="seed of the first clip; the others follow")
    add("--frames", type=int, help="of each clip (default: the release's); 1 makes pictures")
    add("--steps", type=int, help="intervals of the time grid")
    add("--solver", choices=("euler", "midpoint", "heun", "sde"), help="how an interval is crossed")
    add("--guidance", type=float, help="weight of the prompt")
    add_guidance(add)
    add_best_of(add)
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=VALUE,VALUE",
        help=f"a row of figures for each value; again for every combination; keys: {', '.join(KEYS)}",
    )
    add("--plot", type=Path, metavar="PNG", help="draw the rows of --sweep")
    add(
        "--keep",
        type=Path,
        metavar="FOLDER",
        help="keep the clips there, half a megabyte each, and do not make again those that are there: the "
        "same command goes on after an interruption, with the seconds of then",
    )
    add("--sheet", type=Path, metavar="PNG", help="write a contact sheet of the first clips")
    add_hardware(add)
    add("--json", action="store_true", help="print one JSON object with every figure")
    return parser


def _pipeline(args: argparse.Namespace) -> Pipeline:
    if args.plot is not None and not args.sweep:
        raise UserError("plot: there is nothing to compare; use it with --sweep KEY=VALUE,VALUE")
    if args.plot is not None and args.plot.suffix.lower() != ".png":
        raise UserError(f"{args.plot}: a plot is a PNG; end the name in .png")
    if args.sheet is not None and args.sweep:
        raise UserError("sheet: it shows the clips of one setting; leave out --sweep or --sheet")
    pipeline = Pipeline.from_pretrained(
        args.release, lora=args.lora, device=args.device, dtype=args.dtype, threads=args.threads
    )
    release = pipeline.release
    if release.config.classes:
        raise UserError(f"{release.folder}: makes classes, and the world's scenes are asked for in prompts; "
                        "take a release that reads them")  # fmt: skip
    return pipeline


def _common(args: argparse.Namespace) -> ClipRequest:
    return ClipRequest(
        prompt="a scene", seed=args.seed, frames=args.frames, steps=args.steps, solver=args.solver,
        guidance=args.guidance, guidance_kind=args.guidance_kind, guidance_interval=args.guidance_interval,
        guidance_rescale=args.guidance_rescale, cache=args.cache,
        best_of=args.best_of,
    )  # fmt: skip


def _known(pipeline: Pipeline, bucket: Bucket, seed: int, first: int) -> dict[str, Any]:
    """What every figure depends on beside the settings."""
    release = pipeline.release
    return {
        "release": release.name,
        "weights": release.weights_hash,
        "clip": str(bucket),
        "frames": bucket.frames,
        "fps": str(bucket.fps),
        "first": first,
        "seed": seed,
        "device": pipeline.device.type,
        "dtype": name_of(pipeline.dtype),
        "threads": pipeline.threads,
    }


def _line(settings: dict[str, Any]) -> str:
    return "  ".join(f"{key} {value}" for key, value in settings.items() if value is not None)


def _table(row: Row, settings: dict[str, Any]) -> str:
    found, costs = row.evaluation, row.costs
    shares: dict[str, Share | None] = {key: getattr(found, key) for key in (*ATTRIBUTES, "joint", "word")}
    lines = [_line(settings), "", *_shares(shares | _weakest(found))]
    if found.strict is not None:
        lines += ["", *_shares(_strict(found.strict), "strict judge")]
    lines.append(f"\nFréchet distance {found.frechet:.2f} ({found.frechet_real:.2f} between real clips)")
    saved = f", {costs.reused:.1f} saved" if costs.reused else ""
    lines.append(f"A clip took {costs.seconds:.2f} s and {costs.passes:.1f} passes{saved}")
    return "\n".join(lines)


def _weakest(found: Evaluation) -> dict[str, Share]:
    """What is joint of the colour, the shape and the motion that come out worst."""
    worst = [min(each.items(), key=lambda item: item[1].share) for each in found.classes.values()]
    return {f"joint of {name}": share for name, share in worst}


def _strict(whole: Whole) -> dict[str, Share | None]:
    named = {key.replace("_", " "): share for key, share in whole.attributes.items()}
    return {**named, "nothing unasked": whole.unasked, "wholly right": whole.wholly}


def _shares(shares: Mapping[str, Share | None], head: str = "") -> list[str]:
    """A line for each that was measured."""
    width = max(map(len, (*shares, head)))
    lines = [f"{head:{width}}{'generated':>12}  {'95 % interval':>15}{'clips':>7}{'judge on real':>15}"]
    for key, s in shares.items():
        if s is not None:
            interval = f"{100 * s.low:.1f} to {100 * s.high:.1f}"
            lines.append(
                f"{key:{width}}{100 * s.share:>10.1f} %  {interval:>15}{s.count:>7}{100 * s.real:>13.1f} %"
            )
    return lines
