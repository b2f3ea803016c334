"""The threads that make the clips, which are begun in the order in which they were asked for."""

import logging
import re
import sqlite3
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from kinoflow.configs.errors import UserError, one_line
from kinoflow.sample.request import ClipRequest
from kinoflow.sample.serve.jobs import Job, Jobs
from kinoflow.sample.serve.metrics import Metrics
from kinoflow.sample.serve.request import Maker

log = logging.getLogger(__name__)

_ATTEMPTS = 3
_PAUSE = 5.0  # seconds until a list that could not be written is tried again
# Clips, their pictures, and what was written aside when the process was killed.
_OURS = re.compile(r"\.?(video_[0-9a-f]{32})\b.*\.(?:mp4|png|jpg|webp)")


class StoppedError(Exception):
    """The server stops: what is being made is put back into the queue."""


class RemovedError(Exception):
    """The job that is being made was removed."""


@dataclass
class _Turn:
    """How a job in progress is doing."""

    share: float = 0.0
    removed: bool = False


class Worker:
    """Takes jobs until it is stopped, as many at a time as the maker can make.

    Args:
        folder: where the clips go.
        keep: the most finished jobs that are kept; the oldest go, with their clips and pictures.
    """

    def __init__(self, jobs: Jobs, maker: Maker, metrics: Metrics, *, folder: Path, keep: int) -> None:
        self._jobs, self._maker, self._metrics = jobs, maker, metrics
        self.folder, self._keep = folder, keep
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._turns: dict[str, _Turn] = {}  # by the id of the job
        self._woken = threading.Condition()
        self._wakes = 0
        self._threads = [
            threading.Thread(target=self._run, name=f"kinoflow-worker-{number}", daemon=True)
            for number in range(maker.at_once)
        ]
        self._tidy()

    def _tidy(self) -> None:
        """Remove what a killed process left behind."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {f"{id}.mp4" for id in self._jobs.completed()} | self._jobs.pictures()
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in kept:
                path.unlink(missing_ok=True)

    def _clear(self, id: str) -> None:
        """Remove the clip of a job and the pictures that it was to be made from."""
        for path in self.folder.glob(f"{id}.*"):
            path.unlink(missing_ok=True)

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self, seconds: float) -> bool:
        """Take no more jobs and put those in progress back; whether all ended within so many seconds."""
        self._stopping.set()
        self.wake()
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        with self._lock:
            ids = list(self._turns)
        for id in ids:
            self._jobs.put_back(id)
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def works(self) -> bool:
        """Whether the threads are there."""
        return all(thread.is_alive() for thread in self._threads)

    def wake(self) -> None:
        """There may be something to do."""
        with self._woken:
            self._wakes += 1
            self._woken.notify_all()

    def path(self, id: str) -> Path:
        """Where the clip of a job lies."""
        return self.folder / f"{id}.mp4"

    def picture(self, name: str) -> Path:
        """Where a picture lies of which a job holds the name: a folder may be moved between two starts."""
        return self.folder / name

    def share(self, id: str) -> float:
        """How much of a job in progress is done, 0 .. 1."""
        with self._lock:
            return self._turns[id].share if id in self._turns else 0.0

    def remove(self, id: str) -> bool:
        """Forget a job in any state, and its files; False where there is none of that id."""
        if not self._jobs.remove(id):
            return False
        with self._lock:
            if id in self._turns:
                self._turns[id].removed = True
        self._clear(id)
        return True

    def _run(self) -> None:
        while not self._stopping.is_set():
            with self._woken:
                wakes = self._wakes
            try:
                job = self._take()
                if job is not None:
                    self._turn(job)
                    continue
            except sqlite3.Error as error:
                log.error("the list of jobs cannot be written (%s); trying again", one_line(error))
                self._stopping.wait(_PAUSE)
                continue
            with self._woken:
                self._woken.wait_for(lambda seen=wakes: self._wakes != seen)

    def _take(self) -> Job | None:
        with self._lock:
            job = self._jobs.take(running=self._turns)
            if job is not None:
                self._turns[job.id] = _Turn()
        return job

    def _turn(self, job: Job) -> None:
        """Bring one job to its end."""
        try:
            self._brought_to_its_end(job)
        finally:
            for path in self.folder.glob(f".{job.id}*"):  # nothing half-written, whatever a maker leaves
                path.unlink(missing_ok=True)
            with self._lock:
                del self._turns[job.id]

    def _brought_to_its_end(self, job: Job) -> None:
        if job.attempts > _ATTEMPTS:
            self._end(
                job, f"the server ended {_ATTEMPTS} times while it made this clip; ask for a smaller one"
            )
            return
        self._metrics.started((job.started or job.created) - job.created)
        try:
            self._make(job)
        except StoppedError:
            self._jobs.put_back(job.id)
        except RemovedError:
            log.info("%s: removed", job.id)
        except UserError as error:
            line = " ".join(str(error).split())
            log.error("%s: %s", job.id, line)
            self._end(job, line.replace(f"{self.folder}/", ""))
        except sqlite3.Error:
            raise
        except Exception:
            log.exception("%s: failed", job.id)
            self._end(job, "the server failed at this clip; its log says why")

    def _make(self, job: Job) -> None:
        started, path = time.perf_counter(), self.path(job.id)
        self._progress(job.id, 0.0)  # it may have been removed since it was taken
        figures = self._maker.make(self._placed(job.request), path, partial(self._progress, job.id))
        seconds = time.perf_counter() - started
        if self._jobs.complete(job.id, {"seconds": round(seconds, 3)} | figures):
            self._metrics.completed(seconds)
            log.info("%s: made in %.1f s", job.id, seconds)
            self._forget_oldest()
        else:
            self._clear(job.id)

    def _placed(self, request: ClipRequest) -> ClipRequest:
        """The request with its pictures where they lie."""
        first, last = (name and str(self.picture(name)) for name in (request.image, request.last))
        return replace(request, image=first, last=last)

    def _progress(self, id: str, share: float) -> None:
        """Raise what ends the work: that comes out of the maker."""
        if self._stopping.is_set():
            raise StoppedError
        with self._lock:
            turn = self._turns[id]
            if turn.removed:
                raise RemovedError
            turn.share = share

    def _end(self, job: Job, error: str) -> None:
        if self._jobs.fail(job.id, error):
            self._metrics.failed()
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        for id in self._jobs.remove_oldest(keep=self._keep):
            self._clear(id)
