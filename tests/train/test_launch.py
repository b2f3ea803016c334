"""Who a process is, from the variables that each launcher sets."""

import json

import pytest
import torch

from kinoflow.configs.errors import UserError
from kinoflow.configs.launch import Launch, launch, meeting, without_local_rank
from kinoflow.data.latents.shards import LatentDataset

TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "812", "SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "gpu[003-004]",
    "SLURM_STEP_NODELIST": "gpu[003-004]", "ENVIRONMENT": "BATCH",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}  # fmt: skip
MPICH = {
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
    "MPI_LOCALRANKID": "0",
    "MPI_LOCALNRANKS": "1",
    "MASTER_ADDR": "n0",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (TORCHRUN, Launch(rank=5, local_rank=1, size=8, address="10.0.0.1", port=29400)),
        (SRUN, Launch(rank=9, local_rank=1, size=16, address="gpu003", port=20000 + 812 * 7)),
        (OPEN_MPI, Launch(rank=3, local_rank=3, size=4, address="127.0.0.1", port=29500)),
        (MPICH, Launch(rank=1, local_rank=0, size=2, address="n0", port=29500)),
    ],
    ids=["torchrun", "srun", "open mpi", "mpich"],
)
def test_each_launcher(environment, expected):
    assert launch(environment) == expected
    assert launch(expected.variables()) == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("a1,b2", "a1"),
        ("gpu[3-6]", "gpu3"),
        ("gpu[003,007-9],login1", "gpu003"),
        ("rack2-[10-12]-ib", "rack2-10-ib"),
        ("dgx-a[1-2],dgx-b[1-4]", "dgx-a1"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    found = launch({**SRUN, "SLURM_STEP_NODELIST": nodes})
    assert found is not None
    assert found.address == first


def test_one_process_needs_no_port(monkeypatch):
    """Whatever listens at the one it would have taken."""
    monkeypatch.setattr(torch.distributed, "rendezvous", pytest.fail)
    store = meeting(1)
    store.set("here", "1")
    assert store.get("here") == b"1"


def test_steps_of_one_job_meet_at_ports_of_their_own():
    ports = {launch({**SRUN, "SLURM_STEP_ID": str(step)}).port for step in range(3)}  # type: ignore[union-attr]
    assert len(ports) == 3
    assert launch({**SRUN, "MASTER_PORT": "1234"}).port == 1234  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},  # salloc's shell
        {
            "SLURM_JOB_ID": "1",
            "SLURM_NTASKS": "8",
            "SLURM_PROCID": "0",
            "ENVIRONMENT": "BATCH",
        },  # sbatch's script
        {"MASTER_ADDR": "10.0.0.1"},
    ],
)
def test_a_process_that_stands_alone(environment):
    assert launch(environment) is None


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({**TORCHRUN, "RANK": "8"}, "RANK: 8 is not one of WORLD_SIZE=8"),
        ({**TORCHRUN, "WORLD_SIZE": "many"}, "WORLD_SIZE: 'many'"),
    ],
)
def test_what_is_missing_or_wrong_is_named(environment, named):
    with pytest.raises(UserError, match=named):
        launch(environment)


@pytest.mark.parametrize(
    "environment", [{"RANK": "0", "WORLD_SIZE": "2"}, {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}]
)
def test_who_has_no_address_cannot_meet(environment):
    """Precomputing needs no meeting; a training does."""
    found = launch(environment)
    assert found is not None
    with pytest.raises(UserError, match="MASTER_ADDR: not set"):
        found.variables()


def test_the_argument_that_deepspeed_adds():
    words = ["configs/a.yaml", "run=r"]
    assert without_local_rank(["--local_rank=3", *words]) == words
    assert without_local_rank([words[0], "--local-rank", "3", words[1]]) == words


def srun(rank, size, port):
    """The variables of two nodes with one task each, as srun sets them; both are this machine."""
    return {
        "SLURM_JOB_ID": "812", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": str(size), "SLURM_NTASKS": str(size), "SLURM_NNODES": str(size),
        "SLURM_STEP_NODELIST": "localhost,elsewhere", "MASTER_PORT": str(port),
    }  # fmt: skip


def test_srun_alone_trains_and_precomputes_together(start_job, tmp_path):
    """No MASTER_ADDR, no torchrun: both tasks take part in one run, and share the shards of one folder."""
    common = ["steps=4", "log_every=1", "checkpoint_every=4", "deepspeed.zero_stage=1"]
    job = start_job("toy", [*common, f"run={tmp_path / 'run'}"], size=2, launcher=srun)
    assert job.wait() == [0, 0], job.text()
    state = json.loads((tmp_path / "run" / "checkpoints" / "00000004" / "state.json").read_text())
    assert state["processes"] == 2
    made = start_job("precomputed", str(tmp_path / "out"), size=2, launcher=srun)
    assert made.wait() == [0, 0], made.text()
    data = LatentDataset(tmp_path / "out")
    assert all(data.captions("1x16x16@16", clip)[0] for clip in range(8))
    assert made.text().count("2 of 4 shards to make") == 2
