"""What a stage change and an export take at their peak, beside what each process keeps.

    python tests/bench/stage_change.py [--depth 14] [--precision bf16]

Two gloo processes under ZeRO-3 go on from a release of about a gigabyte of fp32 weights, make a step and a
checkpoint, which a third exports. Peaks are of the processes' resident memory (VmHWM, reset before); `base`
is what Python, torch and DeepSpeed take when they are loaded. One JSON line.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
import torch.multiprocessing as mp


def resident() -> dict[str, int]:
    """Bytes resident now and at the peak since the last reset; pages of mapped files left out."""
    status = Path("/proc/self/status").read_text()
    found = {key: int(value) * 1024 for key, value in re.findall(r"(\w+):\s+(\d+) kB", status)}
    return {"now": found["VmRSS"], "anonymous": found["RssAnon"], "peak": found["VmHWM"]}


def reset() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def sources(depth: int, precision: str, folder: str) -> list[str]:
    return ["model=dit", "dit.width=1024", "dit.heads=8", "dit.ffn=2816", f"dit.depth={depth}",
            "dit.text_widths=[64]", "dit.max_tokens=[2,8,8]", "deepspeed.zero_stage=3", "data.batch_size=2",
            f"deepspeed.precision={precision}", f"init_from={folder}", f"run={folder}/run"]  # fmt: skip


def process(rank: int, port: int, words: list[str], folder: str) -> None:
    """A stage change: from the release to an engine with its average, and one step."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")  # fmt: skip
    from kinoflow.conditioning.embedding import TextEmbedding
    from kinoflow.configs.schema import load
    from kinoflow.train.run import engine
    from kinoflow.train.run.checkpoint import Checkpoints, State
    from kinoflow.train.run.config import RunConfig
    from kinoflow.train.run.ema import EMA
    from kinoflow.train.run.spread import Spread
    from kinoflow.train.tasks.flow import FlowBatch
    from kinoflow.train.tasks.flow_task import FlowTask

    config = load(RunConfig, words)
    processes = engine.start(1)
    base = resident()["now"]
    reset()
    task = FlowTask(config)
    task.prepare(Spread(config=config, processes=processes))
    prepared = resident()
    running = engine.Engine(task.model, task.loss, config, processes)
    ema = EMA(running.fragments(), 0.9)
    started = resident()
    text = TextEmbedding(hidden=torch.randn(1, 3, 64), mask=torch.ones(1, 3, dtype=torch.bool))
    latent = torch.randn(1, task.model.config.latent_channels, 1, 4, 4)
    batch = FlowBatch(
        latent=latent,
        noise=torch.randn_like(latent),
        time=torch.rand(1),
        condition=(text,),
        dropout=torch.tensor(0),
    )
    running.backward(batch, 0)
    running.update(1e-4)
    state = State(config=config, engine=running, adversary=None, ema=ema)
    with closing(Checkpoints(Path(config.run), state)) as checkpoints:
        checkpoints.save(1, {})
        checkpoints.finish()
    figures = {"base": base, "prepared": prepared, "started": started, "stepped": resident()}
    Path(folder, f"figures.{rank}.json").write_text(json.dumps(figures))
    engine.stop()


def export(_: int, words: list[str], folder: str) -> None:
    """The export of that run."""
    from kinoflow.configs.schema import load
    from kinoflow.train.run.averages import AveragedState
    from kinoflow.train.run.config import RunConfig
    from kinoflow.train.tasks.flow_task import FlowTask

    config = load(RunConfig, words)
    base = resident()["now"]
    reset()
    FlowTask(config).export(AveragedState(Path(config.run, "checkpoints", "00000001")), Path(folder, "out"))
    Path(folder, "figures.export.json").write_text(json.dumps({"base": base, "exported": resident()}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=14)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    options = parser.parse_args()
    from kinoflow.configs.schema import load
    from kinoflow.dit_video import VideoDiT
    from kinoflow.train.run.config import RunConfig

    folder = tempfile.mkdtemp(prefix="stage-", dir=".")
    try:
        words = sources(options.depth, options.precision, folder)
        model = VideoDiT(replace(load(RunConfig, words[:-2]).dit, max_tokens=(1, 4, 4)))
        model.init_weights()
        weights = sum(p.numel() for p in model.parameters())
        block = sum(p.numel() for p in model.blocks[0].parameters())
        model.save_pretrained(f"{folder}/dit")
        del model
        mp.spawn(process, (29741, words, folder), nprocs=2)
        mp.spawn(export, (words, folder), nprocs=1)
        found = {
            name: json.loads(Path(folder, f"figures.{name}.json").read_text())
            for name in ("0", "1", "export")
        }
    finally:
        shutil.rmtree(folder)
    print(json.dumps({"parameters": weights, "block": block, "precision": options.precision, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
