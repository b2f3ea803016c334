"""What the processes of the training tests run: a toy task through the real command, loop and engine."""

import gc
import signal

# Imported once, before the fork: torch's first optimizer imports its compiler, and the first under ZeRO
# another optimizer that is compiled. Either takes every process seconds.
import deepspeed.runtime.zero.muon.muon_optimizer
import torch._dynamo
import torch.utils.tensorboard  # noqa: F401
from deepspeed.accelerator import get_accelerator

import kinoflow.train.run.checkpoint
import kinoflow.train.run.engine
import kinoflow.train.run.loop
from kinoflow.configs.errors import run
from kinoflow.configs.schema import load
from kinoflow.train.__main__ import main, start
from kinoflow.train.mini import judge, strict, text
from kinoflow.train.run.config import RunConfig
from kinoflow.train.tasks import flow_task, precompute, tae  # noqa: F401
from tests.train.held import held  # noqa: F401
from tests.train.parallel_jobs import compiled, sequence, sharded, summed  # noqa: F401
from tests.train.real_jobs import adapted, trained  # noqa: F401
from tests.train.tiny import tiny_encoders
from tests.train.toys import Toy

# For the same reason: what DeepSpeed and the configuration find out at their first use, and garbage that no
# process needs to look through again.
_ = deepspeed.ops.__compatible_ops__
load(RunConfig, [])
gc.freeze()


def toy(sources, adversarial=False, pause=0.0, width=23, spoiled=()):
    """The train command with the toy in place of a real task; its exit code."""
    # A test run in the background inherits an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def build(config):
        return Toy(config, adversarial=adversarial, pause=pause, width=width, spoiled=spoiled)

    return run(lambda: start(load(RunConfig, sources), build), "kinoflow train")


def toys(cases):
    """Runs of the toy in one process group: of each its sources, and how the toy is made."""
    get_accelerator().is_fp16_supported = lambda: True  # most CPUs only have no fast kernels for it
    processes = kinoflow.train.run.engine.start(1)
    try:
        for sources, how in cases:
            config = load(RunConfig, sources)
            assert kinoflow.train.run.loop.train(Toy(config, **how), config, processes) == 0
        return 0
    finally:
        kinoflow.train.run.engine.stop()


def command(arguments):
    """Any command of `python -m kinoflow.train`."""
    return main(arguments)


def line(arguments):
    """The same for a line of a page: what does not shrink by any key is made small."""
    text._CORPUS, judge._NUM_VALIDATION = 300, 2
    strict._NUM_VALIDATION, strict._NUM_SETTLING = 2, 1
    return main(arguments)


def full_disk(sources):
    """A run whose disk is full when it saves: files may not grow beyond 8 kB."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))
    return toy(sources)


def precomputed(folder, bucket="1x16x16@16", source="world", *more):
    """Eight clips of the world in four shards, by what processes there are."""
    words = [
        f"out={folder}",
        f"source={source}",
        "clips=8",
        "shard_size=2",
        "workers=0",
        f"buckets=[{bucket}]",
        *more,
    ]
    precompute.precompute(load(precompute.PrecomputeConfig, words), tiny_encoders())
    return 0
