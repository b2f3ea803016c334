"""Launch commands in pages and YAML files: who starts the processes, how many, and what these are told."""

import argparse
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

from deepspeed.launcher import runner
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parents[1]
NUMBER, WORD = r"\d+", r"[\w./:=@%,+-]+"
TIME = r"(\d+-)?\d+(:\d\d){0,2}"
# Options of programs that are not here to be asked: what their values look like, None for none.
SLURM: dict[str, str | None] = {
    "--nodes": NUMBER, "--ntasks": NUMBER, "--ntasks-per-node": NUMBER, "--gpus-per-node": NUMBER,
    "--cpus-per-task": NUMBER, "--kill-on-bad-exit": "[01]", "--time": TIME, "--partition": WORD,
    "--account": WORD, "--job-name": WORD, "--exclusive": None,
}  # fmt: skip
MPI: dict[str, str | None] = {"-np": NUMBER, "--hostfile": WORD, "--map-by": WORD, "-x": r"[A-Z_]+(=\S+)?"}


class LineError(Exception):
    """What is wrong with a line."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A line's launcher, empty for none; its processes, None where it does not say; the training's words."""

    launcher: str
    processes: int | None
    words: tuple[str, ...]

    @property
    def verb(self) -> str:
        """What comes before the YAML files; empty for a training."""
        return self.words[0] if self.words and re.fullmatch(r"[a-z]+", self.words[0]) else ""

    @property
    def sources(self) -> list[str]:
        """What comes behind that."""
        return list(self.words[bool(self.verb) :])

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(word for word in self.words if word.endswith(".yaml") and "=" not in word)

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(word.partition("=")[0] for word in self.words if "=" in word)


def read(words: list[str]) -> Launch:
    """Take a command apart with its launcher's own parser.

    Raises:
        LineError: its launcher would refuse it, or could not start what it says.
    """
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, rest = Path(words[0]).name if words else "", words[1:]
    if program in LAUNCHERS:
        return LAUNCHERS[program](rest)
    if program == "kinoflow" and rest[:1] == ["train"]:
        return Launch(launcher="", processes=1, words=tuple(rest[1:]))
    if program in {"python", "python3"} and rest[:2] == ["-m", "kinoflow.train"]:
        return Launch(launcher="", processes=1, words=tuple(rest[2:]))
    raise LineError(f"{shlex.join(words[:3])} starts no training")


def _torchrun(words: list[str]) -> Launch:
    given = _parsed(get_args_parser().parse_args, words)
    if not given.module or given.training_script != "kinoflow.train":
        raise LineError(f"torchrun {given.training_script} has no -m kinoflow.train")
    nodes, each = int(given.nnodes.partition(":")[0]), int(given.nproc_per_node)
    numbered = _gives(words, "master-addr") and _gives(words, "node-rank")
    if nodes > 1 and not numbered and not (given.rdzv_endpoint and given.rdzv_backend != "static"):
        raise LineError(f"torchrun: {nodes} nodes, but not where they meet: --rdzv-backend, --rdzv-endpoint")
    return Launch(launcher="torchrun", processes=nodes * each, words=tuple(given.training_script_args))


def _deepspeed(words: list[str]) -> Launch:
    given = _parsed(runner.parse_args, words)
    if not given.module or given.user_script != "kinoflow.train":
        raise LineError(f"deepspeed {given.user_script} has no --module kinoflow.train")
    alone = not _gives(words, "hostfile")
    count = given.num_gpus if alone and given.num_gpus > 0 else None
    return Launch(launcher="deepspeed", processes=count, words=tuple(given.user_args))


def _srun(words: list[str]) -> Launch:
    given, rest = _options("srun", SLURM, words)
    inner = read(rest)
    if inner.launcher:
        return replace(inner, processes=None)
    return replace(inner, launcher="srun", processes=_tasks(given))


def _sbatch(words: list[str]) -> Launch:
    """Its script calls srun with what is behind it; what the script asks for stands in its own lines."""
    given, rest = _options("sbatch", SLURM, words)
    if not rest or not (ROOT / rest[0]).is_file():
        raise LineError(f"sbatch: there is no script {' '.join(rest[:1])}")
    lines = re.findall(r"^#SBATCH (\S+)$", (ROOT / rest[0]).read_text(encoding="utf-8"), re.MULTILINE)
    asked = dict(line.split("=", 1) for line in lines if "=" in line)
    return Launch(launcher="srun", processes=_tasks({**asked, **given}), words=tuple(rest[1:]))


def _mpirun(words: list[str]) -> Launch:
    given, rest = _options("mpirun", MPI, words)
    if "--hostfile" in given and "-x MASTER_ADDR" not in " ".join(words):
        raise LineError("mpirun: several hosts, but not where rank 0 is: -x MASTER_ADDR=HOST")
    return replace(read(rest), launcher="mpirun", processes=int(given["-np"]) if "-np" in given else None)


LAUNCHERS: dict[str, Callable[[list[str]], Launch]] = {
    "torchrun": _torchrun, "deepspeed": _deepspeed, "srun": _srun, "sbatch": _sbatch, "mpirun": _mpirun,
}  # fmt: skip


def _parsed(parse: Callable[[list[str]], argparse.Namespace], words: list[str]) -> argparse.Namespace:
    said = StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            return parse(words)
    except SystemExit:
        raise LineError(said.getvalue().strip().splitlines()[-1]) from None


def _gives(words: list[str], name: str) -> bool:
    return any(word.partition("=")[0].replace("_", "-") == f"--{name}" for word in words)


def _options(
    program: str, known: dict[str, str | None], words: list[str]
) -> tuple[dict[str, str], list[str]]:
    """The options in front, by name, and the rest."""
    given, rest = {}, list(words)
    while rest and rest[0].startswith("-"):
        name, equals, value = rest.pop(0).partition("=")
        if name not in known:
            raise LineError(f"{program}: {name} is none of {', '.join(known)}")
        form = known[name]
        if form is not None and not equals:
            value = rest.pop(0) if rest else ""
        if not re.fullmatch(form or "", value):
            raise LineError(f"{program}: {name} {value} is not of the form {form}")
        given[name] = value
    return given, rest


def _tasks(given: dict[str, str]) -> int | None:
    if "--ntasks" in given:
        return int(given["--ntasks"])
    if "--nodes" in given and "--ntasks-per-node" in given:
        return int(given["--nodes"]) * int(given["--ntasks-per-node"])
    return None


def of_comments(text: str) -> Iterator[list[str]]:
    """The commands in a file's comments: lines set in by three spaces and more, with what continues them."""
    comments = "\n".join(line[1:] if line.startswith("#") else "" for line in text.splitlines())
    for line in re.sub(r"\\\n", " ", comments).splitlines():
        if line.startswith("   ") and re.search(r"\bkinoflow[. ]train\b|\bsbatch\b", line):
            yield shlex.split(line)


def of_prose(text: str) -> Iterator[list[str]]:
    """The commands in the code spans of a page's sentences; those with gaps are none."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose):
        if re.search(r"\bkinoflow[. ]train\b.*(\.yaml|=)", span, re.DOTALL) and "…" not in span:
            yield shlex.split(span)
