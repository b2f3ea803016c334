"""What a backbone learns from: precomputed latents, in batches with their noise, times and conditions."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import seeded
from kinoflow.data.clips.buckets import Bucket, parse
from kinoflow.data.clips.order import Sampler
from kinoflow.data.latents.sets import LatentSets
from kinoflow.data.latents.shards import Batch
from kinoflow.dit_video.backbone import BackboneConfig
from kinoflow.dit_video.flow import known
from kinoflow.dit_video.flow.known import Known
from kinoflow.dit_video.flow.matching import dropped_texts, time_quantile
from kinoflow.dit_video.mmdit import MMDiTConfig
from kinoflow.dit_video.video_dit import DiTConfig
from kinoflow.train.run.config import RunConfig
from kinoflow.train.tasks.flow import FlowBatch, condition_of


class FlowData:
    """The clips of a run. All randomness follows from (seed, step, position)."""

    def __init__(self, config: RunConfig, backbone: BackboneConfig) -> None:
        self.config = config
        self.backbone = backbone

    @cached_property
    def latents(self) -> LatentSets:
        """The precomputed folders; an export does not need them.

        Raises:
            UserError: there is none, or its conditions are not those that the model takes.
        """
        folder, name, wanted = self.place, self.config.model, self.backbone
        if self.config.data.latents is None:
            raise UserError("data.latents: name the folder that `kinoflow train precompute` wrote")
        dataset = LatentSets(self.config.data.latents)
        classes = len(dataset.index.classes)
        if classes != wanted.classes:
            holds = f"labels of {classes} classes" if classes else "texts"
            remedy = f"set {name}.classes={classes}"
            if bool(classes) != bool(wanted.classes):
                remedy += f" {name}.text_widths=[{','.join(map(str, dataset.index.widths))}]"
            raise UserError(f"{name}.classes: {wanted.classes}, but {folder} holds {holds}; {remedy}")
        if dataset.index.widths != wanted.text_widths:
            raise UserError(
                f"{name}.text_widths: {wanted.text_widths}, but {folder} holds text "
                f"states of widths {dataset.index.widths}"
            )
        pooled = sum(dataset.index.pooled)
        if isinstance(wanted, MMDiTConfig) and wanted.pooled_width != pooled:
            holds = f"pooled text of width {pooled}" if pooled else "no pooled text"
            line = f"{wanted.pooled_width}, but {folder} holds {holds}; set {name}.pooled_width={pooled}"
            raise UserError(f"{name}.pooled_width: {line}")
        if self.config.known.pictures and not dataset.index.keyframes:
            raise UserError(f"known: {folder} holds no latents of single frames; precompute it with "
                            "keyframes=true, or set known.first=0 known.both=0 known.prefix=0")  # fmt: skip
        self._check_upsample(dataset.index.upsample)
        channels = len(dataset.index.latent_mean)
        if channels != wanted.latent_channels:
            key = f"{name}.latent_channels"
            line = f"{wanted.latent_channels}, but {folder} holds {channels}; set {key}={channels}"
            raise UserError(f"{key}: {line}")
        return dataset

    def _check_upsample(self, factor: int) -> None:
        if bool(factor) == bool(self.config.known.upsample):
            return
        if factor:
            raise UserError(f"known.upsample: {self.place} holds frames one by one, for an "
                            "upsampler; set dit.known=true known.upsample=1")  # fmt: skip
        raise UserError(f"known.upsample: {self.place} holds no smaller twins; precompute it with upsample=2")

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The buckets of the latents, in their order, as data.buckets weighs them where it is given."""
        stored = [parse(name) for name in self.latents.buckets]
        if self.config.data.buckets is None:
            return stored
        wanted = {_shape(bucket): bucket for bucket in map(parse, self.config.data.buckets)}
        missing = wanted.keys() - {_shape(bucket) for bucket in stored}
        if missing:
            raise UserError(
                f"data.buckets: {wanted[min(missing)]} is not in {self.place}, which holds "
                f"{', '.join(self.latents.buckets)}; precompute it or leave it out"
            )
        return [wanted.get(_shape(bucket), replace(bucket, weight=0.0)) for bucket in stored]

    @property
    def largest(self) -> Bucket:
        """The bucket of the longest clips, which previews show."""
        return max(self.buckets, key=lambda bucket: (bucket.frames, bucket.weight))

    def sizes(self) -> dict[str, tuple[int, int, int]]:
        """Frames, rows and columns of the latents of each bucket that is taken from."""
        pairs = zip(self.latents.buckets, self.buckets, strict=True)
        taken = [name for name, bucket in pairs if bucket.weight > 0]
        return {name: self.latents.sizes(name) for name in taken}

    @cached_property
    def sampler(self) -> Sampler:
        """Which clips each step takes."""
        return Sampler(
            [self.latents.lengths(name) for name in self.latents.buckets],
            weights=[bucket.weight for bucket in self.buckets],
            batch_sizes=[bucket.batch_size or self.config.data.batch_size for bucket in self.buckets],
            seed=self.config.seed,
            set_weights=self.latents.weights,
        )

    @property
    def place(self) -> str:
        """Where the latents are, for messages."""
        return ", ".join(self.config.data.latents or ())

    def names(self, step: int, index: int, slices: int) -> list[str]:
        """Where the latents of a batch lie."""
        draw = self.sampler.draw(step, index, slices)
        return [self.latents.place(self.latents.buckets[draw.bucket], i) for i in draw.indices.tolist()]

    def batch(self, step: int, index: int, slices: int) -> FlowBatch:
        """Slice `index` of the `slices` equal slices of the global batch of this step."""
        draw = self.sampler.draw(step, index, slices)
        count = len(draw.indices)
        total, first = count * slices, count * index
        rng = np.random.default_rng(seeded("times", self.config.seed, step))
        shared, level = rng.permutation(total), rng.random(total)
        levels = ((shared + level) / total)[first : first + count]
        choices = self._choices(rng, total)[first : first + count]
        clips = self.latents.get(self.latents.buckets[draw.bucket], draw.indices, choices)
        clips = self._window(clips, step, first)
        noise = [self._noise(clips.latent[0].shape, step, first + i) for i in range(count)]
        time = time_quantile(torch.from_numpy(levels).clamp(1e-6, 1 - 1e-6), self.config.flow).float()
        dropped, classes = torch.from_numpy(choices[:, 0] < 0), len(self.latents.index.classes)
        null = None
        if self.config.distill.steps:
            nothing = replace(clips, texts=self.latents.null(count))
            null = condition_of(nothing, classes, torch.ones_like(dropped))
        return FlowBatch(
            latent=clips.latent,
            noise=torch.stack(noise),
            time=time,
            condition=condition_of(clips, classes, dropped),
            dropout=torch.tensor(seeded("dropout", self.config.seed, step, first)),
            known=self._known(clips, step, first),
            null=null,
        )

    def _window(self, clips: Batch, step: int, first: int) -> Batch:
        """Of clips longer than known.window as many frames, from a place of its own in each."""
        length, frames = self.config.known.window, clips.latent.shape[2]
        if clips.smaller is None or not 0 < length < frames:
            return clips
        count = len(clips.latent)
        draws = [seeded("window", self.config.seed, step, first + i) for i in range(count)]
        starts = [draw % (frames - length + 1) for draw in draws]

        def cut(latent: Tensor) -> Tensor:
            parts = [latent[i : i + 1, :, start : start + length] for i, start in enumerate(starts)]
            return torch.cat(parts)

        return replace(clips, latent=cut(clips.latent), smaller=cut(clips.smaller))

    def _known(self, clips: Batch, step: int, first: int) -> Known | None:
        """What a backbone that reads it knows of each clip of a slice whose first place is `first`."""
        if not isinstance(self.backbone, DiTConfig) or not self.backbone.known:
            return None
        parts = []
        for i, latent in enumerate(clips.latent):
            rng = np.random.default_rng(seeded("known", self.config.seed, step, first + i))
            ends = None if clips.keyframes is None else clips.keyframes[i]
            twin = None if clips.smaller is None else clips.smaller[i : i + 1]
            parts.append(known.draw(self.config.known, rng, latent[None], ends, twin))
        return known.joined(parts)

    def _choices(self, rng: np.random.Generator, total: int) -> Int64[np.ndarray, "total _"]:
        """A caption for each clip and encoder; -1 drops it: all encoders at once, or each alone.

        Of clips with labels a column of which -1 drops the label, with probability η = `flow.drop_all`.
        """
        index, flow = self.latents.index, self.config.flow
        caption = rng.integers(index.captions_per_clip, size=(total, 1))
        together = torch.from_numpy(rng.random((total, 1)))
        each = torch.from_numpy(rng.random((total, len(index.widths))))
        alone = each if index.widths else torch.ones_like(together)
        return np.where(dropped_texts(together, alone, flow).numpy(), -1, caption)

    def _noise(self, shape: Sequence[int], step: int, position: int) -> Tensor:
        generator = torch.Generator().manual_seed(seeded("noise", self.config.seed, step, position))
        return torch.randn(tuple(shape), generator=generator)


def _shape(bucket: Bucket) -> tuple[int, int, int, Fraction]:
    return bucket.frames, bucket.height, bucket.width, bucket.fps
