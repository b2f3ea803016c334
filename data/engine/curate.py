"""`kinoflow data curate`: from videos to a table of scored shots, in pieces of work that are done once.

In OUT: `frames/` has the signals of each piece of each video, `scores/` the scored shots of each video, and
`parts.json` names those that belong to the source. What is there already is not made again, so that the same
command goes on where it was stopped; two at once do some work twice and leave the same.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import write_json
from kinoflow.configs.schema import dump
from kinoflow.data.clips.remote import GONE, Url, local, place
from kinoflow.data.engine import kept, sources
from kinoflow.data.engine.config import CurateConfig, digest
from kinoflow.data.engine.pools import Call, Done, Pool
from kinoflow.data.engine.scan import scan_to, spans
from kinoflow.data.engine.score import score_to
from kinoflow.data.engine.sources import Source

PARTS = "parts.json"
FORMAT = 2  # of the tables; those of another one are made again
Shown = Callable[
    [Iterable[Done], str, int], Iterable[Done]
]  # shows how far it is: what comes, title, how much


@dataclass(frozen=True)
class Job:
    """One video and where what is known of it lies."""

    source: Source
    out: Path
    config: CurateConfig

    @cached_property
    def stamp(self) -> str:
        """Another text when the file has changed."""
        return self.source.stamp()

    @cached_property
    def folder(self) -> Path:
        """Of the signals of its pieces."""
        key = digest([FORMAT, self.stamp, self.config.fingerprint("scan")])
        return self.out / "frames" / f"{self.source.name}-{key}"

    @cached_property
    def scores(self) -> Path:
        """The part with its scored shots."""
        told = [FORMAT, self.stamp, self.source.caption, self.config.fingerprint("scan", "shots")]
        return self.out / "scores" / f"{self.source.name}-{digest(told)}.parquet"

    @property
    def facts(self) -> dict[str, Any] | None:
        """What the probe said: `fault` where it failed; None before."""
        return _json(self.folder / "facts.json")

    def spans(self) -> list[range]:
        """The pieces in which it is looked at; what lies at a URL is fetched whole, so it is one piece."""
        facts = self.facts or {}
        if "fault" in facts:
            return []
        whole = isinstance(self.source.place, Url)
        seconds = 1e12 if whole else self.config.scan.range_seconds
        return spans(int(facts["frames"]), Fraction(facts["fps"]), seconds)

    def part(self, span: range) -> Path:
        """Where the signals of a piece lie."""
        return self.folder / f"{span.start:09d}.parquet"

    def failure(self, span: range) -> Path:
        """Where it is said that a piece could not be looked at at all."""
        return self.folder / f"{span.start:09d}.failed.json"

    def found(self, span: range) -> Path | str | None:
        """The part of a piece, or why there is none; None when nobody looked."""
        if self.part(span).exists():
            return self.part(span)
        failed = _json(self.failure(span))
        return None if failed is None else str(failed["fault"])

    @property
    def is_there(self) -> bool:
        """Whether the video can be reached now."""
        return self.stamp != GONE

    def forget_failures(self) -> None:
        """Let what failed be tried again."""
        failed = [*self.folder.glob("*.failed.json")]
        if "fault" in (self.facts or {}):
            failed.append(self.folder / "facts.json")
        for path in [*failed, self.scores] if failed else []:
            path.unlink(missing_ok=True)


def curate(
    found: Sequence[Source], out: Path, config: CurateConfig, *, pool: Pool, show: Shown, retry: bool = False
) -> None:
    """Score every shot of every video that is not yet scored, and name the parts of all.

    Raises:
        UserError: OUT cannot be written, or no part of it can be read.
    """
    jobs = [Job(source, out, config) for source in found]
    if retry:
        for job in jobs:
            job.forget_failures()
    todo = [job for job in jobs if not job.scores.exists()]
    _each(pool, show, "probing", _probes(todo), len(todo))
    waiting = [(job, span) for job in todo for span in job.spans() if job.found(span) is None]
    _each(pool, show, "looking", _scans(waiting), len(waiting))
    _each(pool, show, "scoring", _scores(todo), len(todo))
    for job in todo:
        if job.is_there:
            _tidy(job)
    dump(config, out / "config.yaml")
    write_json(out / PARTS, [job.scores.name for job in jobs])


def probe(path: str) -> dict[str, Any]:
    """What the probe says of what lies at a path or URL.

    Raises:
        UserError: it cannot be read at all.
    """
    with local(place(path)) as file:
        return sources.probe(file)


def _probes(jobs: Iterable[Job]) -> Iterator[Call]:
    for job in jobs:
        if job.facts is None:
            yield Call(key=(job.folder / "facts.json", None), function=probe, arguments=(job.source.path,))


def _scans(waiting: Iterable[tuple[Job, range]]) -> Iterator[Call]:
    for job, span in waiting:
        arguments = (job.source.path, span, job.part(span), job.config.scan)
        yield Call(key=(None, job.failure(span)), function=scan_to, arguments=arguments)


def _scores(jobs: Iterable[Job]) -> Iterator[Call]:
    for job in jobs:
        parts = [(span, job.found(span)) for span in job.spans()]
        arguments = (job.scores, job.source, job.facts, parts, job.config.shots)
        yield Call(key=(None, None), function=score_to, arguments=arguments)


def _each(pool: Pool, show: Shown, title: str, calls: Iterable[Call], total: int) -> None:
    """Make the calls; a key says where a result is written, and where a fault is."""
    for (result, fault), given in show(pool.run(calls), title, total):
        if not isinstance(given, UserError):
            if result is not None:
                write_json(result, given)
            continue
        target = fault or result
        if target is None:
            raise given
        write_json(target, {"fault": str(given)})


def _tidy(job: Job) -> None:
    """Remove what is known of the video as it was before, or by another configuration."""
    kept.forget(job.out, job.source, job.stamp)
    for path in job.scores.parent.glob(f"{job.source.name}-*.parquet"):
        if path != job.scores:
            path.unlink(missing_ok=True)
    for path in job.folder.parent.glob(f"{job.source.name}-*"):
        if path != job.folder:
            shutil.rmtree(path, ignore_errors=True)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
