"""The training loop of every task."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinoflow.data.prefetch import prefetch
from kinoflow.train.run.batches import moved, pinned
from kinoflow.train.run.checkpoint import Checkpoints, Pending, State
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.ema import EMA
from kinoflow.train.run.engine import Engine
from kinoflow.train.run.guard import Events, Guard, StuckError
from kinoflow.train.run.lock import locked
from kinoflow.train.run.log import Log
from kinoflow.train.run.optimizer import learning_rate
from kinoflow.train.run.preview import preview, validate
from kinoflow.train.run.processes import Processes, any_of, termination
from kinoflow.train.run.record import record
from kinoflow.train.run.spread import Spread
from kinoflow.train.run.task import Loss, Parts, Task
from kinoflow.train.run.watch import Watch

PREEMPTED = 143  # 128 + SIGTERM


def train(task: Task, config: RunConfig, processes: Processes) -> int:
    """Train to config.steps from the run folder's newest checkpoint; 0, or 143 when a signal ended it.

    Raises:
        UserError: something of the task is missing, the run folder belongs to another run or is in use, the
            disk takes no checkpoint, or steps in a row had no finite gradient.
    """
    folder = Path(config.run)
    watching = Watch(folder, processes, config.patience)
    with locked(folder, processes), closing(task), watching as watch:
        task.prepare(Spread(config=config, processes=processes))
        engine = Engine(task.model, task.loss, config, processes)
        adversary = None
        if task.discriminator is not None:
            adversary = Engine(task.discriminator, task.discriminator_loss, config, processes)
        ema = EMA(engine.fragments(), config.ema_decay)
        state = State(config=config, engine=engine, adversary=adversary, ema=ema, source=task.source,
                      base=task.base)  # fmt: skip
        with closing(Checkpoints(folder, state)) as checkpoints:
            watch.at("reading the checkpoint")
            begin, pending = checkpoints.resume()
            if processes.rank == 0:
                record(config, folder)  # a folder that refuses to resume keeps what it says of itself
            return _Loop(task, state, checkpoints, watch).run(begin, pending)


class _Loop:
    """Steps, and what comes between them; every process does the same in the same order."""

    def __init__(self, task: Task, state: State, checkpoints: Checkpoints, watch: Watch) -> None:
        self._task, self._state, self._config = task, state, state.config
        self._checkpoints, self._watch = checkpoints, watch
        self._processes: Processes = state.engine.processes
        self._folder = Path(state.config.run)
        self._guard = Guard(Events(self._folder, self._processes.rank), self._processes)

    def run(self, begin: int, pending: Pending) -> int:
        """From step `begin` to the last; the exit status."""
        config, processes, done = self._config, self._processes, begin
        with ExitStack() as stack:
            log = Log(self._folder, device=processes.device, rank=processes.rank, processes=processes.size,
                      start=begin, steps=config.steps, wandb=config.wandb, pending=pending)  # fmt: skip
            stack.enter_context(log)
            batches = prefetch(self._batches, range(begin, config.steps), config.data.workers)
            prepared = stack.enter_context(closing(batches))
            terminated = stack.enter_context(termination())
            while done < config.steps:
                self._watch.at(f"the batch of step {done + 1}")
                asked = time.perf_counter()
                batch = next(prepared)
                log.add({"data_wait": time.perf_counter() - asked})
                self._watch.at(f"step {done + 1}")
                try:
                    self._step(done, batch, log)
                except StuckError:  # all processes are here, and what they write is from before
                    self._checkpoints.finish()
                    raise
                done += 1
                if self._between(done, log, terminated):
                    break
            self._watch.at(f"the checkpoint of step {done}")
            self._checkpoints.finish()
        return 0 if done == config.steps else PREEMPTED

    def _batches(self, step: int) -> list[Any]:
        """What this process computes in a step; called from background threads."""
        made = [self._task.batch(step, index, slices) for index, slices in self._slices()]
        return [pinned(batch) for batch in made] if self._processes.device.type == "cuda" else made

    def _slices(self) -> Iterator[tuple[int, int]]:
        """Which slices of a global batch this process takes, and of how many."""
        parts = self._config.deepspeed.accumulation
        for i in range(parts):
            yield self._processes.replica * parts + i, self._processes.replicas * parts

    def _step(self, step: int, batches: list[Any], log: Log) -> None:
        """Learn from a global batch, unless its gradient is no finite number."""
        task, device = self._task, self._processes.device
        if device.type != "cpu":
            batches = [moved(batch, device) for batch in batches]
        lr = learning_rate(self._config.optimizer, step, self._config.steps)
        found = list(_backward(self._state, batches, step))
        updated = _update(self._state, lr)
        if skipped := bool(updated["skipped"]):
            bad = not all(_finite(value) for parts in found for value in parts.values())
        else:
            self._state.ema.update(step)
            bad = False
        seeking = "loss_scale" in updated  # fp16 skips steps until it has found its scale
        if not seeking:
            self._guard.saw(step + 1, skipped=skipped, bad=bad, clips=lambda: self._names(step))
        # What a skipped step says would make the means of its interval no numbers either.
        log.add(*([] if skipped and not seeking else found), updated)
        counts = (task.samples, task.tokens, task.flops)
        log.count(*(sum(map(count, batches)) / self._processes.sequence for count in counts))

    def _names(self, step: int) -> list[str]:
        """The clips of this process in a step."""
        return [name for index, slices in self._slices() for name in self._task.names(step, index, slices)]

    def _between(self, done: int, log: Log, terminated: list[int]) -> bool:
        """Write the log, checkpoint and preview that are due after `done` steps; whether to end here."""
        config, checkpoints = self._config, self._checkpoints
        last = done == config.steps
        held_out: Parts = {}
        if config.validation.every and done % config.validation.every == 0:
            self._watch.at(f"the held-out clips of step {done}")
            with log.pause():
                held_out = validate(self._task, self._state.engine, self._state.ema)
        if done % config.log_every == 0 or last:
            log.write(done, held_out, lr=learning_rate(config.optimizer, done - 1, config.steps))
        ending, writing = any_of([bool(terminated), not checkpoints.idle], self._processes)
        with log.pause():
            if not writing:
                checkpoints.finish()
            if done % config.checkpoint_every == 0 or last or ending:
                self._watch.at(f"the checkpoint of step {done}")
                checkpoints.save(done, log.pending())
            if config.preview_every and done % config.preview_every == 0:
                self._watch.at(f"the preview of step {done}")
                preview(self._task, self._state.engine, self._state.ema,
                        self._folder / "previews" / f"{done:08d}", done)  # fmt: skip
        return ending


def _backward(state: State, batches: list[Any], step: int) -> Iterator[Parts]:
    """Gradients of the model, and of its adversary unless that rests; the figures of each part."""
    adversary = state.adversary
    for batch in batches:
        if adversary is not None:
            adversary.model.requires_grad_(False)
        found = state.engine.backward(batch, step)
        assert found is not None, "a task's own loss never rests"
        yield _figures(found)
        if adversary is not None:
            adversary.model.requires_grad_(True)
            if (against := adversary.backward(batch, found.output, step)) is not None:
                yield {f"discriminator_{key}": value for key, value in _figures(against).items()}


def _update(state: State, lr: float) -> Parts:
    """One optimizer step of whatever has gradients; `skipped` where that of either had no finite norm."""
    updated = state.engine.update(lr)
    if state.adversary is not None and state.adversary.working:
        against = state.adversary.update(lr)
        updated["skipped"] = max(updated["skipped"], against["skipped"])
    return updated


def _finite(value: float | Tensor) -> bool:
    return bool(torch.as_tensor(value).isfinite().all())


def _figures(found: Loss) -> Parts:
    return {"loss": found.total, **found.parts}
