"""The training loop beside a bare one: `python tests/bench/training.py [--json]`.

Tokens a second of the transformer of configs/models/dit_mini.yaml on latents of 32x128x128 pixels: by the
loop (batches from shards, DeepSpeed, averages, log, watch, the agreement of every step) and by forward,
backward, clipping and AdamW on batches that are there already. Rounds take turns; medians of steps. Also how
long a step waits for its batch, and how long a checkpoint holds the run, as a share of the 500 steps between
two.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
from torch import nn

from kinoflow.configs.schema import load
from kinoflow.data.latents import shards
from kinoflow.train.run import checkpoint, engine, loop
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.optimizer import adamw
from kinoflow.train.run.processes import Processes
from kinoflow.train.run.spread import Spread
from kinoflow.train.tasks.flow_task import FlowTask

BUCKET, SKIPPED, BETWEEN = "32x128x128@16", 2, 500


def latents(folder: Path, widths: tuple[int, ...], channels: int) -> None:
    """Sixteen clips of noise with captions of twenty tokens."""
    rng = np.random.default_rng(0)
    index = shards.LatentIndex(
        buckets={BUCKET: 16}, shard_size=16, captions_per_clip=1, widths=widths, made_from={"tae": "noise"},
        latent_mean=(0.0,) * channels, latent_std=(1.0,) * channels,
    )  # fmt: skip
    shards.begin(folder, index, [rng.normal(size=(1, width)) for width in widths])
    texts = [[rng.normal(size=(20, width)) for _ in range(16)] for width in widths]
    content = shards.Shard(latent=rng.normal(size=(16, channels, 4, 16, 16)).astype(np.float16), texts=texts,
                           captions=[["noise"]] * 16)  # fmt: skip
    shards.write_shard(folder, BUCKET, 0, content)


def bare(config: RunConfig, processes: Processes) -> float:
    """Tokens a second of the plain steps."""
    task = FlowTask(config)
    task.prepare(Spread(config=config, processes=processes))
    model, optimizer = task.model.train(), adamw(task.model, config.optimizer)
    batches = [task.batch(step, 0, 1) for step in range(config.steps)]
    seconds = []
    for step, batch in enumerate(batches):
        begin = time.perf_counter()
        task.loss(model, batch, step).total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
    return task.tokens(batches[0]) / statistics.median(seconds[SKIPPED:])


def ours(config: RunConfig, processes: Processes) -> dict[str, float]:
    """Tokens a second of the loop, seconds a step waits for data, seconds that a checkpoint holds it."""
    held: list[float] = []
    save = checkpoint.Checkpoints.save

    def timed(self: Any, *arguments: Any) -> None:
        begin = time.perf_counter()
        save(self, *arguments)
        held.append(time.perf_counter() - begin)

    with mock.patch.object(checkpoint.Checkpoints, "save", timed):
        assert loop.train(FlowTask(config), config, processes) == 0
    lines = [json.loads(line) for line in Path(config.run, "log.jsonl").read_text().splitlines()][SKIPPED:]
    median = {
        key: statistics.median(line[key] for line in lines) for key in ("tokens_per_second", "data_wait")
    }
    return median | {"checkpoint_hold": held[-1]}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    mini = load(RunConfig, ["configs/models/dit_mini.yaml"]).dit
    latents(folder / "latents", mini.text_widths, mini.latent_channels)
    processes = engine.start(options.threads)
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "steps": options.steps}
    try:
        for stage in (0, 1):
            plain, product = [], []
            for turn in range(options.repeats):
                run = folder / f"{stage}-{turn}"
                words = ["configs/models/dit_mini.yaml", f"data.latents={folder / 'latents'}", "log_every=1",
                         f"steps={options.steps}", f"data.batch_size={options.batch}",
                         f"deepspeed.zero_stage={stage}", f"checkpoint_every={options.steps}",
                         f"run={run}"]  # fmt: skip
                config = load(RunConfig, words)
                plain.append(bare(config, processes))
                product.append(ours(config, processes))
            middle = {key: statistics.median(each[key] for each in product) for key in product[0]}
            rate, step = statistics.median(plain), options.batch * 256 / middle["tokens_per_second"]
            found[f"zero{stage}"] = middle | {
                "bare_tokens_per_second": rate,
                "ratio": middle["tokens_per_second"] / rate,
                "data_wait_share": middle["data_wait"] / step,
                "checkpoint_share": middle["checkpoint_hold"] / (BETWEEN * step),
            }
    finally:
        engine.stop()
    return found


def main(arguments: list[str]) -> None:
    """Measure both in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--steps", type=int, default=8, help="of a round (default: 8)")
    parser.add_argument("--batch", type=int, default=8, help="clips of a step (default: 8)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each (default: 3)")
    parser.add_argument("--threads", type=int, default=None, help="of torch (default: its own)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    if options.json:
        print(json.dumps(figures))
        return
    for name in ("zero0", "zero1"):
        row = figures[name]
        print(f"{name}: {row['tokens_per_second']:.0f} tokens/s, {row['ratio']:.3f} x the bare loop")
        print(
            f"  waits for data {row['data_wait_share']:.2%} of a step; a checkpoint holds it "
            f"{row['checkpoint_hold']:.3f} s: {row['checkpoint_share']:.3%} of {BETWEEN} steps"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
