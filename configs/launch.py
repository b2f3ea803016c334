"""Who a process is among those that a launcher started: torchrun, deepspeed, srun, mpirun, or none."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kinoflow.configs.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

_PORT = 29500  # torchrun's
_SLURM_PORTS = range(20000, 30000)  # below what systems hand out by themselves
# Rank, size, rank on the node and processes of the node, in the words of Open MPI, MPICH and MVAPICH.
_MPI = (
    *(
        tuple(f"{prefix}_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
        for prefix in ("OMPI", "MV2")
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """This process among all: rank in [0, size), rank on its node, and where rank 0 listens, where said."""

    rank: int
    local_rank: int
    size: int
    address: str | None
    port: int

    def variables(self) -> dict[str, str]:
        """In the words that torch and DeepSpeed read.

        Raises:
            UserError: nobody said where rank 0 is.
        """
        if self.address is None:
            raise UserError("MASTER_ADDR: not set, and the launcher does not say where rank 0 is; set it")
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def launch(environment: Mapping[str, str]) -> Launch | None:
    """What the launcher's variables say; None for a process that stands alone.

    torchrun and deepspeed say all of it; srun says who a task is and which nodes there are, MPI not even
    that: `MASTER_ADDR` and `MASTER_PORT` count wherever they are set. The script of an sbatch job that calls
    no srun is one process, whatever the job may use.

    Raises:
        UserError: variables that contradict each other.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        pair = {"RANK", "WORLD_SIZE"}
        if missing := pair - environment.keys():
            raise UserError(f"{min(missing)}: not set, though {min(pair - missing)} is; start with torchrun")
        return _launch(environment, ("RANK", "WORLD_SIZE", "LOCAL_RANK"), None)
    if _is_srun(environment):
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        return _launch(environment, ("SLURM_PROCID", size, "SLURM_LOCALID"), _first_node(environment))
    for rank, size, local, on_node in _MPI:
        if rank in environment and size in environment:
            alone = environment.get(on_node) == environment[size]
            return _launch(environment, (rank, size, local), "127.0.0.1" if alone else None)
    return None


def current() -> Launch:
    """What the launcher of this process says, else a group of one.

    Raises:
        UserError: as `launch`.
    """
    return launch(os.environ) or alone()


def alone() -> Launch:
    """A group of one, which meets nobody."""
    return Launch(rank=0, local_rank=0, size=1, address="127.0.0.1", port=_PORT)


def meeting(size: int) -> "Store":
    """Where the processes find each other, by `variables`; one alone needs no port, which could be taken."""
    import torch.distributed as dist  # slow, for commands that start nothing

    if size == 1:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://"))
    # torchrun keeps its store over restarts, and in it the addresses of processes that are gone.
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def without_local_rank(arguments: list[str]) -> list[str]:
    """Arguments without the `--local_rank` that the deepspeed launcher adds; the variables say it too."""
    kept, skip = [], False
    for word in arguments:
        name, given, _ = word.partition("=")
        if skip or name in {"--local_rank", "--local-rank"}:
            skip = not skip and not given
            continue
        kept.append(word)
    return kept


def _launch(environment: Mapping[str, str], names: tuple[str, str, str], address: str | None) -> Launch:
    rank, size = (_number(environment, name) for name in names[:2])
    local = _number(environment, names[2]) if names[2] in environment else 0
    if not 0 <= rank < size:
        raise UserError(f"{names[0]}: {rank} is not one of {names[1]}={size} processes")
    address = environment.get("MASTER_ADDR", address)
    port = _number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else _port(environment)
    return Launch(rank=rank, local_rank=local, size=size, address=address, port=port)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{name}: {text!r} is not a number; launchers set it, leave it to them")
    return int(text)


def _is_srun(environment: Mapping[str, str]) -> bool:
    """A task of srun; the script of a batch job has the job's variables, and no step."""
    if "SLURM_PROCID" not in environment:
        return False
    if "SLURM_STEP_NUM_TASKS" in environment:
        return True
    return environment.get("ENVIRONMENT") != "BATCH" and int(environment.get("SLURM_NTASKS") or 1) > 1


def _port(environment: Mapping[str, str]) -> int:
    """The same on every node of a job, and another for the next job."""
    job = environment.get("SLURM_JOB_ID", "")
    step = environment.get("SLURM_STEP_ID", "")
    if not job.isdigit():
        return _PORT
    number = int(job) * 7 + (int(step) if step.isdigit() else 0)
    return _SLURM_PORTS[number % len(_SLURM_PORTS)]


def _first_node(environment: Mapping[str, str]) -> str | None:
    """The first of "gpu[003-006,9],login1": where SLURM puts rank 0."""
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    nodes = next((environment[name] for name in names if environment.get(name)), None)
    if nodes is None:
        return "127.0.0.1" if environment.get("SLURM_NNODES", "1") == "1" else None
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    if found is None:
        raise UserError(f"SLURM_JOB_NODELIST: {nodes!r} names no node; set MASTER_ADDR to rank 0's host")
    return "".join(part or "" for part in found.groups())
