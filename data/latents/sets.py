"""Several latent folders that a run learns from as if they were one."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int64

from kinoflow.configs.errors import UserError
from kinoflow.data.clips.remote import Url, place
from kinoflow.data.clips.sets import locate, parse
from kinoflow.data.latents.index import LatentIndex
from kinoflow.data.latents.shards import Batch, LatentDataset, PaddedText, each_encoder


class LatentSets:
    """Random access to the clips of latent folders; those of a bucket are counted folder after folder.

    A bucket is named, and weighed, as the first folder names it that has it. `index` describes all of them:
    `captions_per_clip` is the least that the folders' own numbers divide, so that a choice below it is a fair
    choice in each, and `keyframes` asks that all of them have some: those of a part are left out. `weights`
    are the folders' shares of a bucket's draws, None without any.

    Raises:
        UserError: a folder that is not there or not whole, or folders that were made with other encoders.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        sets = parse(texts, "data.latents")
        for text in sets.places:
            if isinstance(place(text), Url):
                raise UserError(f"data.latents: {text} is a URL, and latents are mapped from files; copy it "
                                "to a disk")  # fmt: skip
        self._folders = [LatentDataset(text) for text in sets.places]
        self.weights = sets.weights
        self.fingerprint = sets.fingerprint([folder.fingerprint for folder in self._folders])
        for other in self._folders[1:]:
            _require_alike(self._folders[0], other)
        # The folders that have a bucket call it by names of their own: its weight may differ.
        self._names: dict[str, dict[int, str]] = {}
        for number, folder in enumerate(self._folders):
            for name in folder.buckets:
                self._names.setdefault(_shape(name), {})[number] = name
        self.buckets = tuple(next(iter(names.values())) for names in self._names.values())
        self._lengths = {name: self._counted(name) for name in self.buckets}
        self.index: LatentIndex = replace(
            self._folders[0].index,
            buckets={name: sum(counts) for name, counts in self._lengths.items()},
            captions_per_clip=math.lcm(*(folder.index.captions_per_clip for folder in self._folders)),
            keyframes=all(folder.index.keyframes for folder in self._folders),
        )

    def _counted(self, bucket: str) -> list[int]:
        names = self._names[_shape(bucket)]
        return [
            folder.num_clips(names[number]) if number in names else 0
            for number, folder in enumerate(self._folders)
        ]

    def lengths(self, bucket: str) -> list[int]:
        """The number of clips of a bucket in each folder, 0 where it has no such bucket."""
        return self._lengths[bucket]

    def num_clips(self, bucket: str) -> int:
        """The number of clips of a bucket."""
        return sum(self._lengths[bucket])

    def sizes(self, bucket: str) -> tuple[int, int, int]:
        """Frames, rows and columns of the latents of a bucket."""
        folder, name, own = self._find(bucket, 0)
        frames, height, width = folder.stored(name, own).shape[1:]
        return frames, height, width

    def holds(self, other: LatentDataset) -> bool:
        """Whether a folder is one of these, wherever it lies."""
        return other.fingerprint in {folder.fingerprint for folder in self._folders}

    def place(self, bucket: str, index: int) -> str:
        """Where a clip lies, for people."""
        folder, name, own = self._find(bucket, index)
        return folder.place(name, own)

    def captions(self, bucket: str, index: int) -> list[str]:
        """The captions of one clip."""
        folder, name, own = self._find(bucket, index)
        return folder.captions(name, own)

    def get(
        self,
        bucket: str,
        indices: Int64[np.ndarray, " b"],
        text_choice: Int64[np.ndarray, " b"] | Int64[np.ndarray, "b encoders"],
    ) -> Batch:
        """Normalized latents and padded texts of these clips; as LatentDataset.get."""
        rows = []
        choices = each_encoder(text_choice, len(self.index.widths))
        for index, choice in zip(indices.tolist(), choices.tolist(), strict=True):
            folder, name, own = self._find(bucket, index)
            captions = folder.index.captions_per_clip
            row = folder.row(name, own, [c if c < 0 else c % captions for c in choice])
            rows.append(row if self.index.keyframes else replace(row, keyframes=None))
        return Batch.of(rows, self.index)

    def null(self, count: int) -> tuple[PaddedText, ...]:
        """The null prompt for so many clips, the same in all folders."""
        return self._folders[0].null(count)

    def _find(self, bucket: str, index: int) -> tuple[LatentDataset, str, int]:
        """The folder of a clip, the bucket's name there, and the clip's index there."""
        number, own = locate(index, self._lengths[bucket])
        return self._folders[number], self._names[_shape(bucket)][number], own


def _shape(bucket: str) -> str:
    return bucket.partition(" ")[0]


def _require_alike(first: LatentDataset, other: LatentDataset) -> None:
    """Refuse folders whose latents or text states do not mean the same."""
    one, two = first.index, other.index
    for name, before, after in (
        ("another autoencoder", one.made_from.get("tae"), two.made_from.get("tae")),
        ("other text encoders", one.made_from.get("text"), two.made_from.get("text")),
        ("text states of other widths", one.widths, two.widths),
        ("pooled texts of other widths", one.pooled, two.pooled),
        ("other classes", one.classes, two.classes),
        ("another upsample", one.upsample, two.upsample),
        ("other latent statistics", (one.latent_mean, one.latent_std), (two.latent_mean, two.latent_std)),
    ):
        if before != after:
            remedy = "upsample=" if name.endswith("upsample") else "release="
            raise UserError(f"data.latents: {other.folder} was made with {name} than {first.folder}; "
                            f"precompute it with the same {remedy}")  # fmt: skip
