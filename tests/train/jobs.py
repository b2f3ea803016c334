"""What the processes of the training tests run: a toy task through the real command, loop and engine."""

import signal

# Imported once, before the fork: torch's first optimizer imports its compiler, which takes seconds.
import torch._dynamo
import torch.utils.tensorboard  # noqa: F401

import train.checkpoint
import train.engine
import train.loop  # noqa: F401
from configs import load
from tests.train.held import held  # noqa: F401
from tests.train.parallel_jobs import compiled, sequence, sharded  # noqa: F401
from tests.train.toys import Toy
from train.__main__ import guard, main, run
from train.config import RunConfig


def toy(sources, adversarial=False, pause=0.0, width=23):
    """The train command with the toy in place of a real task; its exit code."""
    # A test run in the background inherits an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def build(config):
        return Toy(config, adversarial=adversarial, pause=pause, width=width)

    return guard(lambda: run(load(RunConfig, sources), build))


def command(arguments):
    """Any command of `python -m train`."""
    return main(arguments)


def full_disk(sources):
    """A run whose disk is full when it saves: files may not grow beyond 20 kB."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return toy(sources)
