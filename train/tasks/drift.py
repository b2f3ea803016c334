"""Latents as a sampler ends with them, beside the clips that they should be: what a decoder learns to mend.

A backbone's samples are a little off what an encoder gives: contours are ragged, and others in each latent
frame. So a clip's latent is noised to some time of the flow, and the release's sampler goes on from there:
what it ends with has such errors and still shows the clip. A decoder that learns from such pairs takes a part
of the denoising upon itself, as LTX-Video's does with noise (HaCohen et al. 2024, arXiv:2501.00103). The
encoder stays, and with it all that was trained on its latents.

Letters: b clips, c channels, t h w latent sizes.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import seeded
from kinoflow.dit_video.flow.matching import perturb
from kinoflow.dit_video.parallel import parallelize
from kinoflow.dit_video.unet import UNet
from kinoflow.sample.generate import carried
from kinoflow.sample.release import Release
from kinoflow.tae import TAE
from kinoflow.train.run.config import DriftConfig, RunConfig
from kinoflow.train.run.spread import Spread
from kinoflow.train.tasks.clips import ClipSource, to_tensor


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Clips in [-1, 1] and latents (not normalized) that a sampler ended with instead of theirs."""

    video: Float[Tensor, "b 3 frames height width"]
    latent: Float[Tensor, "b c t h w"]


class Drift:
    """Makes the pairs of a run: a few clips at a time, of which the steps that take them cut other places."""

    def __init__(self, config: RunConfig) -> None:
        self._config, manifest = config, config.drift.manifest
        data = replace(config.data, manifest=manifest, world_share=0.0 if manifest else 1.0)
        self.clips = ClipSource(data, config.seed, Path(config.run) / "quarantine_drift.jsonl")
        self._pairs: dict[tuple[int, int, int], Pair] = {}
        self._lock = Lock()  # batches are made by threads, and one of them samples for all

    @property
    def _choice(self) -> DriftConfig:
        return self._config.drift

    def prepare(self, model: TAE, spread: Spread) -> None:
        """Read the release that samples: its autoencoder's encoder has to be that of `model`.

        Raises:
            UserError: a release without an autoencoder or prompts, or with another encoder.
        """
        source, device = self._choice.release, spread.processes.device
        release = Release.load(source)
        if release.config.pixels or release.config.classes:
            raise UserError(f"drift.release: {source} makes no latents of prompts; name one that does")
        self._tae = release.tae(device)
        if not _equal(self._tae, model):
            raise UserError(f"drift.release: the latents of {source} are not those of init_from's encoder; "
                            "name a release with the autoencoder that is trained on")  # fmt: skip
        self._sampling = release.config.sampling
        self._backbone = release.backbone(device, self._config.deepspeed.low).requires_grad_(False)
        self._encoder = release.encoder(device=device)
        if self._config.parallel.compile and not isinstance(self._backbone, UNet):
            parallelize(self._backbone, replace(self._config.parallel, checkpoint_every=0), None)

    def takes(self, step: int) -> bool:
        """Whether this step learns from such a pair: the same on every rank."""
        return seeded("drift", self._config.seed, step) * 2.0**-63 < self._choice.share

    def first(self, step: int) -> int:
        """The step whose clips this one takes as well."""
        return step - step % self._choice.every

    def pair(self, step: int, index: int, slices: int) -> Pair:
        """Slice `index` of `slices` of a step's clips, each cut to data.crop pixels where this step cuts."""
        first = self.first(step)
        with self._lock:
            self._pairs = {key: pair for key, pair in self._pairs.items() if key[0] == first}
            key = (first, index, slices)
            if key not in self._pairs:
                self._pairs[key] = self._sampled(*key)
            pair = self._pairs[key]
        positions = self.clips.positions(step, index, slices)
        cuts = [self._cut(pair, row, at) for row, at in enumerate(positions)]
        video, latent = (torch.cat(parts) for parts in zip(*cuts, strict=True))
        return Pair(video=video, latent=latent)

    @torch.no_grad()
    def _sampled(self, step: int, index: int, slices: int) -> Pair:
        """Whole clips and what the sampler makes of them from one time of the flow on."""
        clips, captions = self.clips.captioned(step, index, slices)
        video, fps = to_tensor(clips), self.clips.bucket(step).fps
        latent = self._tae.normalize(self._tae.encode(video.to(next(self._tae.parameters()).device)).mean)
        rng = np.random.default_rng(seeded("drift times", self._config.seed, step))
        begin = float(rng.uniform(*self._choice.begin))
        seeds = [seeded("drift", self._config.seed, at) for at in self.clips.positions(step, index, slices)]
        draws = [
            torch.randn(latent.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds
        ]
        noise = torch.stack(draws).to(latent)
        x = perturb(latent, noise, latent.new_full((len(latent),), begin), self._sampling.gaussian_path).x_t
        times = torch.linspace(begin, 1, self._choice.steps + 1, dtype=torch.float64)
        condition, null = self._encoder(captions, fps), self._encoder.null()
        made = carried(self._backbone, condition, null, x, times=times, sampling=self._sampling)
        return Pair(video=video, latent=self._tae.denormalize(made).cpu())

    def _cut(self, pair: Pair, row: int, position: int) -> tuple[Tensor, Tensor]:
        """A clip and its latent, both cut at a place where a cell of the latent begins."""
        video, latent = pair.video[row : row + 1], pair.latent[row : row + 1]
        if self._config.data.crop is None:
            return video, latent
        rng = np.random.default_rng(seeded("drift cut", self._config.seed, position))
        for axis, factor in zip((3, 4), self._tae.config.factors[1:], strict=True):
            size = min(self._config.data.crop // factor, latent.shape[axis])
            at = int(rng.integers(latent.shape[axis] - size + 1))
            latent, video = latent.narrow(axis, at, size), video.narrow(axis, at * factor, size * factor)
        return video, latent


def _equal(one: TAE, other: TAE) -> bool:
    """Whether two autoencoders have one encoder, and one way to normalize its latents."""
    states = [
        {
            name: value.cpu()
            for name, value in model.state_dict().items()
            if not name.startswith(("decoder", "to_pixels"))
        }
        for model in (one, other)
    ]
    statistics = [(model.config.latent_mean, model.config.latent_std) for model in (one, other)]
    same = states[0].keys() == states[1].keys() and statistics[0] == statistics[1]
    return same and all(torch.equal(value, states[1][name]) for name, value in states[0].items())
