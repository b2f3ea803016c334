"""`kinoflow sample "PROMPT"` (or `--label CLASS`) writes a clip; `evaluate` measures, `serve` serves."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinoflow.configs.errors import UserError, one_line, run
from kinoflow.configs.terminal import argument, one_line_warnings, parse_rate, print_json, progress_bar
from kinoflow.sample.options import (
    add_hardware,
    add_lora,
    folder_of_list,
    is_picture,
    named_as_options,
    refuse_other_kind,
    refuse_without_effect,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from kinoflow.data.clips.buckets import Bucket
    from kinoflow.dit_video.backbone import Backbone
    from kinoflow.sample.generate import Encoder, Sampling
    from kinoflow.sample.output import Output
    from kinoflow.sample.release import Release
    from kinoflow.tae.model.pixels import Pixels
    from kinoflow.tae.model.tae import TAE

_CRF = 18.0
_DESCRIBE = 'describe the clip, for example "a red star moves left on a gray background"'


@dataclass(frozen=True, kw_only=True)
class Request:
    """One clip to make; `out` is None where the name follows from the prompt and the seed.

    Of a release of classes the prompt is the name of one.
    """

    prompt: str
    seed: int
    folder: Path = Path()
    out: Path | None = None
    skip_finished: bool = False


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, 1 if prompts of a list failed, 2 after a user's mistake."""
    return run(lambda: _command(sys.argv[1:] if argv is None else argv), "kinoflow sample")


def _command(argv: list[str]) -> int:
    if argv[:1] == ["evaluate"]:
        from kinoflow.sample.evaluation.world import main as evaluate

        return evaluate(argv[1:])
    if argv[:1] == ["serve"]:
        from kinoflow.sample.serve.command import main as serve

        return serve(argv[1:])
    return _sample(_parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kinoflow sample",
        description="Write a clip for a prompt or class. To measure a release: kinoflow sample evaluate "
        "--help; to serve one: kinoflow sample serve --help.",
    )
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="what the clip shows; quoted words are written in it")
    add("--label", metavar="CLASS", help="name or number of a class, for a release that has classes")
    add(
        "--out",
        type=Path,
        help="file (.mp4; .png for one frame) or, with --prompts, folder; default: named after it",
    )
    add("--seed", type=int, default=0, help="another seed, another clip (default 0)")
    add("--steps", type=int, help="intervals of the time grid")
    add("--solver", choices=("euler", "midpoint", "heun", "sde"), help="how an interval is crossed")
    add("--diffusion", type=float, help="noise of --solver sde; 0 is euler without noise")
    add("--guidance", type=float, help="weight of the prompt or class; 1 is the plain model and the fastest")
    add("--negative", metavar="PROMPT", help="what to steer away from: a prompt, or a class")
    add("--frames", type=int, help="number of frames; 1 is an image")
    add("--size", type=_size, metavar="WIDTHxHEIGHT", help="pixels; one number for a square")
    add("--fps", type=argument(parse_rate), help="frames per second, such as 16 or 24000/1001")
    add(
        "--weights",
        metavar="RELEASE",
        help="release folder or hub id, or Stable Diffusion 3's or 3.5's in diffusers' layout (default: the "
        "shipped mini release)",
    )
    add_lora(add)
    add("--prompts", type=Path, metavar="FILE", help="one prompt a line; finished ones are skipped")
    add(
        "--text-cache",
        type=Path,
        metavar="FOLDER",
        help="keep the text states of prompts there: the next time the text encoders are not even loaded; "
        "delete the folder to free its space",
    )
    add("--crf", type=float, help=f"H.264 quality, 0 best to 51 worst (default {_CRF:g})")
    add(
        "--memory",
        type=argument(_bytes),
        metavar="SIZE",
        help="memory for the tiles in which large clips are decoded, 8GiB for example (default 4GiB)",
    )
    add_hardware(add)
    add("--json", action="store_true", help="print one JSON object with every figure")
    return parser


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WIDTHxHEIGHT, for example 64x64")
    return int(parts[0]), int(parts[-1])


def _bytes(text: str) -> int:
    from kinoflow.tae.tiles.memory import parse_bytes  # torch, which --help does without

    return parse_bytes(text)


def _sample(args: argparse.Namespace) -> int:
    from kinoflow.conditioning.labels import LabelEncoder
    from kinoflow.configs.devices import parse_device, parse_dtype
    from kinoflow.sample.generate import check_negative
    from kinoflow.sample.stable_diffusion import open_release

    jobs = _jobs(args)
    release = open_release(args.weights, args.lora, parse_dtype(args.dtype, parse_device(args.device)))
    refuse_other_kind(release, args.label, args.text_cache)
    if release.config.classes:
        jobs = [replace(job, prompt=LabelEncoder(release.config.classes).name(job.prompt)) for job in jobs]
    width, height = args.size or (None, None)
    bucket = release.bucket(frames=args.frames, height=height, width=width, fps=args.fps)
    with named_as_options():
        sampling = release.sampling(
            num_steps=args.steps, guidance_scale=args.guidance, solver=args.solver, diffusion=args.diffusion
        )
        check_negative(args.negative, sampling.guidance_scale)
    picture = is_picture(bucket.frames, args.out if args.prompts is None else None)
    refuse_without_effect(diffusion=args.diffusion, crf=args.crf, solver=sampling.solver, picture=picture)
    with one_line_warnings():
        sampler = Sampler(release, bucket, sampling, args)
        if args.prompts is None:
            results = [sampler.run(jobs[0])]
            failures = []
        else:
            results, failures = _run_list(sampler, jobs)
    if args.json:
        print_json({"clips": results, "failed": failures})
    return 1 if failures else 0


def _jobs(args: argparse.Namespace) -> list[Request]:
    if sum(way is not None for way in (args.prompt, args.prompts, args.label)) != 1:
        raise UserError(f"give a PROMPT, --label CLASS or --prompts FILE, one of the three; {_DESCRIBE}")
    if args.threads < 1:
        raise UserError(f"threads: {args.threads}; use 1 or more")
    if args.label is not None:
        return [Request(prompt=args.label, seed=args.seed, out=args.out)]
    if args.prompts is None:
        if not args.prompt.strip():
            raise UserError(f"prompt: empty; {_DESCRIBE}")
        return [Request(prompt=args.prompt, seed=args.seed, out=args.out)]
    from kinoflow.sample.output import derived_seed

    try:
        lines = [line.strip() for line in args.prompts.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{args.prompts}: {reason}; give a text file with one prompt a line") from None
    if not any(lines):
        raise UserError(f"{args.prompts}: no prompt in it; write one a line")
    jobs, seen, folder = [], Counter(), folder_of_list(args.out)
    for line in filter(None, lines):
        seed = derived_seed(args.seed, line, repeat=seen[line])
        jobs.append(Request(prompt=line, seed=seed, folder=folder, skip_finished=True))
        seen[line] += 1
    return jobs


def _run_list(sampler: Sampler, jobs: list[Request]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every job, whatever happens to one; what failed is listed at the end."""
    results, failures = [], []
    for number, job in enumerate(jobs, 1):
        try:
            results.append(sampler.run(job, label=f"{number}/{len(jobs)}"))
        except UserError as error:
            failures.append({"prompt": job.prompt, "seed": job.seed, "error": str(error)})
    for failure in failures:
        print(f"failed: {failure['prompt'][:60]!r}: {failure['error']}", file=sys.stderr)
    return results, failures


class UnknownWordsWarning(UserWarning):
    """A prompt has words that the release has never read, or cannot write."""


class Sampler:
    """A release with its models in memory, and the settings that all jobs share."""

    def __init__(
        self, release: Release, bucket: Bucket, sampling: Sampling, args: argparse.Namespace
    ) -> None:
        from kinoflow.configs.devices import parse_device, parse_dtype
        from kinoflow.tae.tiles.tiled import DEFAULT_MEMORY

        self.device = parse_device(args.device)
        self.dtype = parse_dtype(args.dtype, self.device)
        self.release, self.bucket, self.sampling, self.args = release, bucket, sampling, args
        self.crf = _CRF if args.crf is None else args.crf
        self.memory = args.memory or DEFAULT_MEMORY

    def run(self, job: Request, label: str = "sampling") -> dict[str, Any]:
        """Make one clip, say where it is, and return its figures."""
        started = time.perf_counter()
        metadata, words = self._metadata(job), {"unknown_words": self._unknown_words(job)}
        output, note = self._output(job, metadata)
        if output is None:
            self._say(f"{note} (finished before, skipped)")
            return {"path": note, "prompt": job.prompt, "seed": job.seed, "skipped": True} | words
        self._advise(job)
        output.write(self._frames(self._latent(job, label), output))
        seconds = time.perf_counter() - started
        self._say(f"{output.path}{note}  {seconds:.1f} s")
        figures = {"seed": job.seed, "seconds": round(seconds, 3)}
        return {"path": str(output.path)} | metadata | figures | words

    def _unknown_words(self, job: Request) -> list[str]:
        known = self.release.vocabulary
        return [] if known is None else known.unknown(f"{job.prompt} {self.args.negative or ''}")

    def _advise(self, job: Request) -> None:
        """A line on stderr about words that mean nothing to the release."""
        known = self.release.vocabulary
        for text in (job.prompt, self.args.negative or ""):
            advice = None if known is None else known.advice(text)
            if advice is not None:
                warnings.warn(advice, UnknownWordsWarning, stacklevel=2)

    @cached_property
    def _models(self) -> tuple[Backbone, TAE | Pixels, Encoder]:
        """Read when the first clip is to be made."""
        import torch

        torch.set_num_threads(self.args.threads)
        device, release = self.device, self.release
        encoder = release.encoder(self.args.text_cache, device)
        return release.backbone(device, self.dtype), release.decoder(device), encoder

    def _latent(self, job: Request, label: str) -> Tensor:
        """The normalized latent of the clip."""
        from kinoflow.sample.generate import null_condition, sample_latent

        backbone, tae, encoder = self._models
        b = self.bucket
        shape = tae.config.latent_shape(b.frames, b.height, b.width)
        told, null = encoder([job.prompt], b.fps), null_condition(encoder, self.args.negative, b.fps)
        with progress_bar() as bar:
            task = bar.add_task(label, total=self.sampling.num_evaluations)
            return sample_latent(
                backbone, told, null, shape,
                seed=job.seed, sampling=self.sampling, progress=lambda: bar.advance(task),
            )  # fmt: skip

    def _frames(self, latent: Tensor, output: Output) -> Iterator[np.ndarray]:
        """The frames, piece by piece. Where decoding fails, the latent is kept: it took longest."""
        from kinoflow.sample.generate import decode_pieces
        from kinoflow.tae.model.pixels import Pixels

        decoder = self._models[1]
        try:
            for piece in decode_pieces(decoder, latent, self.bucket.frames, self.memory):
                yield piece[0].numpy()
        except (RuntimeError, MemoryError, UserError) as error:
            if isinstance(decoder, Pixels):  # there is nothing to decode later with
                raise
            kept = None if self.release.tae_folder is None else self._kept(latent, output, decoder)
            again = "give more --memory" if kept is None else f"its latent is kept, run: {shlex.join(kept)}"
            raise UserError(f"{output.path}: decoding failed ({one_line(error)}); {again}") from error

    def _kept(self, latent: Tensor, output: Output, tae: TAE) -> list[str]:
        """Write the latent to a file; the command that decodes it."""
        from kinoflow.configs.pretrained import fingerprint
        from kinoflow.data.latents import stored

        weights = str(self.release.tae_folder)
        mean = stored(tae.denormalize(latent)[0].transpose(0, 1), weights)
        file = output.save_latent(mean, tae=weights, tae_sha256=fingerprint(tae.state_dict()))
        clip = output.path.with_suffix(".mp4")
        how = ["--weights", weights, "--crf", str(self.crf)]
        return ["kinoflow", "tae", "decode", str(file), str(clip), *how]

    def _output(self, job: Request, metadata: dict[str, str]) -> tuple[Output | None, str]:
        """Where the clip goes and a note about it; no output when it is there already."""
        from kinoflow.sample.output import Output, finished, free_path, slug

        b, note = self.bucket, ""
        path = job.out
        if path is None:
            suffix = ".png" if b.frames == 1 else ".mp4"
            named = job.folder / f"{slug(job.prompt)}-{job.seed}{suffix}"
            path = free_path(named)
            if job.skip_finished:
                for taken in named.parent.glob(f"{named.stem}*{suffix}"):
                    if finished(taken, metadata):
                        return None, str(taken)
            if path != named:
                note = f"  ({named} was there already)"
        elif path.exists():
            note = "  (replaced)"
        size = {"frames": b.frames, "height": b.height, "width": b.width, "fps": b.fps}
        return Output(path, **size, crf=self.crf, metadata=metadata), note

    def _metadata(self, job: Request) -> dict[str, str]:
        """All that decides the file's bytes on a machine of one kind: what makes the clip again."""
        from kinoflow.configs.devices import name_of
        from kinoflow.sample.output import installed

        sde, score = self.sampling.solver == "sde", self.sampling.objective == "score"
        classes = self.release.config.classes
        values = {
            "label" if classes else "prompt": job.prompt,
            "negative": self.args.negative,
            "seed": job.seed,
            "steps": self.sampling.num_steps,
            "guidance": self.sampling.guidance_scale,
            "schedule": self.sampling.schedule,
            "shift": self.sampling.shift if self.sampling.is_shifted else None,
            "solver": self.sampling.solver,
            "diffusion": self.sampling.diffusion if sde else None,
            "path": self.sampling.path if sde or score else None,
            "objective": self.sampling.objective if score else None,
            "clip": self.bucket,
            "release": self.release.name,
            "weights": self.release.weights_hash,
            "lora": " ".join(self.args.lora) or None,
            "text_dtype": None if classes else self.release.config.text.dtype,
            "crf": None if is_picture(self.bucket.frames, job.out) else self.crf,
            "device": self.device.type,
            "dtype": name_of(self.dtype),
            "threads": self.args.threads,
            "memory": self.memory,
            "kinoflow": installed("kinoflow"),
            "torch": installed("torch"),
        }
        return {key: str(value) for key, value in values.items() if value is not None}

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr if self.args.json else sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
