"""Every task on a device that is not the CPU: a step, its adversary, a preview, an export, precomputation."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kinoflow.configs.schema import load
from kinoflow.data.latents.shards import LatentDataset
from kinoflow.dit_video import VideoDiT
from kinoflow.tae import TAE
from kinoflow.tae.training.perceptual import PerceptualDistance
from kinoflow.train.run.batches import moved
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.processes import Processes
from kinoflow.train.run.spread import Spread
from kinoflow.train.tasks.flow_task import FlowTask
from kinoflow.train.tasks.precompute import PrecomputeConfig, load_encoders, precompute
from kinoflow.train.tasks.tae import TAETask
from tests.standin import DEVICE, Accelerator
from tests.train.test_tae import SOURCES
from tests.train.tiny import BUCKET, DIT, write_release

ALONE = Processes(rank=0, size=1, device=DEVICE)


def test_the_stand_in_refuses_two_devices():
    with Accelerator():
        here, there = torch.ones(2), torch.ones(2, device=DEVICE)
        with pytest.raises(RuntimeError, match="tensors on cpu and meta"):
            _ = here + there
        assert (here.to(DEVICE) + there).cpu().tolist() == [0, 0]
        assert float((here.to(DEVICE) + there).sum()) == 0.5


def spread(config: RunConfig, processes: Processes = ALONE) -> Spread:
    return Spread(config=config, processes=processes)


def test_the_autoencoder(tmp_path, monkeypatch):
    class Distance(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3, 1, 1, 1))

        def forward(self, video: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return (self.weight * (video - target)).square().mean()

    monkeypatch.setattr(PerceptualDistance, "from_file", lambda _: Distance())
    config = load(RunConfig, [*SOURCES, f"run={tmp_path}", "loss.perceptual=1"])
    task = TAETask(config)
    assert task.discriminator is not None
    task.prepare(spread(config))
    with Accelerator():
        model, critic = task.model.to(DEVICE), task.discriminator.to(DEVICE)
        step = config.loss.adversarial_start
        batch = moved(task.batch(step, 0, 1), DEVICE)
        found = task.loss(model, batch, step)
        assert set(found.parts) >= {"generator", "perceptual"}
        assert found.total.device == DEVICE
        found.total.backward()
        against = task.discriminator_loss(critic, batch, found.output, step)
        assert against is not None
        against.total.backward()
        task.preview(model, tmp_path, step, ALONE)
        task.export(TAETask(config).model.state_dict(), tmp_path)
    assert (tmp_path / "reconstructions.png").is_file()
    assert TAE.from_pretrained(tmp_path / "tae").config.latent_std is not None


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """The frozen parts of a release: an autoencoder and three text encoders."""
    return write_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def latents(release, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    words = [
        f"out={folder}",
        "source=world",
        "clips=4",
        "workers=0",
        f"buckets=[{BUCKET}]",
        f"release={release}",
    ]
    config = load(PrecomputeConfig, words)
    precompute(config, load_encoders(config))
    return folder


def test_the_backbone(release, latents, tmp_path):
    config = load(RunConfig, [
        *DIT, f"run={tmp_path}", f"data.latents={latents}", f"release={release}", "data.batch_size=2",
        "dit.depth=2", "dit.max_tokens=[4,8,8]", "preview_every=1",
    ])  # fmt: skip
    task = FlowTask(config)
    # The stand-in has no values to start from.
    task.prepare(spread(config, replace(ALONE, device=torch.device("cpu"))))
    with Accelerator():
        model = task.model.to(DEVICE)
        found = task.loss(model, moved(task.batch(0, 0, 1), DEVICE), 0)
        found.total.backward()
        assert found.total.device == DEVICE
        task.preview(model, tmp_path, 1, ALONE)
        values = {name: torch.ones(value.shape) for name, value in model.state_dict().items()}
        task.export(SimpleNamespace(read=lambda names, _: {name: values[name] for name in names}), tmp_path)
    assert (tmp_path / "samples.png").is_file()
    assert VideoDiT.from_pretrained(tmp_path / "dit").head.weight.eq(1).all()


def test_precomputation(release, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for the stand-in
    words = [
        f"out={tmp_path / 'out'}",
        "source=world",
        "clips=2",
        "workers=0",
        f"buckets=[{BUCKET}]",
        f"release={release}",
    ]
    config = load(PrecomputeConfig, words)
    encoders = load_encoders(config)
    there = replace(encoders, tae=encoders.tae.to(DEVICE), text=encoders.text.to(DEVICE), device=DEVICE)
    with Accelerator():
        precompute(config, there)
    batch = LatentDataset(tmp_path / "out").get(BUCKET, np.arange(2), np.zeros(2, np.int64))
    assert batch.latent.shape[0] == 2
