"""Small labelled pictures as latents: a folder that a backbone of classes learns from."""

from pathlib import Path

import numpy as np

from kinoflow.data.latents.index import LABELS, PIXELS, LatentIndex
from kinoflow.data.latents.shards import Shard, begin, write_shard

CLASSES = ("dark", "light", "stripes")


def write_pictures(folder: Path, *, side: int = 8, count: int = 12, seed: int = 0) -> Path:
    """`count` grey pictures in two shards, of each class as many: pixels in [-1, 1] with a little noise."""
    bucket, rng = f"1x{side}x{side}@1", np.random.default_rng(seed)
    index = LatentIndex(
        buckets={bucket: count}, shard_size=-(-count // 2), captions_per_clip=1, widths=(),
        made_from={"source": "pictures", "seed": str(seed), "tae": PIXELS, "text": LABELS},
        latent_mean=(0.0,), latent_std=(1.0,), classes=CLASSES,
    )  # fmt: skip
    begin(folder, index, [])
    labels = np.arange(count) % len(CLASSES)
    flat, striped = np.ones((side, side)), np.tile([-1.0, 1.0], (side, side // 2))
    means = 0.8 * np.stack([-flat, flat, striped])
    pictures = means[labels] + 0.1 * rng.standard_normal((count, side, side))
    for shard in range(2):
        own = index.shard_clips(bucket, shard)
        latent = pictures[own.start : own.stop, None, None].astype(np.float16)
        named = [[CLASSES[label]] for label in labels[own]]
        content = Shard(latent=latent, texts=[], captions=named, labels=labels[own].tolist())
        write_shard(folder, bucket, shard, content)
    return folder
