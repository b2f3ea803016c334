"""The list of jobs: order, limits, and what survives."""

import json
import sqlite3
from dataclasses import replace
from fractions import Fraction

import pytest

from kinoflow.configs.errors import UserError
from kinoflow.sample.request import ClipRequest
from kinoflow.sample.serve.jobs import Jobs

REQUEST = ClipRequest(prompt='a "★"\n', seed=2**63 - 1, frames=24, fps=Fraction(24000, 1001), guidance=0.1)


STEERED = ClipRequest(
    prompt="x", guidance_kind="apg", guidance_interval=(0.1, 0.9), guidance_rescale=0.7, cache=0.02
)


@pytest.fixture
def jobs(tmp_path):
    with_file = Jobs(tmp_path / "jobs.sqlite")
    yield with_file
    with_file.close()


def added(jobs: Jobs, *ids: str) -> None:
    for id in ids:
        assert jobs.add(id, REQUEST, most=100) is not None


def test_a_request_comes_back_as_it_went(jobs):
    for request in (REQUEST, STEERED, ClipRequest(prompt="x"), replace(REQUEST, fps=Fraction(16))):
        assert ClipRequest.loads(request.dumps()) == request
    before = json.loads(REQUEST.dumps())  # as a server of an earlier version wrote it
    assert ClipRequest.loads(json.dumps({k: v for k, v in before.items() if "guidance_" not in k})) == REQUEST
    added(jobs, "a")
    job = jobs.get("a")
    assert job is not None and (job.request, job.status, job.attempts) == (REQUEST, "queued", 0)


def test_jobs_are_taken_in_order_and_once(jobs):
    added(jobs, "b", "a", "c")
    order = []
    while (job := jobs.take()) is not None:
        order.append(job.id)
        assert job.status == "in_progress" and job.attempts == 1
        assert jobs.complete(job.id, {"seconds": 1.5})
    assert order == ["b", "a", "c"]
    done = jobs.get("a")
    assert done is not None and (done.status, done.figures) == ("completed", {"seconds": 1.5})


def test_one_whose_end_could_not_be_written_comes_first_again(jobs):
    added(jobs, "a", "b")
    assert [jobs.take().id, jobs.take().id] == ["a", "a"]
    assert jobs.get("a").attempts == 2
    jobs.put_back("a")
    assert (jobs.get("a").attempts, jobs.get("a").status) == (1, "queued")


def test_the_queue_holds_so_many_beside_the_running_one(jobs):
    assert jobs.add("a", REQUEST, most=1) is not None
    assert jobs.add("b", REQUEST, most=1) is None
    jobs.take()
    assert jobs.add("b", REQUEST, most=1) is not None
    assert jobs.counts() == {"queued": 1, "in_progress": 1, "completed": 0, "failed": 0}


def test_what_was_begun_when_the_file_was_left_is_queued_again(tmp_path):
    jobs = Jobs(tmp_path / "jobs.sqlite")
    added(jobs, "a", "b", "c")
    jobs.complete(jobs.take().id, {})
    jobs.take()
    jobs.close()
    jobs = Jobs(tmp_path / "jobs.sqlite")
    assert [jobs.get(id).status for id in "abc"] == ["completed", "queued", "queued"]
    assert jobs.completed() == {"a"}
    assert (jobs.take().id, jobs.get("b").attempts) == ("b", 2)
    jobs.close()


def test_the_oldest_finished_are_forgotten_and_no_others(jobs):
    added(jobs, *"abcdef")
    for _ in "ab":
        jobs.complete(jobs.take().id, {})
    jobs.fail(jobs.take().id, "why")
    jobs.take()
    assert set(jobs.remove_oldest(keep=1)) == {"a", "b"}
    assert [job.id for job in jobs.page(limit=9, oldest_first=True)] == ["c", "d", "e", "f"]
    assert jobs.remove_oldest(keep=1) == []
    assert jobs.remove("d") and not jobs.remove("d")
    assert not jobs.complete("d", {}) and not jobs.fail("d", "why")


def test_pages_go_through_all_once_in_both_directions(jobs):
    added(jobs, *"abcde")
    for oldest_first, order in ((True, "abcde"), (False, "edcba")):
        seen, after = "", None
        while page := jobs.page(limit=2, after=after, oldest_first=oldest_first):
            seen, after = seen + "".join(job.id for job in page), page[-1].id
        assert seen == order
    assert jobs.page(limit=2, after="gone") is None


def test_a_file_belongs_to_one_server(tmp_path):
    path = tmp_path / "serve" / "jobs.sqlite"
    jobs = Jobs(path)
    with pytest.raises(UserError, match="another server works there; stop it, or use another --folder"):
        Jobs(path)
    jobs.close()
    Jobs(path).close()


@pytest.mark.parametrize("kind", ["text", "version", "folder", "file"])
def test_a_file_that_is_no_list_of_jobs_is_one_line(tmp_path, kind):
    path = tmp_path / "serve" / "jobs.sqlite"
    path.parent.touch() if kind == "file" else path.parent.mkdir()
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("mine" * 1000)
    elif kind == "version":
        database = sqlite3.connect(path)
        database.execute("PRAGMA user_version = 7")
        database.close()
    with pytest.raises(UserError, match="--folder") as raised:
        Jobs(path)
    assert "\n" not in str(raised.value)
