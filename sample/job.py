"""The clips of one call of `kinoflow sample`: names, bars, files, figures."""

from __future__ import annotations

import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinoflow.configs.errors import UserError
from kinoflow.configs.pretrained import fingerprint
from kinoflow.configs.terminal import progress_bar
from kinoflow.data.latents import stored
from kinoflow.sample.best import Take, UndecodedError, seed_of
from kinoflow.sample.cache import Passes
from kinoflow.sample.output import Output, file_metadata, finished, free_path, slug
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.plan import Plan
from kinoflow.sample.preview import Previews
from kinoflow.tae.model.pixels import Pixels
from kinoflow.tae.model.tae import TAE

if TYPE_CHECKING:
    import numpy as np
    from rich.progress import Progress, TaskID
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Job:
    """One clip to make; `out` is None where the name follows from the prompt and the seed."""

    plan: Plan
    folder: Path = Path()
    out: Path | None = None
    skip_finished: bool = False
    more: Mapping[str, str] = field(default_factory=dict)
    """Metadata beside the plan's: what was typed, where it was rewritten."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Figures of each clip that was made or found, and of each that failed."""

    clips: list[dict[str, Any]]
    failed: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A clip whose name is known; without an output it is there already, as `note` says."""

    job: Job
    output: Output | None
    note: str
    metadata: dict[str, str]


class UnknownWordsWarning(UserWarning):
    """A prompt has words that the release has never read, or cannot write."""


class Sampler:
    """Makes files with a pipeline.

    Args:
        crf: quality of mp4 files.
        quiet: stdout is for a program; a person reads stderr.
        preview: show on stderr what a clip is going to be, where a terminal can.
    """

    def __init__(self, pipeline: Pipeline, *, crf: float, quiet: bool, preview: bool = False) -> None:
        self._pipeline, self._crf = pipeline, crf
        self._previews = Previews(lambda: pipeline.decoder) if preview else None
        self._stream = sys.stderr if quiet else sys.stdout
        self._taken: set[Path] = set()

    def announce(self, jobs: Sequence[Job]) -> None:
        """Say how several processes share the clips."""
        team = self._pipeline.team
        for way in dict.fromkeys(self._pipeline.way(job.plan) for job in jobs):
            if team is not None:
                self._say(f"{team.size} processes: {way}")

    def run(self, job: Job) -> dict[str, Any]:
        """Make one clip, say where it is, and return its figures.

        Raises:
            UserError: it cannot be made or written.
        """
        with self._bar() as bar:
            return self._make(self._prepare(job), bar, "sampling")

    def run_list(self, jobs: Sequence[Job], at_once: int | None) -> Results:
        """Every job, so many at a time, whatever happens to one; what failed is listed at the end."""
        failed: dict[int, dict[str, Any]] = {}
        clips: dict[int, dict[str, Any]] = {}
        todo: list[tuple[int, _Prepared]] = []

        def fail(number: int, job: Job, error: UserError) -> None:
            failed[number] = {"prompt": job.plan.prompt, "seed": job.plan.seed, "error": str(error)}

        for number, job in enumerate(jobs):  # in their order: so names do not depend on which is done first
            try:
                ready = self._prepare(job)
            except UserError as error:
                fail(number, job, error)
                continue
            if ready.output is None:
                clips[number] = self._skipped(ready)
            else:
                todo.append((number, ready))
        with self._bar() as bar:

            def make(item: tuple[int, _Prepared]) -> None:
                number, ready = item
                try:
                    clips[number] = self._make(ready, bar, f"{number + 1}/{len(jobs)}")
                except UserError as error:
                    fail(number, ready.job, error)

            for _ in self._pipeline.at_once(make, todo, at_once):
                pass
        for _, failure in sorted(failed.items()):
            print(f"failed: {failure['prompt'][:60]!r}: {failure['error']}", file=sys.stderr)
        return Results(
            clips=[clips[number] for number in sorted(clips)],
            failed=[failed[number] for number in sorted(failed)],
        )

    def _prepare(self, job: Job) -> _Prepared:
        """Where the clip goes, and a line on stderr about words that mean nothing to the release."""
        bucket, note = job.plan.bucket, ""
        suffix = ".png" if bucket.frames == 1 else ".mp4"
        name = f"{slug(job.more.get('typed', job.plan.prompt))}-{job.plan.seed}{suffix}"
        path = job.folder / name if job.out is None else job.out
        metadata = file_metadata(path, {**self._pipeline.metadata(job.plan), **job.more}, self._crf)
        if job.out is None:
            named, path = path, free_path(path, self._taken)
            if job.skip_finished:
                for taken in named.parent.glob(f"{named.stem}*{suffix}"):
                    if finished(taken, metadata):
                        return _Prepared(job=job, output=None, note=str(taken), metadata=metadata)
            if path != named:
                note = f"  ({named} was there already)"
        elif job.skip_finished and finished(path, metadata):
            return _Prepared(job=job, output=None, note=str(path), metadata=metadata)
        elif path.exists():
            note = "  (replaced)"
        height, width = job.plan.size
        size = {"frames": job.plan.frames, "height": height, "width": width, "fps": bucket.fps}
        output = Output(path, **size, crf=self._crf, metadata=metadata)
        self._taken.add(path)
        self._advise(job.plan)
        return _Prepared(job=job, output=output, note=note, metadata=metadata)

    def _advise(self, plan: Plan) -> None:
        known = self._pipeline.release.vocabulary
        for text in (plan.prompt, plan.negative or ""):
            advice = None if known is None else known.advice(text)
            if advice is not None:
                warnings.warn(advice, UnknownWordsWarning, stacklevel=2)

    def _skipped(self, ready: _Prepared) -> dict[str, Any]:
        self._say(f"{ready.note} (finished before, skipped)")
        plan = ready.job.plan
        words = self._pipeline.unknown_words(plan)
        found = {"path": ready.note, "prompt": plan.prompt, "seed": plan.seed, "skipped": True}
        return found | {"unknown_words": words}

    def _make(self, ready: _Prepared, bar: Progress, label: str) -> dict[str, Any]:
        assert ready.output is not None
        plan, output, started = ready.job.plan, ready.output, time.perf_counter()
        self._pipeline.load()  # when the first clip is to be made
        clock = _Clock(load=time.perf_counter() - started)
        task, passes = bar.add_task(label, total=plan.num_steps), Passes()
        try:
            with clock.part("text"):
                conditions = self._pipeline.conditions(plan)
            seen = self._seen(bar, task, plan)
            with clock.part("flow"):
                take = self._pipeline.flow(
                    plan, conditions, lambda count: bar.advance(task, count), passes, seen
                )
            output.write(clock.each("decode", self._frames(plan, take, bar, task)))
        except UndecodedError as error:
            raise self._undecoded(plan, error.latent, output, error) from error
        finally:
            bar.remove_task(task)
            if self._previews is not None:
                self._previews.drop(task)
        seconds = time.perf_counter() - started
        self._say(f"{output.path}{ready.note}  {seconds:.1f} s", bar)
        figures = {"seed": plan.seed, "kept_seed": seed_of(plan.seed, take.number)}
        figures |= {"seconds": round(seconds, 3), "parts": clock.figures(seconds)}
        words = {"passes": asdict(passes), "unknown_words": self._pipeline.unknown_words(plan)}
        return {"path": str(output.path)} | ready.metadata | figures | words

    def _bar(self) -> Progress:
        return progress_bar() if self._previews is None else progress_bar(below=self._previews)

    def _seen(self, bar: Progress, task: TaskID, plan: Plan) -> Callable[[Tensor], None] | None:
        if self._previews is None:
            return None
        return self._previews.watch(task, plan.sampling.num_evaluations, bar.refresh)

    def _frames(self, plan: Plan, take: Take, bar: Progress, task: TaskID) -> Iterator[np.ndarray]:
        """The frames, piece by piece. Where decoding fails, the error has the latent: it took longest."""
        try:
            yield from self._pipeline.decode(plan, take, lambda count: bar.advance(task, count))
        except (RuntimeError, MemoryError, UserError) as error:
            if isinstance(self._pipeline.decoder, Pixels):  # there is nothing to decode later with
                raise
            raise UndecodedError(take.latent, error) from error

    def _undecoded(self, plan: Plan, latent: Tensor, output: Output, error: Exception) -> UserError:
        """What to say where decoding fails; the latent is kept, if something can decode it later."""
        decoder, folder = self._pipeline.decoder, self._pipeline.release.tae_folder
        again = "give more --memory"
        # What decodes a file knows no frames with a latent each, and no upsampler.
        if isinstance(decoder, TAE) and folder is not None and not plan.stills and plan.larger is None:
            kept = self._kept(latent, output, decoder, str(folder))
            again = f"its latent is kept, run: {shlex.join(kept)}"
        return UserError(f"{output.path}: decoding failed ({error}); {again}")

    def _kept(self, latent: Tensor, output: Output, tae: TAE, weights: str) -> list[str]:
        """Write the latent to a file; the command that decodes it."""
        mean = stored(tae.denormalize(latent)[0].transpose(0, 1), weights)
        file = output.save_latent(mean, tae=weights, tae_sha256=fingerprint(tae.state_dict()))
        clip = output.path.with_suffix(".mp4")
        how = ["--weights", weights, "--crf", str(self._crf)]
        return ["kinoflow", "tae", "decode", str(file), str(clip), *how]

    def _say(self, line: str, bar: Progress | None = None) -> None:
        if bar is not None and bar.console.is_terminal and self._stream.isatty():
            bar.console.out(line, highlight=False)  # above what is going to be wiped off the terminal
        else:
            print(line, file=self._stream)


class _Clock:
    """Seconds of the parts of one clip."""

    def __init__(self, *, load: float) -> None:
        self._seconds = {"load": load}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def each(self, name: str, pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The same pieces; making them is the part."""
        while True:
            with self.part(name):
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece
            del piece  # not held while the next one is made

    def figures(self, total: float) -> dict[str, float]:
        """Rounded; "write" is what is left: the file, and what lies between the parts."""
        parts = self._seconds | {"write": total - sum(self._seconds.values())}
        return {name: round(seconds, 4) for name, seconds in parts.items()}
