"""Training jobs as real processes, forked from one server that imported DeepSpeed once."""

import multiprocessing
import os
import sys
from multiprocessing import forkserver

import pytest

from tests.train.launching import free_port

_context = multiprocessing.get_context("forkserver")


def pytest_collection_finish():
    """Start the server before any test starts another: a process has one, and who is first fills it.

    The product forks readers of clips from one as well.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _context.set_forkserver_preload(["tests.train.jobs"])
    forkserver.ensure_running()


def _entry(name, arguments, environment, out):
    os.environ.update(environment)
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from tests.train import jobs

    sys.exit(getattr(jobs, name)(*arguments))


def _torchrun(rank, size, port):
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip


class Job:
    """A function of jobs.py in `size` processes, joined by gloo when there are more than one."""

    def __init__(self, name, *arguments, size=1, out, launcher=_torchrun):
        port = free_port()
        self.out = out
        self.processes = []
        for rank in range(size):
            environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            if size > 1:
                environment |= launcher(rank, size, port)
            process = _context.Process(target=_entry, args=(name, arguments, environment, str(out)))
            process.start()
            self.processes.append(process)

    def wait(self, seconds=900):
        """The exit codes, in rank order."""
        for process in self.processes:
            process.join(seconds)
            if process.is_alive():
                process.kill()
                raise TimeoutError(f"still running after {seconds} s:\n{self.text()}")
        return [process.exitcode for process in self.processes]

    def text(self):
        """All that the job printed."""
        return self.out.read_text() if self.out.exists() else ""


@pytest.fixture(scope="session")
def start_job(tmp_path_factory):
    """start_job(name, *arguments, size=1) -> Job; what still runs at the end is killed."""
    folder = tmp_path_factory.mktemp("jobs")
    jobs = []

    def start(name, *arguments, **how):
        jobs.append(Job(name, *arguments, out=folder / f"{len(jobs)}.txt", **how))
        return jobs[-1]

    yield start
    for job in jobs:
        for process in job.processes:
            process.kill()
            process.join()


@pytest.fixture(scope="session")
def latents(start_job, tmp_path_factory):
    """Eight small clips of the toy world in four shards."""
    return _precomputed(start_job, tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="session")
def held_out(start_job, tmp_path_factory):
    """The same of what models never saw."""
    return _precomputed(start_job, tmp_path_factory.mktemp("held_out"), "world:heldout")


@pytest.fixture(scope="session")
def stills(start_job, tmp_path_factory):
    """Eight single frames of the toy world, and eight that models never saw."""
    names = {"stills": "world", "held_out_stills": "world:heldout"}
    return [
        _precomputed(start_job, tmp_path_factory.mktemp(name), source, bucket="1x16x16@16")
        for name, source in names.items()
    ]


@pytest.fixture(scope="session")
def keyframes(start_job, tmp_path_factory):
    """Eight clips of two latent frames, with latents of their first and last frame."""
    folder = tmp_path_factory.mktemp("keyframes")
    return _precomputed(start_job, folder, "world", "keyframes=true", bucket="12x16x16@16")


def _precomputed(start_job, folder, *source, bucket="4x16x16@16"):
    job = start_job("precomputed", str(folder), bucket, *source)
    assert job.wait() == [0], job.text()
    return folder
