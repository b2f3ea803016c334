"""The flow loss of clips that are not trained on, at fixed noise and times.

`kinoflow train validate RELEASE LATENTS` says it of a release; a run with `validation.latents=` watches it.
Movie Gen (section 3.4) chooses by it: it follows what people prefer, and falls where the loss of the
training is too noisy to show it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kinoflow.configs.devices import parse_device
from kinoflow.configs.errors import UserError
from kinoflow.configs.files import seeded
from kinoflow.data.latents.shards import LatentDataset
from kinoflow.dit_video.flow.known import shown_everywhere
from kinoflow.dit_video.flow.matching import FlowConfig
from kinoflow.sample.release import Release
from kinoflow.train.run.batches import moved
from kinoflow.train.run.config import ValidationConfig
from kinoflow.train.run.log import SHARE
from kinoflow.train.run.processes import Processes, from_all
from kinoflow.train.run.task import Parts
from kinoflow.train.tasks.flow import FlowBatch, by_quarter, condition_of, flow_loss
from kinoflow.train.tasks.precompute import made_with

USAGE = """usage: kinoflow train validate RELEASE LATENTS [--json]

  RELEASE  folder or hub id of a release, whose backbone is asked
  LATENTS  folder of `kinoflow train precompute`, of clips not trained on (source=world:heldout, or
           a list of your own), made with the release's own autoencoder and text encoders

Prints the flow loss of 64 of its clips, evenly over it (all, where there are fewer), at noise and times that
are the same at every call, and of each quarter of the times (0 is noise alone, 1 the clip). Models that share
an autoencoder can be compared by it: the lower, the better."""
_TIMES = 8  # of each clip: the middles of as many equal parts of [0, 1]


class HeldOut:
    """Batches that are the same in every run: `clips` of a folder, evenly over it, each at eight times."""

    def __init__(self, folder: str | Path, clips: int, batch_size: int) -> None:
        self.latents = LatentDataset(folder)
        ends = np.cumsum([0, *map(self.latents.num_clips, self.latents.buckets)])
        chosen = np.unique(np.linspace(0, ends[-1] - 1, min(clips, ends[-1])).round().astype(int))
        self._batches: list[tuple[str, list[tuple[int, int]]]] = []
        for name, begin, end in zip(self.latents.buckets, ends, ends[1:], strict=False):
            own = chosen[(chosen >= begin) & (chosen < end)] - begin
            items = [(clip, part) for clip in own.tolist() for part in range(_TIMES)]
            self._batches += [(name, items[i : i + batch_size]) for i in range(0, len(items), batch_size)]

    def require(
        self, encoders: Mapping[str, str], classes: Sequence[str], whose: str, upsample: int = 0
    ) -> None:
        """Refuse latents of another autoencoder, states of other text encoders, other classes, than `whose`.

        Those of an upsampler are for upsamplers of the same scale.

        Raises:
            UserError: they are.
        """
        for part, name in (("tae", "autoencoder"), ("text", "text encoders")):
            if self.latents.index.made_from[part] != encoders[part]:
                raise UserError(f"{self.latents.folder}: made with another {name} than {whose}; precompute it"
                                " with the same release=")  # fmt: skip
        if self.latents.index.upsample != upsample:
            raise UserError(f"{self.latents.folder}: made with upsample={self.latents.index.upsample}, and "
                            f"{whose} with upsample={upsample}; precompute it with the same")  # fmt: skip
        if tuple(classes) != self.latents.index.classes:
            raise UserError(f"{self.latents.folder}: has other classes than {whose}; precompute both of the "
                            "same")  # fmt: skip

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> FlowBatch:
        """Latents with their first caption or their label, which are never dropped."""
        name, items = self._batches[index]
        clips = np.array([clip for clip, _ in items])
        found = self.latents.get(name, clips, np.zeros_like(clips))
        noise = [_noise(found.latent[0].shape, name, *item) for item in items]
        return FlowBatch(
            latent=found.latent,
            noise=torch.stack(noise),
            time=torch.tensor([(part + 0.5) / _TIMES for _, part in items]),
            condition=condition_of(found, len(self.latents.index.classes)),
            dropout=torch.tensor(0),
            known=None if found.smaller is None else shown_everywhere(found.smaller),
        )


def _noise(shape: torch.Size, name: str, clip: int, part: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seeded("held out", name.partition(" ")[0], clip, part))
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: HeldOut, flow: FlowConfig, processes: Processes) -> Parts:
    """`validation_loss`, and the same by quarter of the times; the batches are shared out among replicas.

    Every process calls it: under ZeRO-3 all must compute as often.
    """
    replica, replicas = processes.replica, processes.replicas
    sums: dict[str, float] = {}
    for index in range(replica, -(-len(batches) // replicas) * replicas, replicas):
        batch = moved(batches[index % len(batches)], processes.device)
        loss = flow_loss(model, batch, flow)
        figures = {"loss": loss.mean(), "loss" + SHARE: 1.0, **by_quarter(loss, batch.time)}
        for key, value in figures.items() if index < len(batches) else ():
            sums[key] = sums.get(key, 0.0) + float(value) * len(loss)
    every = from_all(sums, processes)
    total = {key: sum(part.get(key, 0.0) for part in every) for part in every for key in part}
    return {
        f"validation_{key}": value / total[key + SHARE]
        for key, value in total.items()
        if not key.endswith(SHARE)
    }


def main(words: Sequence[str]) -> int:
    """Print the held-out loss of a release; 0.

    Raises:
        UserError: not a release and a folder, or latents of other encoders.
    """
    places = [word for word in words if word != "--json"]
    if len(places) != 2:
        raise UserError(f"validate: name a release and latents: {USAGE.splitlines()[0]}")
    release, folder = Release.load(places[0]), places[1]
    processes = Processes(rank=0, size=1, device=parse_device("auto"))
    found = held_out_loss(*_asked(release, folder, processes), processes)
    print(json.dumps(found) if "--json" in words else _text(found))
    return 0


def _asked(release: Release, folder: str, processes: Processes) -> tuple[nn.Module, HeldOut, FlowConfig]:
    batches = HeldOut(folder, ValidationConfig().clips, batch_size=_TIMES)
    classes, tae = release.config.classes, None if release.config.pixels else release.tae()
    encoders = made_with(release.text_holder, tae, labelled=bool(classes))
    batches.require(encoders, classes, str(release.folder), release.config.upsample.factor)
    trained = release.config.sampling
    flow = FlowConfig(path=trained.path, objective=trained.objective)
    return release.backbone(processes.device).eval(), batches, flow


def _text(found: Parts) -> str:
    rows = [("flow loss", found.pop("validation_loss"))]
    for key, value in found.items():
        low, high = key.removeprefix("validation_loss_").split("_")
        rows.append((f"at times {int(low) / 100:g} to {int(high) / 100:g}", value))
    return "\n".join(f"{name:24}  {value:.5f}" for name, value in rows)
