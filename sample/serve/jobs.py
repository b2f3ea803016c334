"""The jobs of a server, in an SQLite file that outlives it."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from kinoflow.configs.errors import UserError
from kinoflow.sample.request import ClipRequest

Status = Literal["queued", "in_progress", "completed", "failed"]
STATUSES: tuple[Status, ...] = get_args(Status)
_VERSION = 1
_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    request TEXT NOT NULL,
    created REAL NOT NULL,
    started REAL,
    ended REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    error TEXT,
    figures TEXT
);
CREATE INDEX IF NOT EXISTS jobs_status ON jobs (status, number);
"""
_COLUMNS = "id, status, request, created, started, ended, attempts, error, figures"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One clip's way through the server; times are in seconds since 1970."""

    id: str
    status: Status
    request: ClipRequest
    created: float
    started: float | None = None
    ended: float | None = None
    attempts: int = 0
    """How often it was begun, without those times that the server stopped in good order."""
    error: str | None = None
    """Why it failed, in one line for the client."""
    figures: dict[str, Any] | None = None
    """What the maker measured."""

    @classmethod
    def of(cls, row: tuple[Any, ...]) -> Job:
        """The job of a row of `_COLUMNS`."""
        values = dict(zip(cls.__dataclass_fields__, row, strict=True))
        values["request"] = ClipRequest.loads(values["request"])
        values["figures"] = values["figures"] and json.loads(values["figures"])
        return cls(**values)


class Jobs:
    """The jobs in a file, for the threads of one process; another process that opens it is refused.

    Raises:
        UserError: the file cannot be opened, is another version's, or belongs to a server that runs.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent}: {error.strerror}; use another --folder") from None
        try:
            self._database = sqlite3.connect(path, timeout=0, check_same_thread=False, isolation_level=None)
            self._open(path)
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                line = f"{path.parent}: another server works there; stop it, or use another --folder"
            else:
                line = f"{path}: {error}; check the folder's rights and the disk, or use another --folder"
            raise UserError(line) from None
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path}: no list of jobs ({error}); use another --folder") from None

    def _open(self, path: Path) -> None:
        execute = self._database.execute
        execute("PRAGMA locking_mode = EXCLUSIVE")  # the system lets go of it however the process ends
        execute("PRAGMA journal_mode = WAL")
        (version,) = execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise UserError(f"{path}: jobs of version {version}, not {_VERSION}; use another --folder")
        self._database.executescript(f"BEGIN IMMEDIATE; {_TABLE} PRAGMA user_version = {_VERSION}; COMMIT;")
        # Nobody else has the file: what was begun was cut off.
        execute("UPDATE jobs SET status = 'queued' WHERE status = 'in_progress'")

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._database.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    def _read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._database.execute(query, values).fetchall()

    def add(self, id: str, request: ClipRequest, *, most: int) -> Job | None:
        """Queue a request; None where `most` of them wait already."""
        with self._transaction() as database:
            (waiting,) = database.execute("SELECT count(*) FROM jobs WHERE status = 'queued'").fetchone()
            if waiting >= most:
                return None
            job = Job(id=id, status="queued", request=request, created=time.time())
            database.execute(
                "INSERT INTO jobs (id, status, request, created) VALUES (?, 'queued', ?, ?)",
                (id, request.dumps(), job.created),
            )
        return job

    def get(self, id: str) -> Job | None:
        """The job of that id."""
        rows = self._read(f"SELECT {_COLUMNS} FROM jobs WHERE id = ?", id)
        return Job.of(rows[0]) if rows else None

    def page(self, *, limit: int, after: str | None = None, oldest_first: bool = False) -> list[Job] | None:
        """Up to `limit` jobs by their age, those behind `after`; None where there is no such job."""
        order, sign, start = ("ASC", ">", -1) if oldest_first else ("DESC", "<", 2**62)
        if after is not None:
            rows = self._read("SELECT number FROM jobs WHERE id = ?", after)
            if not rows:
                return None
            start = rows[0][0]
        query = f"SELECT {_COLUMNS} FROM jobs WHERE number {sign} ? ORDER BY number {order} LIMIT ?"
        return [Job.of(row) for row in self._read(query, start, limit)]

    def take(self, running: Collection[str] = ()) -> Job | None:
        """The one that has waited longest, now in progress.

        One that is in progress already and not among those `running` is one whose end could not be written
        down: it comes first, again.
        """
        with self._transaction() as database:
            unfinished = "SELECT id FROM jobs WHERE status IN ('in_progress', 'queued')"
            others = f"{unfinished} AND id NOT IN ({', '.join('?' * len(running))})"
            row = database.execute(f"{others} ORDER BY status, number LIMIT 1", tuple(running)).fetchone()
            if row is None:
                return None
            change = "status = 'in_progress', started = ?, attempts = attempts + 1"
            query = f"UPDATE jobs SET {change} WHERE id = ? RETURNING {_COLUMNS}"
            return Job.of(database.execute(query, (time.time(), row[0])).fetchone())

    def put_back(self, id: str) -> None:
        """Queue a job again that was begun and is not to blame."""
        with self._transaction() as database:
            change = "status = 'queued', started = NULL, attempts = attempts - 1"
            database.execute(f"UPDATE jobs SET {change} WHERE id = ? AND status = 'in_progress'", (id,))

    def complete(self, id: str, figures: dict[str, Any]) -> bool:
        """Write down that the clip is there; False where the job was removed meanwhile."""
        return self._end(id, "completed", None, json.dumps(figures))

    def fail(self, id: str, error: str) -> bool:
        """Write down why there is none; False where the job was removed meanwhile."""
        return self._end(id, "failed", error, None)

    def _end(self, id: str, status: Status, error: str | None, figures: str | None) -> bool:
        with self._transaction() as database:
            query = "UPDATE jobs SET status = ?, ended = ?, error = ?, figures = ? WHERE id = ?"
            return database.execute(query, (status, time.time(), error, figures, id)).rowcount > 0

    def remove(self, id: str) -> bool:
        """Forget a job; False where there is none of that id."""
        with self._transaction() as database:
            return database.execute("DELETE FROM jobs WHERE id = ?", (id,)).rowcount > 0

    def remove_oldest(self, *, keep: int) -> list[str]:
        """Forget all finished jobs but the `keep` that ended last; returns the ids of those forgotten."""
        with self._transaction() as database:
            finished = "SELECT id FROM jobs WHERE status IN ('completed', 'failed')"
            oldest = f"{finished} ORDER BY ended DESC, number DESC LIMIT -1 OFFSET ?"
            query = f"DELETE FROM jobs WHERE id IN ({oldest}) RETURNING id"
            return [id for (id,) in database.execute(query, (keep,)).fetchall()]

    def counts(self) -> dict[Status, int]:
        """How many jobs have each status."""
        found = dict(self._read("SELECT status, count(*) FROM jobs GROUP BY status"))
        return {status: found.get(status, 0) for status in STATUSES}

    def completed(self) -> set[str]:
        """The ids of the jobs that have a clip."""
        return {id for (id,) in self._read("SELECT id FROM jobs WHERE status = 'completed'")}

    def pictures(self) -> set[str]:
        """The names of the files that jobs in any state are made from."""
        requests = (ClipRequest.loads(text) for (text,) in self._read("SELECT request FROM jobs"))
        return {name for request in requests for name in (request.image, request.last) if name is not None}
