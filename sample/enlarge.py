"""`kinoflow sample upsample CLIP OUT`: make any clip or picture larger, with an upsampler."""

from __future__ import annotations

import argparse
from pathlib import Path

from kinoflow.configs.terminal import argument, one_line_warnings, print_json
from kinoflow.sample.job import Job, Sampler
from kinoflow.sample.larger import require_upsampler, upsampler_of
from kinoflow.sample.options import CRF, add_hardware, named_as_options
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.request import ClipRequest
from kinoflow.tae.tiles.memory import parse_bytes


def main(argv: list[str]) -> int:
    """Write the larger clip; 0."""
    args = _parser().parse_args(argv)
    pipeline = Pipeline.from_pretrained(
        upsampler_of(args.weights),
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        memory=args.memory,
    )
    require_upsampler(pipeline.release)
    request = ClipRequest(
        prompt=args.prompt, seed=args.seed, steps=args.steps, guidance=args.guidance, upsample=str(args.clip)
    )
    with named_as_options(), one_line_warnings():
        plan = pipeline.plan(request)
        made = Sampler(pipeline, crf=args.crf, quiet=args.json).run(Job(plan=plan, out=args.out))
    if args.json:
        print_json({"clips": [made], "bytes": pipeline.bytes()})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kinoflow sample upsample",
        description="Make a clip or a picture larger. It keeps its frames and its rate; sound is left out.",
    )
    add = parser.add_argument
    add("clip", type=Path, metavar="CLIP", help="of a size that the upsampler takes")
    add("out", type=Path, metavar="OUT", help="file to write: .mp4, .gif, .webp, or .png of a picture")
    add(
        "--weights",
        metavar="UPSAMPLER",
        help="release folder or hub id of an upsampler, or of a release that has one (default: the shipped)",
    )
    add("--prompt", default="", help="what the clip shows, if you can say it")
    add("--seed", type=int, default=0, help="another seed, other details (default 0)")
    add("--steps", type=int, help="intervals of the time grid (default: the release's)")
    add("--guidance", type=float, help="weight of the prompt (default: the release's, 1: the fastest)")
    add("--crf", type=float, default=CRF, help=f"H.264 quality, 0 best to 51 worst (default {CRF:g})")
    add(
        "--memory",
        type=argument(parse_bytes),
        metavar="SIZE",
        help="memory for the weights, 8GiB for example (default: as much as they take), and for the tiles "
        "in which large frames are decoded (default 4GiB)",
    )
    add_hardware(add)
    add("--json", action="store_true", help="print one JSON object with every figure")
    return parser
