"""The training loop beside a bare one: `python tests/bench/training.py [--json]`.

Tokens a second of the transformer of configs/models/dit_mini.yaml on latents of 32x128x128 pixels: by the
loop (batches from shards, DeepSpeed, averages, log, watch, the agreement of every step) and by forward,
backward, clipping and AdamW on batches that are there already. Steps take turns, so that both meet the same
machine; medians, and the median of the pairs' ratios. Also how long a step waits for its batch, and how long
a checkpoint holds the run, as a share of the 500 steps between two.
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

BUCKET, TOKENS, SKIPPED, BETWEEN = "32x128x128@16", 256, 2, 500


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


class Bare:
    """Plain steps: forward, backward, clipping and AdamW on batches that are there already."""

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        self._config, self._task = config, FlowTask(config)
        self._task.prepare(Spread(config=config, processes=processes))
        self._model = self._task.model.train()
        self._optimizer = adamw(self._model, config.optimizer)
        self._batches = [self._task.batch(step, 0, 1) for step in range(config.steps)]

    @torch.enable_grad()
    def seconds(self, step: int) -> float:
        """Of one step."""
        begin = time.perf_counter()
        self._task.loss(self._model, self._batches[step], step).total.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), self._config.optimizer.grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return time.perf_counter() - begin


def both(config: RunConfig, processes: Processes) -> dict[str, list[float]]:
    """Of each step of the loop its seconds, those of a plain one right after it, and the wait for its batch.

    The plain step is made where a preview would be, whose time the log leaves out.
    """
    bare, plain, held = Bare(config, processes), [], []
    save = checkpoint.Checkpoints.save

    def timed(self: Any, *arguments: Any) -> None:
        begin = time.perf_counter()
        save(self, *arguments)
        held.append(time.perf_counter() - begin)

    def preview(*arguments: Any) -> None:
        plain.append(bare.seconds(arguments[-1] - 1))

    with (
        mock.patch.object(checkpoint.Checkpoints, "save", timed),
        mock.patch.object(loop, "preview", preview),
    ):
        assert loop.train(FlowTask(config), config, processes) == 0
    lines = [json.loads(line) for line in Path(config.run, "log.jsonl").read_text().splitlines()]
    return {
        "seconds": [config.data.batch_size / line["samples_per_second"] for line in lines][SKIPPED:],
        "bare_seconds": plain[SKIPPED:],
        "data_wait": [line["data_wait"] for line in lines][SKIPPED:],
        "checkpoint_hold": held,
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    mini = load(RunConfig, ["configs/models/dit_mini.yaml"]).dit
    latents(folder / "latents", mini.text_widths, mini.latent_channels)
    processes = engine.start(options.threads)
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "steps": options.steps}
    try:
        for stage in (0, 1):
            words = ["configs/models/dit_mini.yaml", f"data.latents={folder / 'latents'}", "log_every=1",
                     f"steps={options.steps}", f"data.batch_size={options.batch}", "preview_every=1",
                     f"deepspeed.zero_stage={stage}", f"checkpoint_every={options.steps}",
                     f"run={folder / str(stage)}"]  # fmt: skip
            times = both(load(RunConfig, words), processes)
            pairs = zip(times["bare_seconds"], times["seconds"], strict=True)
            ratio = statistics.median(plain / own for plain, own in pairs)
            middle = {key: statistics.median(values) for key, values in times.items()}
            found[f"zero{stage}"] = {
                "tokens_per_second": options.batch * TOKENS / middle["seconds"],
                "bare_tokens_per_second": options.batch * TOKENS / middle["bare_seconds"],
                "ratio": ratio,
                "data_wait_share": middle["data_wait"] / middle["seconds"],
                "checkpoint_hold": middle["checkpoint_hold"],
                "checkpoint_share": middle["checkpoint_hold"] / (BETWEEN * middle["seconds"]),
            }
    finally:
        engine.stop()
    return found


def main(arguments: list[str]) -> None:
    """Measure both in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--steps", type=int, default=24, help="of each (default: 24)")
    parser.add_argument("--batch", type=int, default=8, help="clips of a step (default: 8)")
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
