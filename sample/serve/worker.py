"""The thread that makes the clips, one after the other, in the order in which they were asked for."""

import logging
import re
import sqlite3
import threading
import time
from pathlib import Path

from kinoflow.configs.errors import UserError, one_line
from kinoflow.sample.serve.jobs import Job, Jobs
from kinoflow.sample.serve.metrics import Metrics
from kinoflow.sample.serve.request import Maker

log = logging.getLogger(__name__)

_ATTEMPTS = 3
_PAUSE = 5.0  # seconds until a list that could not be written is tried again
# Clips, and what was written aside when the process was killed.
_OURS = re.compile(r"\.?(video_[0-9a-f]{32})\b.*\.mp4")


class StoppedError(Exception):
    """The server stops: what is being made is put back into the queue."""


class RemovedError(Exception):
    """The job that is being made was removed."""


class Worker:
    """Takes jobs until it is stopped.

    Args:
        folder: where the clips go.
        keep: the most finished jobs that are kept; the oldest go, with their clips.
    """

    def __init__(self, jobs: Jobs, maker: Maker, metrics: Metrics, *, folder: Path, keep: int) -> None:
        self._jobs, self._maker, self._metrics = jobs, maker, metrics
        self._folder, self._keep = folder, keep
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._id: str | None = None  # of the job that is being made
        self._share, self._removed = 0.0, False
        self._thread = threading.Thread(target=self._run, name="kinoflow-worker", daemon=True)
        self._tidy()

    def _tidy(self) -> None:
        """Remove what a killed process left behind."""
        self._folder.mkdir(parents=True, exist_ok=True)
        kept = {f"{id}.mp4" for id in self._jobs.completed()}
        for path in self._folder.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in kept:
                path.unlink(missing_ok=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """Take no more jobs and put the running one back; whether the thread ended within so many seconds."""
        self._stopping.set()
        self._wake.set()
        self._thread.join(seconds)
        with self._lock:
            id = self._id
        if id is not None:
            self._jobs.put_back(id)
        return not self._thread.is_alive()

    @property
    def works(self) -> bool:
        """Whether the thread is there."""
        return self._thread.is_alive()

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def path(self, id: str) -> Path:
        """Where the clip of a job lies."""
        return self._folder / f"{id}.mp4"

    def share(self, id: str) -> float:
        """How much of a job in progress is done, 0 .. 1."""
        with self._lock:
            return self._share if self._id == id else 0.0

    def remove(self, id: str) -> bool:
        """Forget a job in any state, and its clip; False where there is none of that id."""
        if not self._jobs.remove(id):
            return False
        with self._lock:
            self._removed |= self._id == id
        self.path(id).unlink(missing_ok=True)
        return True

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                job = self._jobs.take()
                if job is not None:
                    self._turn(job)
                    continue
            except sqlite3.Error as error:
                log.error("the list of jobs cannot be written (%s); trying again", one_line(error))
                self._stopping.wait(_PAUSE)
                continue
            self._wake.wait()
            self._wake.clear()

    def _turn(self, job: Job) -> None:
        """Bring one job to its end."""
        if job.attempts > _ATTEMPTS:
            self._end(
                job, f"the server ended {_ATTEMPTS} times while it made this clip; ask for a smaller one"
            )
            return
        with self._lock:
            self._id, self._share, self._removed = job.id, 0.0, False
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
            self._end(job, line.replace(f"{self._folder}/", ""))
        except sqlite3.Error:
            raise
        except Exception:
            log.exception("%s: failed", job.id)
            self._end(job, "the server failed at this clip; its log says why")
        finally:
            with self._lock:
                self._id = None
            for path in self._folder.glob(f".{job.id}*"):  # nothing half-written, whatever a maker leaves
                path.unlink(missing_ok=True)

    def _make(self, job: Job) -> None:
        started, path = time.perf_counter(), self.path(job.id)
        self._progress(0.0)  # it may have been removed since it was taken
        figures = self._maker.make(job.request, path, self._progress)
        seconds = time.perf_counter() - started
        if self._jobs.complete(job.id, {"seconds": round(seconds, 3)} | figures):
            self._metrics.completed(seconds)
            log.info("%s: made in %.1f s", job.id, seconds)
            self._forget_oldest()
        else:
            path.unlink(missing_ok=True)

    def _progress(self, share: float) -> None:
        """Raise what ends the work: that comes out of the maker."""
        if self._stopping.is_set():
            raise StoppedError
        with self._lock:
            if self._removed:
                raise RemovedError
            self._share = share

    def _end(self, job: Job, error: str) -> None:
        if self._jobs.fail(job.id, error):
            self._metrics.failed()
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        for id in self._jobs.remove_oldest(keep=self._keep):
            self.path(id).unlink(missing_ok=True)
