"""What the processes of test_processes.py run."""

import io
import json
import os
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import astuple
from pathlib import Path

import torch

import kinoflow.sample.again
import kinoflow.sample.pipeline  # noqa: F401
from kinoflow.conditioning.labels import LabelEncoder
from kinoflow.configs.launch import current
from kinoflow.sample.__main__ import main
from kinoflow.sample.cache import Passes
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.processes import Shared, together
from kinoflow.sample.release import Release
from kinoflow.sample.request import ClipRequest
from tests.sample.conftest import HashEncoder

PROMPT = "a red star moves left"


def begin(what, rank, size, ports, *arguments):
    """One process of `size`, as torchrun starts it."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0]}
    sys.exit(
        {"latents": latents, "commands": commands, "dying": dying, "leaving": leaving}[what](
            ports, *arguments
        )
    )


def encoder(self, text_cache=None, device="cpu"):
    """In the place of a release's own."""
    return LabelEncoder(self.config.classes) if self.config.classes else HashEncoder()


def latents(_, cases, out):
    """What `made` gives for each of `cases`; the first process saves it."""
    Release.encoder = encoder

    def command(team):
        torch.save({name: made(*case, team) for name, case in cases.items()}, out)
        return 0

    return together(current(), command)


def made(folder, settings, team=None):
    """A latent and its passes, by the processes of a team or by this one alone."""
    pipeline, passes = Pipeline(Release.load(folder), team=team), Passes()
    return pipeline.latent(pipeline.plan(ClipRequest(**settings)), None, passes), astuple(passes)


def commands(ports, lines, folder):
    """Each line as a command; what each process said, as JSON."""
    os.chdir(folder)
    for number, (port, words) in enumerate(zip(ports, lines, strict=True)):
        os.environ["MASTER_PORT"] = port
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            try:
                code = main(words)
            except SystemExit as stop:
                code = stop.code
        said = json.dumps([code, out.getvalue(), err.getvalue()])
        Path(f"{number}.{os.environ['RANK']}.json").write_text(said)
    return 0


def dying(_, who, words):
    """A command in which the process `who` is killed at the second call of the backbone."""
    part, calls = Shared.part, []

    def counted(self, *given):
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == str(who):
            os.kill(os.getpid(), signal.SIGKILL)
        return part(self, *given)

    Shared.part = counted
    return main(words)


def leaving(_, folder):
    """The first process ends at once in the midst of a clip, as a server does that is stopped."""
    Release.encoder = encoder

    def command(team):
        def leave(_):
            team.end(at_once=True)
            os._exit(0)

        pipeline = Pipeline(Release.load(folder), team=team)
        pipeline(PROMPT, steps=2, progress=leave)
        return 1

    return together(current(), command)
