"""Training clips of a bucket, from a list or drawn, addressed by (seed, step, position)."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import seeded
from kinoflow.data.clips.buckets import Bucket, choose, parse
from kinoflow.data.clips.fit import Sample
from kinoflow.data.clips.order import Sampler
from kinoflow.data.clips.sets import ClipSets
from kinoflow.data.clips.workers import Workers
from kinoflow.data.world import Scene, caption, render, sample_scene
from kinoflow.tae.model.pixels import from_bytes
from kinoflow.train.run.config import DataConfig

_CAPTION_STREAMS = 1_000_003
_STEP_STRIDE = 10_000


def read_buckets(config: DataConfig) -> tuple[Bucket, ...]:
    """The buckets of a run that draws or reads clips itself.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    if config.buckets is None:
        raise UserError("data.buckets: name the clips to train on, for example data.buckets=[16x64x64@16]")
    return tuple(parse(text) for text in config.buckets)


class ClipSource:
    """Clips of config.data: any rank can make any of them, so a step does not depend on the topology.

    World clips are drawn from seed and position and never repeat. Those of lists come in an order that mixes
    all of them, by weight where there are weights; none comes again before the others of its bucket (with
    weights: and its list) came. Bad ones are written to `quarantine`. `warnings` are lines about bad rows.

    Raises:
        UserError: no buckets, neither a list nor the toy world, or a list that cannot be read.
    """

    def __init__(self, config: DataConfig, seed: int, quarantine: Path) -> None:
        self.buckets = read_buckets(config)
        if config.manifest is None and config.world_share == 0:
            raise UserError("data.manifest: name the clip list to train on (data.world_share=1 takes the "
                            "toy world instead)")  # fmt: skip
        self.batch_size = config.batch_size
        self.seed = seed
        self.world_share, self.crop = config.world_share, config.crop
        self.listed, self.warnings = None, []
        self.workers = Workers(config.workers, config.clip_seconds)
        self.source = "world"
        if config.manifest is not None:
            listed = ClipSets(config.manifest, "data.manifest", self.buckets, seed=seed,
                              quarantine=quarantine, workers=self.workers)  # fmt: skip
            self.source, self.listed, self.warnings = listed.fingerprint, listed, listed.warnings
            self._order = self._sampler(listed)

    def _sampler(self, listed: ClipSets) -> Sampler:
        lengths = [listed.lengths(bucket) for bucket in self.buckets]
        for bucket, each in zip(self.buckets, lengths, strict=True):
            if sum(each) == 0:
                raise UserError(f"data.buckets: no clip of data.manifest fills {bucket}; leave it out")
        return Sampler(
            lengths,
            weights=[bucket.weight for bucket in self.buckets],
            batch_sizes=[bucket.batch_size or self.batch_size for bucket in self.buckets],
            seed=self.seed,
            set_weights=listed.weights,
        )

    def bucket(self, step: int) -> Bucket:
        """The bucket of this step: one for all ranks, so that all do the same work."""
        if self.listed is None:
            return choose(self.seed, step, self.buckets)
        return self.buckets[self._order.draw(step).bucket]

    def batch(self, step: int, index: int, slices: int) -> Float[Tensor, "b 3 frames height width"]:
        """Slice `index` of `slices` of the clips of a step, RGB in [-1, 1]."""
        bucket, positions = self.bucket(step), self.positions(step, index, slices)
        if self.listed is None or self._from_world(step):
            clips = self.workers.map(partial(self._drawn, bucket), positions)
        else:
            turns = self._turns(step, index, slices, self.listed.count(bucket))
            clips = [sample.video for sample in self.workers.map(partial(self._listed, bucket), turns)]
        return to_tensor([self._cropped(clip, at) for clip, at in zip(clips, positions, strict=True)])

    def _drawn(self, bucket: Bucket, position: int) -> UInt8[np.ndarray, "frames height width 3"]:
        scene = sample_scene(self._world_index(position), split="train")
        return self.workers.call(renderer(bucket), scene)

    def _listed(self, bucket: Bucket, turn: int) -> Sample:
        assert self.listed is not None
        return self.listed.get(turn, bucket)

    def close(self) -> None:
        """End the processes that read clips."""
        self.workers.close()

    def names(self, step: int, index: int, slices: int) -> list[str]:
        """What `batch` is made of: paths, or numbers of the world's clips."""
        bucket = self.bucket(step)
        if self.listed is None or self._from_world(step):
            return [f"world {self._world_index(at)}" for at in self.positions(step, index, slices)]
        turns = self._turns(step, index, slices, self.listed.count(bucket))
        return [self.listed.name(turn, bucket) for turn in turns]

    def _turns(self, step: int, index: int, slices: int, count: int) -> list[int]:
        """Indices of clips of the lists; each round through all of them cuts elsewhere in time."""
        found = self._order.draw(step, index, slices)
        return (found.epochs * count + found.indices).tolist()

    def _world_index(self, position: int) -> int:
        return self.seed * 10**9 + position

    def positions(self, step: int, index: int, slices: int) -> range:
        """Where this slice of the step's clips lies in the endless stream of clips.

        Raises:
            UserError: the bucket's batch does not divide.
        """
        bucket = self.bucket(step)
        share, rest = divmod(bucket.batch_size or self.batch_size, slices)
        if rest:
            raise UserError(f"data.buckets: the batch of {bucket} does not divide into {slices} slices")
        first = step * _STEP_STRIDE + index * share
        return range(first, first + share)

    def _cropped(
        self, clip: UInt8[np.ndarray, "frames height width 3"], position: int
    ) -> UInt8[np.ndarray, "frames _ _ 3"]:
        """A square of config.crop pixels at a random place; the whole clip without it."""
        side = self.crop
        if side is None:
            return clip
        rng = np.random.default_rng(seeded("crop", self.seed, position))
        top, left = (int(rng.integers(max(size - side, 0) + 1)) for size in clip.shape[1:3])
        return clip[:, top : top + side, left : left + side]

    def _from_world(self, step: int) -> bool:
        """Which steps take the world's clips beside a list's: the same on every rank."""
        return seeded("world", self.seed, step) * 2.0**-63 < self.world_share

    def shown(self, count: int) -> Float[Tensor, "b 3 frames height width"]:
        """Clips for a preview in the largest bucket, always the same.

        Of the toy world they are compositions that training never draws; of a list alone, its first ones.
        """
        bucket = max(self.buckets, key=lambda b: (b.frames, b.height))
        if self.listed is None or self.world_share > 0:
            return to_tensor([draw(i, bucket, split="heldout") for i in range(count)])
        return to_tensor([self.listed.get(i, bucket).video for i in range(count)])


def draw(index: int, bucket: Bucket, split: str = "train") -> UInt8[np.ndarray, "frames height width 3"]:
    """The world's clip of this index."""
    return renderer(bucket)(sample_scene(index, split="heldout" if split == "heldout" else "train"))


def renderer(bucket: Bucket) -> Callable[[Scene], UInt8[np.ndarray, "frames height width 3"]]:
    """What a worker is sent: it knows no task."""
    size = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width, "fps": bucket.fps}
    return partial(render, **size)


def describe(scene: Scene, index: int, bucket: Bucket, choice: int) -> str:
    """Caption number `choice` of the scene of this index; one frame is an image and has no motion."""
    return caption(scene, index + _CAPTION_STREAMS * choice, image=bucket.frames == 1)


def to_tensor(
    clips: Sequence[UInt8[np.ndarray, "frames height width 3"]],
) -> Float[Tensor, "b 3 frames height width"]:
    """Bytes to RGB in [-1, 1]."""
    return from_bytes(torch.from_numpy(np.stack(clips)))
