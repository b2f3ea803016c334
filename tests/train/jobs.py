"""What the processes of the training tests run: a toy task through the real command, loop and engine."""

import signal

# Imported once, before the fork: torch's first optimizer imports its compiler, and DeepSpeed's first ZeRO
# optimizer the rest of it, which takes seconds.
import torch._dynamo
import torch._inductor.compile_fx
import torch.utils.tensorboard  # noqa: F401

import kinoflow.train.run.checkpoint
import kinoflow.train.run.engine
import kinoflow.train.run.loop  # noqa: F401
from kinoflow.configs.errors import run
from kinoflow.configs.schema import load
from kinoflow.train.__main__ import main, start
from kinoflow.train.run.config import RunConfig
from tests.train.held import held  # noqa: F401
from tests.train.parallel_jobs import compiled, sequence, sharded, summed  # noqa: F401
from tests.train.real_jobs import trained  # noqa: F401
from tests.train.toys import Toy


def toy(sources, adversarial=False, pause=0.0, width=23):
    """The train command with the toy in place of a real task; its exit code."""
    # A test run in the background inherits an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def build(config):
        return Toy(config, adversarial=adversarial, pause=pause, width=width)

    return run(lambda: start(load(RunConfig, sources), build), "kinoflow train")


def command(arguments):
    """Any command of `python -m kinoflow.train`."""
    return main(arguments)


def full_disk(sources):
    """A run whose disk is full when it saves: files may not grow beyond 20 kB."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return toy(sources)


def precomputed(folder, bucket="1x16x16@16"):
    """Eight clips of the world in four shards, by what processes there are."""
    from kinoflow.train.tasks.precompute import PrecomputeConfig, precompute
    from tests.train.tiny import tiny_encoders

    words = [f"out={folder}", "source=world", "clips=8", "shard_size=2", f"buckets=[{bucket}]"]
    precompute(load(PrecomputeConfig, words), tiny_encoders())
    return 0
