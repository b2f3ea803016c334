"""A toy one of whose processes dies in its first start: `torchrun --max-restarts 1 -m tests.train.dying`."""

import os
import signal
import sys

from kinoflow.configs.schema import load
from kinoflow.train.__main__ import start
from kinoflow.train.run.config import RunConfig
from tests.train.toys import Toy


class Dying(Toy):
    """The second process is gone in its seventh step, until it is started again."""

    def loss(self, model, batch, step):
        if (step, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (6, "1", "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, batch, step)


if __name__ == "__main__":
    sys.exit(start(load(RunConfig, sys.argv[1:]), Dying))
