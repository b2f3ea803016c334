"""Checkpoints of a run: written in the background, renamed when whole, resumed exactly by any processes."""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import write_text
from kinoflow.configs.schema import to_dict
from kinoflow.dit_video.backbone import BACKBONES
from kinoflow.train.run import rank_files
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.ema import EMA
from kinoflow.train.run.processes import from_all, from_first
from kinoflow.train.run.shards import Shards, write_pieces
from kinoflow.train.run.task import Base

if TYPE_CHECKING:
    from kinoflow.train.run.engine import Engine

STATE, FORMAT = "state.json", 2
_ASIDE, _DAMAGED = ".partial-", ".damaged-"
# A resumed run that differs in these is another run; all else is taken as it is now given.
_FIXED = ("model", "seed", "tae", *BACKBONES, "lora.rank", "lora.alpha", "lora.targets", "discriminator",
          "freeze_encoder", "grow", "loss", "flow", "known", "data.buckets", "data.batch_size",
          "data.world_share", "data.crop")  # fmt: skip
_SILENT = ("run", "steps", "data.latents", "data.manifest")
Pending = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class State:
    """All that changes while a run goes on; `source` stands for the clips it learns from.

    `base` is what does not change and lies elsewhere.
    """

    config: RunConfig
    engine: "Engine"
    adversary: "Engine | None"
    ema: EMA
    source: str = ""
    base: Base | None = None

    @property
    def elsewhere(self) -> frozenset[str]:
        """What a checkpoint does not hold."""
        return frozenset() if self.base is None else self.base.names


class Checkpoints:
    """Those of one run folder. Every process calls each method at the same point of the run."""

    def __init__(self, folder: Path, state: State) -> None:
        self._root, self._state, self._processes = folder / "checkpoints", state, state.engine.processes
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written: Future[None] | None = None
        self._step = 0

    def save(self, step: int, pending: Pending) -> None:
        """Copy the state to host memory and begin to write <step>; the one before is finished first.

        Raises:
            UserError: the one before could not be written.
        """
        self.finish()
        files = self._files()
        about = {"pending": pending, "counters": self._state.engine.counters()}
        if self._state.adversary is not None:
            about["adversary"] = self._state.adversary.counters()
        rank = self._processes.rank
        if rank == 0:
            record = {"format": FORMAT, "step": step, "processes": self._processes.size,
                      "source": self._state.source, "base": _named(self._state.base),
                      "config": to_dict(self._state.config)}  # fmt: skip
            files[STATE] = lambda path: path.write_text(json.dumps(record), encoding="utf-8")
        self._step = step
        self._written = self._writer.submit(rank_files.write, self._aside, rank, files, about)

    def _files(self) -> dict[str, Callable[[Path], Any]]:
        """Of each file of this process, how it is written: from copies, so that training may go on."""
        state, rank = self._state, self._processes.rank
        files: dict[str, Callable[[Path], Any]] = {}
        if state.engine.stage > 0 or rank == 0:
            pieces = {"model": state.engine.pieces(), "ema": state.ema.pieces()}
            if state.adversary is not None:
                pieces["discriminator"] = state.adversary.pieces()
            for kind, own in pieces.items():
                files[f"{kind}_{rank:05d}.safetensors"] = partial(write_pieces, pieces=own)
        rest = state.engine.rest(state.elsewhere)
        if rank == 0:
            files["rest.safetensors"] = partial(save_file, rest)
        return files

    @property
    def _aside(self) -> Path:
        return self._root / f"{_ASIDE}{self._step:08d}"

    @property
    def idle(self) -> bool:
        """Whether this process is not writing."""
        return self._written is None or self._written.done()

    def finish(self) -> None:
        """Wait until every process has written; then rename, write `latest` and drop old ones.

        Raises:
            UserError: the disk takes no more; what was written of this one is removed.
        """
        if self._written is None:
            return
        written, self._written = self._written, None
        failures = from_all(_failure(written.result), self._processes)
        failure = next(filter(None, failures), None)
        if self._processes.rank == 0 and failure is None:
            failure = _failure(self._rename)
        elif self._processes.rank == 0:
            shutil.rmtree(self._aside, ignore_errors=True)
        if failure := from_first(failure, self._processes):
            raise UserError(f"{self._root / f'{self._step:08d}'}: cannot be written ({failure}), is the disk "
                            "full? Free space, then run the same command again")  # fmt: skip
        if self._processes.rank == 0:
            self._writer.submit(self._prune, self._step)

    def _rename(self) -> None:
        whole = self._root / f"{self._step:08d}"
        shutil.rmtree(whole, ignore_errors=True)
        self._aside.rename(whole)
        write_text(self._root / "latest", whole.name + "\n")
        rank_files.sync(self._root)

    def _prune(self, step: int) -> None:
        """Keep the newest ones, and those at multiples of `keep_every`; what is later was given up."""
        config = self._state.config
        numbers = [int(path.name) for path in folders(self._root)]
        earlier = [number for number in numbers if number <= step][: -config.keep_checkpoints]
        later = [number for number in numbers if number > step]
        every = config.keep_every
        old = [number for number in earlier if not (every and number % every == 0)]
        for path in [*(self._root / f"{number:08d}" for number in old + later),
                     *self._root.glob(f"{_DAMAGED}*")]:  # fmt: skip
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Let go of what is being written: alone, it is finished; among others it is removed at the start."""
        if self._processes.size == 1:
            self.finish()
        self._writer.shutdown()

    def resume(self) -> tuple[int, Pending]:
        """Load the newest whole checkpoint; the steps done so far and the figures of the open log interval.

        What a killed run was writing is removed.

        Raises:
            UserError: the run folder belongs to another run, or none of its checkpoints is whole.
        """
        processes, first = self._processes, self._processes.rank == 0
        for left in self._root.glob(f"{_ASIDE}*") if first else ():
            shutil.rmtree(left, ignore_errors=True)
        found = self._newest()
        if found is None:
            return 0, {}
        record = json.loads((found / STATE).read_text(encoding="utf-8"))
        self._compare(record, found)
        about = _about(found, processes.rank, record["processes"], processes.size)
        model, ema = Shards(found, "model"), Shards(found, "ema")
        _compare_models(ema.shapes, self._state.engine.shapes, found)
        self._state.engine.load(model, about["counters"])
        rest = load_file(found / "rest.safetensors")
        self._state.engine.load_rest(rest, self._state.elsewhere)
        if self._state.adversary is not None and "adversary" in about:
            self._state.adversary.load(Shards(found, "discriminator"), about["adversary"])
        self._state.ema.load(ema)
        return record["step"], about["pending"]

    def _newest(self) -> Path | None:
        """The newest checkpoint that is whole: the processes look at a share of its files each."""
        processes, first = self._processes, self._processes.rank == 0
        candidates = from_first(folders(self._root)[::-1], processes)
        bad: dict[Path, str] = {}
        share = slice(processes.rank, None, processes.size)
        for candidate in candidates:
            problems = from_all(_damage(candidate, share), processes)
            problem = next(filter(None, problems), None)
            if problem is None:
                break
            bad[candidate] = problem
        else:
            if bad:
                told = "; ".join(f"{path.name}: {problem}" for path, problem in bad.items())
                raise UserError(f"{self._root}: no checkpoint is whole ({told}); is the disk all there? "
                                "Nothing was changed; remove the folder to start from 0")  # fmt: skip
            return None
        for path, problem in bad.items() if first else ():
            print(f"checkpoint {path} is damaged ({problem}): going on from the one before", flush=True)
            path.rename(path.with_name(_DAMAGED + path.name))
        return candidate

    def _compare(self, record: dict[str, Any], found: Path) -> None:
        """Refuse what the saved state cannot become, and say what else is new."""
        config, before = self._state.config, record["config"]
        for key, old, new in _changes(before, to_dict(config)):
            if any(key == name or key.startswith(name + ".") for name in _FIXED):
                raise UserError(f"{key}: {found} was made with {old} and this run has {new}; put it back or "
                                "choose another run= (init_from= goes on from an export)")  # fmt: skip
            if self._processes.rank == 0 and key not in _SILENT:
                print(f"resuming with {key}: {old} -> {new}", flush=True)
        check_base(found, self._state.base, config)
        if record["source"] != self._state.source:
            named = (before["data"][key] for key in ("latents", "manifest"))
            places = " or ".join(each if isinstance(each, str) else ", ".join(each) for each in named if each)
            raise UserError(f"data: {found} learned from other clips than this run has ({places}); put them "
                            "back or choose another run=")  # fmt: skip
        if config.steps < record["step"]:
            raise UserError(f"steps: {found} has done {record['step']} already, more than {config.steps}")


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose averages are whole; damaged ones are passed over with a line each."""
    for candidate in reversed(folders(folder / "checkpoints")):
        problem = _damage(candidate, slice(None), kinds=("ema_", "rest"))
        if problem is None:
            return candidate
        print(f"checkpoint {candidate} is damaged ({problem}): taking the one before", flush=True)
    return None


def check_base(found: Path, base: Base | None, config: RunConfig) -> None:
    """Refuse to go on with, or to export, a checkpoint whose frozen weights lie elsewhere and are others now.

    Raises:
        UserError: they are.
    """
    record = json.loads((found / STATE).read_text(encoding="utf-8"))
    if record.get("base", "") != _named(base):
        raise UserError(f"init_from: {found} was trained on other weights than {config.init_from} has now; "
                        "put them back or choose another run=")  # fmt: skip


def _named(base: Base | None) -> str:
    return "" if base is None else base.fingerprint


def folders(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))


def incomplete(folder: Path) -> str | None:
    """What a checkpoint lacks at the first glance, None when all files are there in their sizes."""
    return _damage(folder, slice(None), sizes_only=True)


def _damage(
    folder: Path, share: slice, kinds: tuple[str, ...] = ("",), *, sizes_only: bool = False
) -> str | None:
    """Why a checkpoint cannot be read, None when every file of the share is as it was written."""
    try:
        record = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if record.get("format") != FORMAT:
            return f"it has format {record.get('format', 1)}, this kinoflow reads {FORMAT}"
        ranks = int(record["processes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{STATE} is missing or unreadable"
    return rank_files.damage(folder, ranks, share, kinds, sizes_only=sizes_only)


def _failure(write: Callable[[], None]) -> str | None:
    """Why it did not succeed; a bug of ours is raised."""
    try:
        write()
    except (OSError, SafetensorError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def _about(found: Path, rank: int, before: int, now: int) -> dict[str, Any]:
    """What this process goes on from beside tensors; open figures are shared out anew where ranks changed."""
    if before == now:
        return rank_files.read(found, rank)
    every = [rank_files.read(found, other) for other in range(before)]
    means = {}
    for key, values in every[0]["pending"].items():
        columns = zip(values, *(one["pending"][key] for one in every[1:]), strict=True)
        means[key] = [sum(column) / before for column in columns]
    return every[0] | {"pending": means}


def _compare_models(there: dict[str, list[int]], here: dict[str, list[int]], found: Path) -> None:
    """Refuse the checkpoint of another model: a release that the run began with may have changed since."""
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            before, now = (shapes.get(name, "not trained") for shapes in (there, here))
            raise UserError(f"{found} holds another model ({name}: {before} there, {now} in this run); "
                            "choose another run=")  # fmt: skip


def _changes(before: Any, after: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before} & {*after}):  # a key that only one version of the code knows is no change
            yield from _changes(before[key], after[key], f"{prefix}.{key}" if prefix else key)
    elif before != after:
        yield prefix, before, after
