"""Training clips of a bucket, from the procedural world or a manifest, addressed by (seed, step, position)."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from data.buckets import Bucket, choose, parse
from data.world import caption, render, sample_scene
from train.config import DataConfig

_CAPTION_STREAMS = 1_000_003


class ClipSource:
    """World clips: seed and position give the scene, so no two steps share one and any rank can draw any."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.buckets = tuple(parse(text) for text in config.buckets)
        self.batch_size = config.batch_size
        self.seed = seed

    def bucket(self, step: int) -> Bucket:
        """The bucket of this step: one for all ranks, so that all do the same work."""
        return choose(self.seed, step, self.buckets)

    def batch(self, step: int, rank: int, world_size: int) -> Float[Tensor, "b 3 frames height width"]:
        """Slice `rank` of `world_size` of the clips of a step, RGB in [-1, 1]."""
        bucket = self.bucket(step)
        share = (bucket.batch_size or self.batch_size) // world_size
        first = self.seed * 10**9 + step * 10**4 + rank * share
        return to_tensor([draw(first + i, bucket) for i in range(share)])

    def heldout(self, count: int) -> Float[Tensor, "b 3 frames height width"]:
        """Clips of compositions that training never draws, in the largest bucket."""
        bucket = max(self.buckets, key=lambda b: (b.frames, b.height))
        return to_tensor([draw(i, bucket, split="heldout") for i in range(count)])


def draw(index: int, bucket: Bucket, split: str = "train") -> UInt8[np.ndarray, "frames height width 3"]:
    """The world's clip of this index."""
    scene = sample_scene(index, split="heldout" if split == "heldout" else "train")
    return render(scene, frames=bucket.frames, height=bucket.height, width=bucket.width, fps=bucket.fps)


def describe(index: int, bucket: Bucket, choice: int) -> str:
    """Caption number `choice` of the clip of this index; one frame is an image and has no motion."""
    scene = sample_scene(index, split="train")
    return caption(scene, index + _CAPTION_STREAMS * choice, image=bucket.frames == 1)


def to_tensor(clips: Sequence[UInt8[np.ndarray, "frames height width 3"]]) -> Float[Tensor, "b 3 frames height width"]:
    """Bytes to RGB in [-1, 1]."""
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)
