"""`kinoflow tae` with a tiny autoencoder, as the tests of its commands call it."""

import json
from pathlib import Path

import pytest
import torch

from kinoflow.tae import TAE
from kinoflow.tae.__main__ import main
from tests.tae.mutating import TINY


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = TAE(TINY)
    model.init_weights()
    folder = tmp_path_factory.mktemp("weights")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys, weights):
    """Runs a command; its figures, or after a user's mistake what stderr says."""

    def command(*words: object, status: int = 0) -> dict:
        model = [] if words[0] == "info" else ["--weights", str(weights)]
        if words[0] == "reconstruct" and "--perceptual" not in words:
            model += ["--perceptual", "0"]
        assert main([*map(str, words), *model, "--json"]) == status
        said = capsys.readouterr()
        return {"error": said.err} if status == 2 else json.loads(said.out)

    return command
