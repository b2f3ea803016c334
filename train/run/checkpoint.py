"""Checkpoints of a run: written aside, renamed when whole, resumed exactly."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import write_text
from kinoflow.configs.schema import to_dict
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.ema import EMA
from kinoflow.train.run.processes import from_all, from_first

if TYPE_CHECKING:
    from kinoflow.train.run.engine import Engine

STATE = "state.json"
_ASIDE = ".partial-"
_WRITE_FAILURES = ("PytorchStreamWriter", "iostream error", "I/O error", "No space left", "File too large")
Pending = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class State:
    """All that changes while a run goes on."""

    config: RunConfig
    engine: "Engine"
    adversary: "Engine | None"
    ema: EMA


def save(folder: Path, state: State, step: int, pending: Pending) -> None:
    """Write folder/checkpoints/<step>, then `latest`, then drop old ones; every rank calls it.

    Every rank writes into the same folder aside; rank 0 removes it when anything cuts it off.

    Raises:
        UserError: the disk takes no more.
    """
    root, processes = folder / "checkpoints", state.engine.processes
    aside, whole = root / f"{_ASIDE}{step:08d}", root / f"{step:08d}"
    try:
        _write_shards(aside, state, step, pending)
        if processes.rank == 0:
            shutil.rmtree(whole, ignore_errors=True)
            aside.rename(whole)
    except BaseException as error:
        if processes.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        if not isinstance(error, OSError) and not any(sign in str(error) for sign in _WRITE_FAILURES):
            raise
        raise UserError(f"{whole}: cannot be written, is the disk full? Free space, then run the same "
                              "command again") from error  # fmt: skip
    if processes.rank == 0:
        write_text(root / "latest", whole.name + "\n")
        for old in _folders(root)[: -state.config.keep_checkpoints]:
            shutil.rmtree(old)
    from_first(None, processes)


def _write_shards(aside: Path, state: State, step: int, pending: Pending) -> None:
    processes = state.engine.processes
    if processes.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    from_first(None, processes)  # the folder exists
    state.engine.save(aside, "model")
    if state.adversary is not None:
        state.adversary.save(aside, "discriminator")
    if state.engine.stage > 0 or processes.rank == 0:
        _save_ema(aside / f"ema_{processes.rank:05d}.safetensors", state.ema)
    if processes.rank == 0:
        _save_rest(aside / "rest.safetensors", state.engine.model)
    every_pending = from_all(pending, processes)  # and every rank has written
    if processes.rank == 0:
        sizes = {str(path.relative_to(aside)): path.stat().st_size for path in _files(aside)}
        record = {"step": step, "processes": processes.size, "config": to_dict(state.config),
                  "pending": every_pending, "files": sizes}  # fmt: skip
        (aside / STATE).write_text(json.dumps(record), encoding="utf-8")


def resume(folder: Path, state: State) -> tuple[int, Pending]:
    """Load the newest whole checkpoint; the steps done so far and the figures of the open log interval.

    What a killed run was writing is removed.

    Raises:
        UserError: the run folder belongs to another model, ZeRO stage or number of ranks.
    """
    processes = state.engine.processes
    if processes.rank == 0:
        for left in (folder / "checkpoints").glob(f"{_ASIDE}*"):
            shutil.rmtree(left, ignore_errors=True)
    found = from_first(newest(folder) if processes.rank == 0 else None, processes)
    if found is None:
        return 0, {}
    record = json.loads((found / STATE).read_text(encoding="utf-8"))
    _compare(record, state.config, processes.size, found, speak=processes.rank == 0)
    rank = processes.rank if state.engine.stage > 0 else 0
    average = found / f"ema_{rank:05d}.safetensors"
    _compare_models(average, state.ema, found)
    state.engine.load(found, "model")
    if state.adversary is not None and (found / "discriminator").is_dir():
        state.adversary.load(found, "discriminator")
    state.ema.load(load_file(average, device=str(processes.device)))
    return record["step"], record["pending"][processes.rank if len(record["pending"]) > processes.rank else 0]


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are passed over with one line each."""
    for candidate in reversed(_folders(folder / "checkpoints")):
        damage = _damage(candidate)
        if damage is None:
            return candidate
        print(f"checkpoint {candidate} is damaged ({damage}): going on from the one before", flush=True)
    return None


def _save_ema(path: Path, ema: EMA) -> None:
    index = {f.name: {"shape": list(f.shape), "start": f.start} for f in ema.fragments}
    save_file(ema.pieces(), path, metadata={"fragments": json.dumps(index)})


def _save_rest(path: Path, model: torch.nn.Module) -> None:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    rest = {name: value for name, value in model.state_dict().items() if name not in trained}
    save_file({name: value.contiguous().clone() for name, value in rest.items()}, path)


def _compare(record: dict[str, Any], config: RunConfig, size: int, found: Path, *, speak: bool) -> None:
    """Refuse what the saved state cannot become, and say what else is new."""
    fixed = ["model", config.model, "deepspeed.zero_stage", "deepspeed.precision"]
    for key, before, after in _changes(record["config"], to_dict(config)):
        if any(key == name or key.startswith(name + ".") for name in fixed):
            raise UserError(f"{key}: {found} was made with {before} and this run has {after}; "
                                  "put it back or choose another run=")  # fmt: skip
        if speak and key not in ("run", "steps"):
            print(f"resuming with {key}: {before} -> {after}", flush=True)
    if config.deepspeed.zero_stage > 0 and record["processes"] != size:
        raise UserError(f"{found} was made by {record['processes']} processes and this run has "
                              f"{size}; start as many, or choose another run=")  # fmt: skip


def _compare_models(average: Path, ema: EMA, found: Path) -> None:
    """Refuse the checkpoint of another model: a release that the run began with may have changed since."""
    with safe_open(average, framework="pt") as shard:
        index = json.loads(shard.metadata()["fragments"])
    before = {name: piece["shape"] for name, piece in index.items()}
    now = {fragment.name: list(fragment.shape) for fragment in ema.fragments}
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            there, here = (shapes.get(name, "not trained") for shapes in (before, now))
            raise UserError(f"{found} holds another model ({name}: {there} there, {here} in this run); "
                                  "choose another run=")  # fmt: skip


def _changes(before: Any, after: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before} & {*after}):  # a key that only one version of the code knows is no change
            yield from _changes(before[key], after[key], f"{prefix}.{key}" if prefix else key)
    elif before != after:
        yield prefix, before, after


def _damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be read, None when every file has the size it was written with."""
    try:
        sizes = json.loads((folder / STATE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{STATE} is missing or unreadable"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    return None


def _folders(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
