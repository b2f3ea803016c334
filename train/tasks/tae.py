"""One training step of the temporal autoencoder (Movie Gen, section 3.1.1)."""

import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import seeded
from kinoflow.configs.pretrained import part_folder
from kinoflow.data.clips.buckets import check_batches
from kinoflow.data.video.sheet import contact_sheet
from kinoflow.tae import TAE
from kinoflow.tae.codec.metrics import psnr
from kinoflow.tae.model.grow import Growth, grown
from kinoflow.tae.model.pixels import to_bytes
from kinoflow.tae.model.tae import Reconstruction
from kinoflow.tae.training.discriminator import PatchDiscriminator
from kinoflow.tae.training.losses import discriminator_hinge, generator_hinge, kl_loss, outlier_penalty
from kinoflow.tae.training.perceptual import PerceptualDistance
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.processes import Processes
from kinoflow.train.run.spread import Spread
from kinoflow.train.run.task import Loss, Parts
from kinoflow.train.tasks.clips import ClipSource

PREVIEW_CLIPS = 6
STATISTICS_CLIPS = 256


@dataclass(frozen=True, kw_only=True)
class TAEBatch:
    """RGB clips in [-1, 1] and the noise that the posterior is sampled with."""

    video: Float[Tensor, "b 3 frames height width"]
    noise: Float[Tensor, "b c t h w"]


class TAETask:
    """Reconstruction, KL, outlier, perceptual and adversarial terms, each where its weight is not zero."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        if config.init_from is None:
            model = TAE(config.tae)
            model.init_weights()
        else:
            model = TAE.from_pretrained(part_folder(config.init_from, "tae"))
            model = (model if config.grow == Growth() else grown(model, config.grow)).train()
            # DeepSpeed sends and flattens parameters as one run of memory; channels-last is for inference.
            model = model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        if config.freeze_encoder:
            for part in (model.encoder, model.to_latent):
                if part is not None:
                    part.requires_grad_(False)
        self.model: TAE = model
        self.discriminator: nn.Module | None = None
        if config.loss.adversarial > 0:
            self.discriminator = PatchDiscriminator(config.discriminator)
            self.discriminator.init_weights()
        self.clips = ClipSource(config.data, config.seed, Path(config.run) / "quarantine.jsonl")
        self.perceptual = None
        if config.loss.perceptual > 0:
            self.perceptual = PerceptualDistance.from_file(config.loss.perceptual_weights)

    def prepare(self, spread: Spread) -> None:
        """Tell of bad rows; compile the model, where the run wants it, which has its values already.

        Raises:
            UserError: processes that the clips of a bucket's batch do not divide among.
        """
        check_batches(self.clips.buckets, self.config.data.batch_size, spread.slices)
        for warning in self.clips.warnings if spread.processes.rank == 0 else ():
            print(f"warning: {warning}", file=sys.stderr)
        if self.perceptual is not None:
            self.perceptual.to(spread.processes.device)
        if self.config.parallel.compile:
            for part in (self.model.encoder, self.model.decoder):
                # A graph for each bucket. Not the sum of encoder and shortcut: inductor 2.13 writes the equal
                # gradients of its two biases into one C++ kernel that declares a name twice.
                part.compile(dynamic=False)

    @property
    def base(self) -> None:
        """Checkpoints hold a frozen encoder as well."""

    @property
    def source(self) -> str:
        """Of the clip list, or the toy world."""
        return self.clips.source

    def names(self, step: int, index: int, slices: int) -> list[str]:
        """Paths in the list, or numbers of the world's clips."""
        return self.clips.names(step, index, slices)

    def batch(self, step: int, index: int, slices: int) -> TAEBatch:
        video = self.clips.batch(step, index, slices)
        shape = self.model.config.latent_shape(*video.shape[2:])
        size = (shape.channels, shape.frames, shape.height, shape.width)
        positions = self.clips.positions(step, index, slices)
        seeds = (seeded("posterior", self.config.seed, position) for position in positions)
        noise = torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(s)) for s in seeds])
        return TAEBatch(video=video, noise=noise)

    def loss(self, model: nn.Module, batch: TAEBatch, step: int) -> Loss:
        weights = self.config.loss
        output = cast(Reconstruction, model(batch.video, batch.noise))
        terms = {
            "l1": (weights.l1, F.l1_loss(output.video, batch.video)),
            "l2": (weights.l2, F.mse_loss(output.video, batch.video)),
            "kl": (weights.kl, kl_loss(output.posterior)),
        }
        if weights.outlier > 0:
            terms["outlier"] = (weights.outlier, outlier_penalty(output.latent, weights.outlier_radius))
        if self.perceptual is not None:
            some = every_nth(batch.video.shape[2], weights.perceptual_every, step)
            distance = self.perceptual(output.video[:, :, some], batch.video[:, :, some])
            terms["perceptual"] = (weights.perceptual, distance)
        if self._adversarial(step) and self.discriminator is not None:
            terms["generator"] = (weights.adversarial, generator_hinge(self.discriminator(output.video)))
        return Loss(
            total=torch.stack([weight * value for weight, value in terms.values()]).sum(),
            parts={name: value for name, (_, value) in terms.items()},
            output=output.video.detach(),
        )

    def discriminator_loss(
        self, discriminator: nn.Module, batch: TAEBatch, output: Tensor | None, step: int
    ) -> Loss | None:
        if not self._adversarial(step):
            return None
        real, fake = discriminator(batch.video), discriminator(output)
        return Loss(total=discriminator_hinge(real, fake), parts={"real": real.mean(), "fake": fake.mean()})

    def _adversarial(self, step: int) -> bool:
        return self.config.loss.adversarial > 0 and step >= self.config.loss.adversarial_start

    def validate(self, model: nn.Module, processes: Processes) -> Parts:  # noqa: ARG002
        """Nothing: `kinoflow tae reconstruct` measures an autoencoder."""
        return {}

    def preview(self, model: nn.Module, folder: Path, step: int, processes: Processes) -> None:
        """A contact sheet of clips, the same at every preview, each above its reconstruction."""
        if processes.rank > 0 and self.config.deepspeed.zero_stage < 3:
            return
        clips = self.clips.shown(PREVIEW_CLIPS).to(next(model.parameters()).device)
        with torch.no_grad():
            output = cast(Reconstruction, model(clips)).video.clamp(-1, 1)
        rows: list[np.ndarray] = []
        captions = []
        for real, fake in zip(clips, output, strict=True):
            quality = psnr(*(video.add(1).div(2).transpose(0, 1) for video in (fake, real))).mean()
            rows += [to_bytes(real).cpu().numpy(), to_bytes(fake).cpu().numpy()]
            captions += ["clip", f"step {step}: {float(quality):.2f} dB"]
        if processes.rank == 0:
            contact_sheet(folder / "reconstructions.png", rows, columns=8, captions=captions)

    def close(self) -> None:
        """End the processes that read clips."""
        self.clips.close()

    def samples(self, batch: TAEBatch) -> int:
        """Clips of the batch."""
        return len(batch.video)

    def tokens(self, batch: TAEBatch) -> int:
        """Latent positions of the batch."""
        return batch.noise[:, 0].numel()

    def flops(self, batch: TAEBatch) -> float:  # noqa: ARG002
        """Not counted: discriminator and perceptual network would have to be."""
        return 0.0

    def export(self, state: Mapping[str, Tensor], folder: Path) -> None:
        """Write `folder`/tae in fp16 with per-channel latent statistics, which a frozen encoder keeps.

        Otherwise they are measured on training clips.
        """
        model = TAE(self.model.config)
        model.load_state_dict(state)
        if not self.config.freeze_encoder:
            with closing(self.clips):
                model = model.with_statistics(*latent_statistics(model.eval(), self.clips))
        model.save_pretrained(folder / "tae", dtype=torch.float16)


def every_nth(frames: int, every: int, step: int) -> slice:
    """Every `every`-th of the frames, at least one; in `every` steps each has been there."""
    return slice(step % min(every, frames), None, every)


@torch.no_grad()
def latent_statistics(model: TAE, clips: ClipSource) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel over a few hundred training clips."""
    latents, count, step = [], 0, 0
    while count < STATISTICS_CLIPS:
        video = clips.batch(step, 0, 1)
        latents.append(model.encode(video).mean.transpose(0, 1).flatten(1))
        count, step = count + len(video), step + 1
    values = torch.cat(latents, dim=1)
    if values.isnan().any():
        raise UserError("run: the autoencoder's latents are not finite; export an earlier checkpoint")
    return values.mean(dim=1), values.std(dim=1)
