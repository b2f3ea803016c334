"""What a latent folder holds, for people, and one of its clips as a latent file."""

from pathlib import Path
from typing import Any

import numpy as np

from kinoflow.configs.errors import UserError
from kinoflow.data.clips.buckets import parse
from kinoflow.data.latents import kino
from kinoflow.data.latents.index import PIXELS, read_index
from kinoflow.data.latents.shards import LatentDataset, unfinished


def describe(folder: Path) -> dict[str, Any]:
    """What a latent folder holds, in plain values; shards that are still to make are counted as missing.

    Raises:
        UserError: no index, or a damaged one.
    """
    index = read_index(folder)
    return {
        "clips": sum(index.buckets.values()),
        "buckets": dict(index.buckets),
        "captions_per_clip": index.captions_per_clip,
        "text_widths": {f"text_{i}": width for i, width in enumerate(index.widths)},
        "classes": list(index.classes),
        "shards": sum(map(index.num_shards, index.buckets)),
        "shards_missing": sum(len(unfinished(folder, index, bucket)) for bucket in index.buckets),
        "made_from": dict(index.made_from),
        "latent_mean": list(index.latent_mean),
        "latent_std": list(index.latent_std),
    }


def export(folder: Path, target: Path, clip: int, bucket: str | None = None) -> None:
    """Write one clip of a latent folder as a latent file, without sound; `bucket` is the first by default.

    Raises:
        UserError: a folder that is not whole or holds pixels, no such bucket, or no such clip in it.
    """
    data = LatentDataset(folder)
    if data.index.made_from["tae"] == PIXELS:
        raise UserError(f"{folder}: holds pixels, which nothing has to decode; look at the source itself")
    if data.index.upsample:
        raise UserError(f"{folder}: holds frames one by one, for an upsampler; encode the clip itself with "
                        "kinoflow tae encode")  # fmt: skip
    named = {name.partition(" ")[0]: name for name in data.buckets}
    shape = next(iter(named)) if bucket is None else bucket.partition(" ")[0]
    if shape not in named:
        raise UserError(f"bucket: {bucket} is not in {folder}, which holds {', '.join(named)}; choose one")
    size, count = parse(shape), data.num_clips(named[shape])
    if not 0 <= clip < count:
        raise UserError(f"clip: {clip} is not in {folder}; choose one from 0 to {count - 1} of {shape}")
    latent = data.stored(named[shape], clip)
    captions = data.captions(named[shape], clip)
    info = kino.LatentInfo(
        frames=size.frames,
        height=size.height,
        width=size.width,
        fps=size.fps,
        color={},
        source=captions[0],
        tae=f"of {folder}",
        tae_sha256=data.index.made_from["tae"],
        channels=len(latent),
        tile=kino.CHUNK,
        metadata={f"caption_{i}": text for i, text in enumerate(captions)},
    )
    kino.write(target, info, np.swapaxes(latent, 0, 1))
