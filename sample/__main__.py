"""`kinoflow sample "PROMPT"` (or `--label CLASS`) writes a clip; `again` makes one again from its own file.

`upsample` makes a clip larger, `evaluate` measures a release, `serve` serves it, `export-diffusers` and
`push` give it to others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kinoflow.configs.errors import UserError, run
from kinoflow.configs.launch import current, without_local_rank
from kinoflow.configs.terminal import argument, one_line_warnings, parse_rate, print_json
from kinoflow.sample.options import (
    CRF,
    add_best_of,
    add_guidance,
    add_hardware,
    add_lora,
    add_rewrite,
    folder_of_list,
    named_as_options,
    parse_size,
    refuse_other_kind,
)

if TYPE_CHECKING:
    from kinoflow.sample.job import Job
    from kinoflow.sample.pipeline import Pipeline
    from kinoflow.sample.processes import Team
    from kinoflow.sample.request import ClipRequest

_ALONE = ("export-diffusers", "push", "evaluate", "upsample")
_DESCRIBE = 'describe the clip, for example "a red star moves left on a gray background"'


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, 1 if prompts of a list failed, 2 after a user's mistake."""
    return run(lambda: _start(sys.argv[1:] if argv is None else argv), "kinoflow sample")


def _start(argv: list[str]) -> int:
    """The command, in the first of the processes that a launcher started, or in the only one."""
    me = current()
    if me.size == 1:
        return _command(argv, None)
    from kinoflow.sample.processes import together

    return together(me, lambda team: _command(without_local_rank(argv), team))


def _command(argv: list[str], team: Team | None) -> int:
    if argv[:1] == ["again"]:
        from kinoflow.sample.again import main as again

        return again(argv[1:], team)
    if argv[:1] == ["serve"]:
        from kinoflow.sample.serve.command import main as serve

        return serve(argv[1:], team)
    if argv[:1] and argv[0] in _ALONE:
        if team is not None:
            raise UserError(f"{argv[0]}: one process does it; start it without torchrun")
        return _alone(argv[0], argv[1:])
    return _sample(_parser().parse_args(argv), team)


def _alone(verb: str, words: list[str]) -> int:
    """What one process does."""
    if verb == "export-diffusers":
        from kinoflow.sample.export import main as export

        return export(words)
    if verb == "upsample":
        from kinoflow.sample.enlarge import main as upsample

        return upsample(words)
    if verb == "push":
        from kinoflow.sample.hub import main as push

        return push(words)
    from kinoflow.sample.evaluation.command import main as evaluate

    return evaluate(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kinoflow sample",
        description="Write a clip for a prompt or class. To make one again from its file: kinoflow sample "
        "again --help; to make any clip larger: kinoflow sample upsample --help; to measure a release: "
        "kinoflow sample evaluate --help; to serve one: kinoflow sample serve --help; to give it to others: "
        "kinoflow sample export-diffusers --help and push --help. "
        "Several processes (torchrun --nproc-per-node 2 -m kinoflow.sample ...) make each clip together.",
    )
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="what the clip shows; quoted words are written in it")
    add("--label", metavar="CLASS", help="name or number of a class, for a release that has classes")
    add(
        "--out",
        type=Path,
        help="file or, with --prompts, folder (default: named after the prompt); .mp4, .gif and .webp move, "
        ".png is one frame or a contact sheet",
    )
    _add_settings(add)
    _add_given(add)
    add(
        "--weights",
        metavar="RELEASE",
        help="release folder or hub id, or Stable Diffusion 3's or 3.5's in diffusers' layout (default: the "
        "shipped mini release)",
    )
    add_lora(add)
    add_rewrite(add)
    _add_lists(add)
    add(
        "--text-cache",
        type=Path,
        metavar="FOLDER",
        help="keep the text states of prompts there: the next time the text encoders are not even loaded; "
        "delete the folder to free its space",
    )
    add("--crf", type=float, help=f"H.264 quality, 0 best to 51 worst (default {CRF:g})")
    _add_memory(add)
    add_hardware(add)
    add("--json", action="store_true", help="print one JSON object with every figure")
    _add_preview(add)
    return parser


def _add_memory(add: Callable[..., object]) -> None:
    add(
        "--memory",
        type=argument(_bytes),
        metavar="SIZE",
        help="memory for the weights, 8GiB for example: what does not fit together is read one after the "
        "other, and a GPU gets the transformer's blocks one by one (default: as much as they take); and for "
        "the tiles in which large clips are decoded (default 4GiB)",
    )


def _add_preview(add: Callable[..., object]) -> None:
    add(
        "--preview",
        choices=("auto", "off"),
        default="auto",
        help="while a clip is made, what it is going to be, in a terminal of 24-bit colours (default auto: "
        "where stderr is one)",
    )


def _add_settings(add: Callable[..., object]) -> None:
    """The settings of a clip, which a line of --prompts may have too."""
    add(
        "--seed",
        type=int,
        default=0,
        help="another seed, another clip (default 0); of --prompts each line gets a seed derived from this "
        "one and its prompt, or its own where it names one",
    )
    add("--steps", type=int, help="intervals of the time grid")
    add("--solver", choices=("euler", "midpoint", "heun", "sde"), help="how an interval is crossed")
    add("--diffusion", type=float, help="noise of --solver sde; 0 is euler without noise")
    add("--guidance", type=float, help="weight of the prompt or class; 1 is the plain model and the fastest")
    add_guidance(add)
    add_best_of(add)
    add("--negative", metavar="PROMPT", help="what to steer away from: a prompt, or a class")
    add("--frames", type=int, help="number of frames; 1 is an image; more than the release makes: in windows")
    add("--size", type=argument(parse_size), metavar="WIDTHxHEIGHT", help="pixels; one number for a square")
    add("--fps", type=argument(parse_rate), help="frames per second, such as 16 or 24000/1001")


def _add_given(add: Callable[..., object]) -> None:
    """What a clip is made from beside its prompt, of releases that take it."""
    add("--image", metavar="PICTURE", help="begin with this picture")
    add("--last", metavar="PICTURE", help="with --image: end with this one")
    add("--extend", metavar="CLIP", help="go on from this clip; the new one holds it as well")
    add("--seconds", type=float, help="with --extend: how much is added (default: half a clip)")
    add("--edit", metavar="CLIP", help="change this clip where --mask is white")
    add("--mask", metavar="PICTURE", help="with --edit: white is made anew, black stays")
    add(
        "--upsample",
        metavar="UPSAMPLER",
        nargs="?",
        const="upsampler",
        help="make the clip larger, with the release's own upsampler or, by its folder or hub id, another",
    )


def _add_lists(add: Callable[..., object]) -> None:
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one prompt or class a line, or .jsonl or .csv with settings named as these options are, or "
        "VBench's .json; - reads standard input; finished clips are skipped",
    )
    add(
        "--vbench",
        type=int,
        nargs="?",
        const=5,
        metavar="N",
        help="so many clips of each prompt of --prompts, 5 without a number, in files named as VBench wants",
    )
    add(
        "--batch",
        type=int,
        metavar="N",
        help="clips of --prompts at once, each equal to the one made alone (default: one a CPU core, 1 on a "
        "GPU); memory grows with it",
    )


def _bytes(text: str) -> int:
    from kinoflow.tae.tiles.memory import parse_bytes  # torch, which --help does without

    return parse_bytes(text)


def _sample(args: argparse.Namespace, team: Team | None) -> int:
    from kinoflow.sample.job import Sampler
    from kinoflow.sample.pipeline import Pipeline

    _refuse(args)
    pipeline = Pipeline.from_pretrained(
        args.weights,
        lora=args.lora,
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        memory=args.memory,
        text_cache=args.text_cache,
        rewrite=args.rewrite,
        team=team,
        upsample=args.upsample,
    )
    refuse_other_kind(pipeline.release, args.label, args.text_cache, listed=args.prompts is not None)
    with named_as_options(), one_line_warnings():
        jobs = _jobs(args, pipeline)
    _refuse_crf(args.crf, jobs)
    sampler = Sampler(
        pipeline, crf=CRF if args.crf is None else args.crf, quiet=args.json, preview=args.preview == "auto"
    )
    sampler.announce(jobs)
    with one_line_warnings():
        if args.prompts is None:
            clips, failed = [sampler.run(jobs[0])], []
        else:
            results = sampler.run_list(jobs, args.batch)
            clips, failed = results.clips, results.failed
    if args.json:
        made = any("skipped" not in clip for clip in clips)
        print_json({"clips": clips, "failed": failed} | ({"bytes": pipeline.bytes()} if made else {}))
    return 1 if failed else 0


def _refuse(args: argparse.Namespace) -> None:
    if sum(way is not None for way in (args.prompt, args.prompts, args.label)) != 1:
        raise UserError(f"give a PROMPT, --label CLASS or --prompts FILE, one of the three; {_DESCRIBE}")
    if args.prompt is not None and not args.prompt.strip():
        raise UserError(f"prompt: empty; {_DESCRIBE}")
    if args.batch is not None and args.prompts is None:
        raise UserError("batch: one prompt is one clip; use --batch with --prompts FILE")
    if args.vbench is not None and args.prompts is None:
        raise UserError("vbench: it is for lists; use it with --prompts VBench_full_info.json")
    if args.batch is not None and args.batch < 1:
        raise UserError(f"batch: {args.batch}; use 1 or more")


def _jobs(args: argparse.Namespace, pipeline: Pipeline) -> list[Job]:
    """What to make; a setting that the release does not have is refused before anything is made."""
    from kinoflow.sample.job import Job
    from kinoflow.sample.prompts import read_prompts
    from kinoflow.sample.vbench import samples

    if args.prompts is None:
        prompt, more = pipeline.reworded(args.prompt or args.label)
        return [Job(plan=pipeline.plan(_request(args, prompt)), out=args.out, more=more)]
    jobs, folder = [], folder_of_list(args.out)
    asked = read_prompts(args.prompts, _request(args, ""), classes=bool(pipeline.release.config.classes))
    named = ((place, request, None) for place, request in asked)
    for place, request, out in named if args.vbench is None else samples(asked, folder, args.vbench):
        try:
            prompt, more = pipeline.reworded(request.prompt)
            plan = pipeline.plan(replace(request, prompt=prompt))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        jobs.append(Job(plan=plan, folder=folder, out=out, skip_finished=True, more=more))
    return jobs


def _request(args: argparse.Namespace, prompt: str) -> ClipRequest:
    from kinoflow.sample.request import ClipRequest

    width, height = args.size or (None, None)
    return ClipRequest(
        prompt=prompt, negative=args.negative, seed=args.seed, frames=args.frames, width=width, height=height,
        fps=args.fps, steps=args.steps, guidance=args.guidance, guidance_kind=args.guidance_kind,
        guidance_interval=args.guidance_interval, guidance_rescale=args.guidance_rescale, cache=args.cache,
        best_of=args.best_of, solver=args.solver, diffusion=args.diffusion, image=args.image,
        last=args.last, extend=args.extend, seconds=args.seconds, edit=args.edit, mask=args.mask,
    )  # fmt: skip


def _refuse_crf(crf: float | None, jobs: list[Job]) -> None:
    from kinoflow.sample.output import is_lossless

    if crf is None:
        return
    if all(job.plan.bucket.frames == 1 if job.out is None else is_lossless(job.out) for job in jobs):
        remedy = "leave --crf out, or write a clip of one frame with --out NAME.mp4"
        raise UserError(f"crf: a picture (--frames 1) is a PNG, which loses nothing; {remedy}")


if __name__ == "__main__":
    sys.exit(main())
