"""Several clips at a time: each has its own progress and its own end."""

from pathlib import Path

import pytest

from kinoflow.sample.request import ClipRequest
from kinoflow.sample.serve.jobs import Jobs
from kinoflow.sample.serve.metrics import Metrics
from kinoflow.sample.serve.worker import Worker
from tests.sample.serve.fake import FakeMaker, until


@pytest.fixture
def gate(tmp_path):
    return tmp_path / "gate"


@pytest.fixture
def jobs(tmp_path):
    jobs = Jobs(tmp_path / "jobs.sqlite")
    yield jobs
    jobs.close()


@pytest.fixture
def worker(jobs, gate, tmp_path):
    maker = FakeMaker(gate.exists)
    maker.at_once = 2
    worker = Worker(jobs, maker, Metrics(), folder=tmp_path / "clips", keep=10)
    worker.start()
    yield worker
    gate.touch()
    worker.stop(60.0)


def add(jobs: Jobs, worker: Worker, *ids: str) -> None:
    for id in ids:
        jobs.add(id, FakeMaker().check(ClipRequest(prompt=id)), most=10)
        worker.wake()


def begun(jobs: Jobs) -> list[str]:
    return [job.id for job in jobs.page(limit=10, oldest_first=True) or [] if job.status == "in_progress"]


def test_as_many_are_in_progress_as_the_maker_makes_at_once(jobs, worker, gate):
    add(jobs, worker, "a", "b", "c")
    until(lambda: worker.share("a") == worker.share("b") == 0.5)
    assert begun(jobs) == ["a", "b"] and worker.share("c") == 0
    gate.touch()
    until(lambda: jobs.counts()["completed"] == 3)
    assert worker.works


def test_one_that_is_removed_makes_room_and_disturbs_no_other(jobs, worker, gate, tmp_path):
    add(jobs, worker, "a", "b", "c")
    until(lambda: worker.share("b") == 0.5)
    assert worker.remove("b")
    until(lambda: worker.share("c") == 0.5)
    assert begun(jobs) == ["a", "c"]
    gate.touch()
    until(lambda: jobs.counts()["completed"] == 2)
    assert sorted(path.name for path in Path(tmp_path / "clips").iterdir()) == ["a.mp4", "c.mp4"]


def test_all_are_put_back_at_the_end_and_one_that_fails_ends_alone(jobs, worker, gate):
    add(jobs, worker, "a", "a bug")
    until(lambda: worker.share("a bug") == 0.5)
    assert worker.stop(60.0)
    assert jobs.counts() == {"queued": 2, "in_progress": 0, "completed": 0, "failed": 0}
    assert [job.attempts for job in jobs.page(limit=10) or []] == [0, 0]
    assert not worker.works


def test_one_that_could_not_be_ended_comes_again_and_one_that_runs_does_not(jobs):
    for id in ("a", "b", "c"):
        jobs.add(id, FakeMaker().check(ClipRequest(prompt=id)), most=10)
    taken = [jobs.take(), jobs.take(running={"a"}), jobs.take(running={"a"}), jobs.take(running={"a", "b"})]
    assert [job.id for job in taken if job] == ["a", "b", "b", "c"]
    assert jobs.take(running={"a", "b", "c"}) is None
