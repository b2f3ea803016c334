"""`kinoflow sample again CLIP`: make a clip again from what it says of itself, and compare."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from kinoflow.configs.errors import UserError
from kinoflow.configs.terminal import one_line_warnings, print_json
from kinoflow.data.clips.buckets import parse
from kinoflow.data.video import read
from kinoflow.sample.given import Given
from kinoflow.sample.job import Job, Sampler
from kinoflow.sample.larger import upsampler_of
from kinoflow.sample.options import CRF
from kinoflow.sample.output import file_metadata, is_lossless, read_metadata
from kinoflow.sample.picture import read_frames
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.processes import Team
from kinoflow.sample.request import ClipRequest
from kinoflow.sample.rewritten import KEYS
from kinoflow.sample.settings import asked
from kinoflow.tae.tiles.tiled import DEFAULT_MEMORY

_VERSIONS = ("kinoflow", "torch")  # others may round otherwise, which the comparison tells


def main(argv: list[str], team: Team | None = None) -> int:
    """0 when the clip that was made again is equal, 1 when not."""
    args = _parser().parse_args(argv)
    written = read_metadata(args.clip)
    with one_line_warnings():
        return _again(args, written, team)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kinoflow sample again",
        description="Make a clip again from its own metadata and compare: exits with 0 when all frames are "
        "equal, else with 1.",
    )
    add = parser.add_argument
    add("clip", type=Path, metavar="CLIP", help="made by kinoflow sample, its server or a Pipeline")
    add("--weights", metavar="RELEASE", help="what it was made with (default: the shipped mini release)")
    add(
        "--upsample",
        metavar="UPSAMPLER",
        nargs="?",
        const="upsampler",
        help="of a clip that was made and then made larger: what did that (default: the release's own)",
    )
    add("--out", type=Path, help="keep what is made, under this name")
    add("--json", action="store_true", help="print one JSON object with every figure")
    return parser


def _again(args: argparse.Namespace, written: Mapping[str, str], team: Team | None) -> int:
    _refuse_other_number(args.clip, written, team)
    pipeline, request = _pipeline(args, written, team), _request(args.clip, written)
    plan = pipeline.plan(request)
    crf = _number(args.clip, written, "crf", CRF)
    planned = file_metadata(args.clip, pipeline.metadata(plan), crf)
    others = sorted(key for key in planned if key not in _VERSIONS and written.get(key) != planned[key])
    if others:
        told = ", ".join(f"{key} {written.get(key)}, here {planned[key]}" for key in others)
        raise UserError(f"{args.clip}: made otherwise ({told}); name what it was made with in --weights")
    with TemporaryDirectory() as folder:
        out = args.out or Path(folder, f"again{args.clip.suffix}")
        if out.suffix.lower() != args.clip.suffix.lower() or out.resolve() == args.clip.resolve():
            raise UserError(f"{out}: give --out another name that ends in {args.clip.suffix}")
        more = {key: written[key] for key in KEYS if key in written}
        made = Sampler(pipeline, crf=crf, quiet=True).run(Job(plan=plan, out=out, more=more))
        same_file = out.read_bytes() == args.clip.read_bytes()
        same_frames = same_file or _equal(_frames(args.clip), _frames(out))
    versions = {key: [written.get(key), planned[key]] for key in _VERSIONS}
    if args.json:
        print_json(made | {"equal": same_frames, "same_file": same_file, "versions": versions})
        return 0 if same_frames else 1
    changed = [f"{key} {old} then, {new} now" for key, (old, new) in versions.items() if old != new]
    verdict = "equal, to the byte" if same_file else "equal in all frames" if same_frames else "not equal"
    print(f"{args.clip}: {verdict}" + (f" ({', '.join(changed)})" if changed else ""))
    return 0 if same_frames else 1


def _refuse_other_number(clip: Path, written: Mapping[str, str], team: Team | None) -> None:
    """Refuse another number of processes, which would round otherwise.

    Raises:
        UserError: one line that says how many made the clip.
    """
    then, now = int(_number(clip, written, "processes", 1)), 1 if team is None else team.size
    if then != now:
        how = "kinoflow sample again"
        if then > 1:
            how = f"torchrun --nproc-per-node {then} -m kinoflow.sample again"
        raise UserError(f"{clip}: {then} processes made it, and these are {now}; run {how} {clip}")


def _pipeline(args: argparse.Namespace, written: Mapping[str, str], team: Team | None) -> Pipeline:
    clip = args.clip
    if "weights" not in written or not {"prompt", "label", "upsample"} & written.keys():
        raise UserError(f"{clip}: does not say how it was made; give a file of kinoflow sample")
    if ("upsampler" in written) != (args.upsample is not None):
        made = written.get("upsampler", "nothing")
        raise UserError(f"{clip}: {made} made it larger; name just that in --upsample")
    pipeline = Pipeline.from_pretrained(
        upsampler_of(args.weights) if "upsample" in written else args.weights,
        lora=_words(clip, written.get("lora", "")),
        device=written.get("device", "cpu"),
        dtype=written.get("dtype", "fp32"),
        threads=int(_number(clip, written, "threads", 1)),
        team=team,
        upsample=args.upsample,
    )
    for part in filter(None, (pipeline, pipeline.upsampler)):
        part.memory = int(_number(clip, written, "memory", DEFAULT_MEMORY))  # of its tiles
    if pipeline.release.weights_hash != written["weights"]:
        raise UserError(
            f"{clip}: made with {written.get('release')}, weights {written['weights']}; these are "
            f"{pipeline.release.name}, {pipeline.release.weights_hash}: name its release in --weights"
        )
    return pipeline


def _words(clip: Path, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{clip}: its lora is {text!r} ({error}); it cannot be made again") from None


def _request(clip: Path, written: Mapping[str, str]) -> ClipRequest:
    settings: dict[str, Any] = {}
    try:
        bucket = parse(written["clip"])
        settings |= asked(written) | Given.again(written).files
        return ClipRequest(
            prompt=written.get("label", written.get("prompt", "")),
            negative=written.get("negative"),
            seed=int(written["seed"]),
            best_of=int(written.get("best_of", 1)),
            frames=bucket.frames,
            width=bucket.width,
            height=bucket.height,
            fps=None if bucket.frames == 1 else bucket.fps,
            **settings,
            seconds=float(written["seconds"]) if "seconds" in written else None,
        )
    except (KeyError, ValueError) as error:
        raise UserError(f"{clip}: its metadata is damaged ({error}); it cannot be made again") from None


def _number(clip: Path, written: Mapping[str, str], key: str, default: float | int) -> float:
    try:
        return float(written.get(key, default))
    except ValueError:
        raise UserError(f"{clip}: its {key} is {written[key]!r}; it cannot be made again") from None


def _frames(path: Path) -> np.ndarray:
    return read_frames(path) if is_lossless(path) else read(path)


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and bool((one == other).all())
