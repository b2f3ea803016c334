"""What a server tells Prometheus."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kinoflow.sample.serve.jobs import STATUSES, Status

_SECONDS = (0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800, 3600, 7200)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The figures of one server since it started; the jobs by status are those of its list."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._jobs = Gauge("kinoflow_jobs", "Jobs in the list", ["status"], registry=registry)
        self._queue = Gauge("kinoflow_queue_length", "Jobs that wait", registry=registry)
        self._ended = Counter("kinoflow_jobs_ended", "Jobs that ended", ["status"], registry=registry)
        self._wait = Histogram(
            "kinoflow_wait_seconds", "From a request to its start", buckets=_SECONDS, registry=registry
        )
        self._work = Histogram(
            "kinoflow_job_seconds", "From the start of a job to its clip", buckets=_SECONDS, registry=registry
        )
        for status in ("completed", "failed"):  # so that a rate over them exists before the first one
            self._ended.labels(status)
        self._total, self._number = 0.0, 0

    def started(self, wait: float) -> None:
        """A job began after so many seconds; one that is begun again is counted again."""
        self._wait.observe(max(wait, 0.0))  # the clock may be set back

    def completed(self, seconds: float) -> None:
        """A clip was made in so many seconds."""
        self._ended.labels("completed").inc()
        self._work.observe(seconds)
        self._total, self._number = self._total + seconds, self._number + 1

    def failed(self) -> None:
        """A job failed."""
        self._ended.labels("failed").inc()

    @property
    def mean_seconds(self) -> float:
        """Of the clips made, 10 before the first."""
        return self._total / self._number if self._number else 10.0

    def text(self, counts: Mapping[Status, int]) -> bytes:
        """All figures in Prometheus' text format."""
        for status in STATUSES:
            self._jobs.labels(status).set(counts[status])
        self._queue.set(counts["queued"])
        return generate_latest(self._registry)
