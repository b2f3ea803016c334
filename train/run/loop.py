"""The training loop of every task."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from kinoflow.data.prefetch import prefetch
from kinoflow.train.run import checkpoint
from kinoflow.train.run.batches import moved, pinned
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.ema import EMA
from kinoflow.train.run.engine import Engine
from kinoflow.train.run.log import Log
from kinoflow.train.run.optimizer import learning_rate
from kinoflow.train.run.preview import preview
from kinoflow.train.run.processes import Processes, agree, termination
from kinoflow.train.run.record import record
from kinoflow.train.run.spread import Spread
from kinoflow.train.run.task import Loss, Parts, Task

PREEMPTED = 143  # 128 + SIGTERM


def train(task: Task, config: RunConfig, processes: Processes) -> int:
    """Train to config.steps from the run folder's newest checkpoint; 0, or 143 when SIGTERM ended it.

    Raises:
        UserError: something of the task is missing, or the run folder belongs to another run.
    """
    folder = Path(config.run)
    task.prepare(Spread(config=config, processes=processes))
    engine = Engine(task.model, task.loss, config, processes)
    adversary = None
    if task.discriminator is not None:
        adversary = Engine(task.discriminator, task.discriminator_loss, config, processes)
    ema = EMA(engine.fragments(), config.ema_decay)
    state = checkpoint.State(config=config, engine=engine, adversary=adversary, ema=ema)
    begin, pending = checkpoint.resume(folder, state)
    if processes.rank == 0:
        record(config, folder)  # a folder that refuses to resume keeps what it says of itself
    slices, own = config.deepspeed.accumulation, processes.replica * config.deepspeed.accumulation

    def batches(step: int) -> list[Any]:
        made = [task.batch(step, own + i, processes.replicas * slices) for i in range(slices)]
        return [pinned(batch) for batch in made] if processes.device.type == "cuda" else made

    log = Log(folder, device=processes.device, rank=processes.rank, processes=processes.size, start=begin,
              steps=config.steps, pending=pending)  # fmt: skip
    counts = (task.samples, task.tokens, task.flops)
    prepared = prefetch(batches, range(begin, config.steps), config.data.workers)
    with log, closing(prepared), termination() as terminated:
        for step, local in enumerate(prepared, begin):
            done, lr = step + 1, learning_rate(config.optimizer, step, config.steps)
            if processes.device.type != "cpu":
                local = [moved(batch, processes.device) for batch in local]  # noqa: PLW2901
            log.add(*_optimize(state, local, step, lr))
            ema.update(step)
            log.count(*(sum(map(count, local)) / processes.sequence for count in counts))
            if done % config.log_every == 0 or done == config.steps:
                log.write(done, lr=lr)
            # Several ranks must stop at the same step: they ask each other where they meet anyway.
            meeting = processes.size == 1 or done % config.log_every == 0
            ending = meeting and agree(bool(terminated), processes)
            if done % config.checkpoint_every == 0 or done == config.steps or ending:
                checkpoint.save(folder, state, done, log.pending())
            if config.preview_every and done % config.preview_every == 0:
                preview(task, engine, ema, folder / "previews" / f"{done:08d}", done)
            if ending and done < config.steps:
                return PREEMPTED
    return 0


def _optimize(state: checkpoint.State, batches: list[Any], step: int, lr: float) -> Iterator[Parts]:
    """One optimizer step of the model, and of its adversary unless that rests; the figures of each part."""
    adversary, resting = state.adversary, True
    for batch in batches:
        if adversary is not None:
            adversary.model.requires_grad_(False)
        found = state.engine.backward(batch, step)
        assert found is not None, "a task's own loss never rests"
        yield _figures(found)
        if adversary is not None:
            adversary.model.requires_grad_(True)
            against = adversary.backward(batch, found.output, step)
            resting = against is None
            if against is not None:
                yield {f"discriminator_{key}": value for key, value in _figures(against).items()}
    yield {"grad_norm": state.engine.update(lr)}
    if adversary is not None and not resting:
        adversary.update(lr)


def _figures(found: Loss) -> Parts:
    return {"loss": found.total, **found.parts}
