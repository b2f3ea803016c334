"""What `kinoflow train precompute` makes latents of: a list of clips, the toy world, labelled pictures."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import UInt8

from kinoflow.configs import launch
from kinoflow.configs.errors import UserError
from kinoflow.data.clips.buckets import Bucket, admissible, parse
from kinoflow.data.clips.fit import Clips, fit, pad
from kinoflow.data.clips.manifest import Manifest
from kinoflow.data.clips.sets import ClipSets
from kinoflow.data.clips.workers import Workers
from kinoflow.data.labelled.images import Labelled, Place, read
from kinoflow.data.world import Split, sample_scene
from kinoflow.train.tasks.clips import describe, renderer

_WORLD_CLIPS = 1024
_FITS = {"crop": fit, "pad": pad}


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """What to encode, with what, and into which folder.

    text_cache serves when the same captions come again: another tae or size, a lost folder. It grows as big
    as the text states of `out`.

    Labelled pictures are those of a folder with a folder for each class, an .npz, a .csv or MNIST's IDX files
    (data.labelled). They take no text encoders, and without a release no autoencoder: what is stored then is
    their pixels in [-1, 1].
    """

    out: str = ""
    """Folder to write."""
    source: tuple[str, ...] = ()
    """Clip lists, `world` or `images:PATH`; held out `world:heldout`."""
    release: str = ""
    """Release with tae/ and text/, or with the text encoders' names in kinoflow.yaml."""
    text_cache: str | None = None
    """Folder that keeps text states for the next time; may be deleted."""
    buckets: tuple[str, ...] = ()
    """Frames x height x width @ fps; ' weight=2' and ' batch=8' behind it."""
    fit: Literal["crop", "pad"] = "crop"
    """Pictures of other sizes: their centre, or all amid background."""
    keyframes: bool = False
    """Keep latents of single frames, for known.first, known.both, known.prefix."""
    upsample: int = 0
    """For an upsampler: of frames, and of twins so many times smaller."""
    channels: int | None = None
    """Of pictures stored as pixels, 1 or 3; null: as they need."""
    clips: int | None = None
    """Over all buckets, by weight; null: all of a list that fill one."""
    captions_per_clip: int = 1
    """Captions of each clip; only those of the world have more than one."""
    shard_size: int = 1024
    """Clips of one shard."""
    batch_size: int = 32
    """Clips that go through the autoencoder at once."""
    seed: int = 0
    """Of the world's scenes and of the cuts of a list's clips."""
    threads: int | None = None
    """CPU threads; null leaves it to torch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the autoencoder computes in."""
    compile: bool = False
    """Fuse the autoencoder with torch.compile."""
    workers: int = 1
    """Background processes that decode and draw clips; 0 does it in turn with encoding."""
    clip_seconds: float = 60.0
    """A clip that takes a worker longer is set aside."""
    ray: str | None = None
    """Address of a Ray cluster that makes the shards, or local."""
    actors: int | None = None
    """Of the cluster; null: one a GPU, or else a machine."""

    def __post_init__(self) -> None:
        for key in ("clips", "captions_per_clip", "shard_size", "batch_size", "threads", "actors"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key}: {value} is too small, the least is 1")
        if self.split is None and self.captions_per_clip > 1:
            raise UserError("captions_per_clip: a clip of a list has one caption, set captions_per_clip=1")
        if self.images is None and self.fit != "crop":
            raise UserError("fit: clips are cropped, only labelled images (source=images:…) may be padded")
        if self.channels is not None and (self.images is None or self.release):
            raise UserError("channels: an autoencoder takes three; leave it out, or store labelled images "
                            "without a release")  # fmt: skip
        if self.upsample:
            self._check_upsample()
        if self.channels not in (None, 1, 3):
            raise UserError(f"channels: {self.channels} is neither 1 nor 3")

    def _check_upsample(self) -> None:
        if self.upsample < 2:
            raise UserError(f"upsample: {self.upsample} times is not larger; use 2 or more, or leave it out")
        if not self.release or self.keyframes:
            raise UserError("upsample: its latents are of single frames of an autoencoder; give a release, "
                            "and leave keyframes out")  # fmt: skip
        for bucket in map(parse, self.buckets):
            if bucket.height % self.upsample or bucket.width % self.upsample:
                raise UserError(f"upsample: {self.upsample} does not divide the sides of {bucket}")

    @property
    def split(self) -> Split | None:
        """That of the toy world, None where the source is another.

        Raises:
            UserError: the world has no such split.
        """
        world, _, split = self.source[0].partition(":") if len(self.source) == 1 else ("", "", "")
        if world != "world":
            return None
        for known in get_args(Split):
            if (split or "train") == known:
                return known
        raise UserError(f"source: the world has no split {split!r}; it has {', '.join(get_args(Split))}")

    @property
    def images(self) -> Place | None:
        """Where labelled pictures are, None where the source is another."""
        return Place.parse(self.source[0]) if len(self.source) == 1 else None


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One clip; `stamp` says what it was made of, `label` its class, where the source has such."""

    frames: UInt8[np.ndarray, "frames height width 3"]
    captions: list[str]
    stamp: str | None = None
    label: int | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Clips by bucket: how many, clip i, and what its stamp would be (None: it never changes).

    `classes` are the names that the clips' labels stand for, `grey` that none has colours; `made_from` is
    what the index says of the source beside its name.
    """

    counts: dict[str, int]
    workers: Workers
    get: Callable[[Bucket, int], Clip]
    stamp: Callable[[Bucket, int], str] | None = None
    classes: tuple[str, ...] = ()
    grey: bool = False
    made_from: Mapping[str, str] = field(default_factory=dict)


def open_source(config: PrecomputeConfig, buckets: Sequence[Bucket], workers: Workers) -> Source:
    """What config.source names.

    Raises:
        UserError: it cannot be read, or nothing of it fills one of the buckets.
    """
    if config.split is not None:
        return _world(config, config.split, buckets, workers)
    if config.images is None:
        return _listed(config, buckets, workers)
    found = read(config.images)
    make = _files if isinstance(found.pictures, Manifest) else _table
    return make(config, found, buckets, workers)


def _world(config: PrecomputeConfig, split: Split, buckets: Sequence[Bucket], workers: Workers) -> Source:
    """Scenes of a split; buckets and seeds lie far apart, so that none shares a scene."""
    draw = partial(sample_scene, split=split)
    first = {str(bucket): (config.seed * 1000 + i) * 10**9 for i, bucket in enumerate(buckets)}

    def get(bucket: Bucket, clip: int) -> Clip:
        seed = first[str(bucket)] + clip
        scene = draw(seed)
        captions = [describe(scene, seed, bucket, choice) for choice in range(config.captions_per_clip)]
        return Clip(frames=workers.call(renderer(bucket), scene), captions=captions)

    return Source(counts=_shares(config.clips or _WORLD_CLIPS, buckets), workers=workers, get=get)


def _listed(config: PrecomputeConfig, buckets: Sequence[Bucket], workers: Workers) -> Source:
    clips = ClipSets(config.source, "source", buckets, seed=config.seed, quarantine=_quarantine(config),
                     workers=workers)  # fmt: skip
    if clips.weights is not None:
        raise UserError("source: lists have no weights here; precompute each into a folder of its own and "
                        "weigh the folders, data.latents=['a weight=3','b']")  # fmt: skip
    for warning in clips.warnings if launch.current().rank == 0 else ():
        print(f"warning: {warning}", file=sys.stderr)
    counts = _filled(config, buckets, clips.count)

    def get(bucket: Bucket, clip: int) -> Clip:
        sample = clips.get(clip, bucket)
        return Clip(frames=sample.video, captions=[sample.caption], stamp=sample.stamp)

    def stamp(bucket: Bucket, clip: int) -> str:
        return clips.stamp(clip, bucket)

    counts = counts if config.clips is None else _shares(config.clips, buckets)
    return Source(counts=counts, workers=workers, get=get, stamp=stamp)


def _files(config: PrecomputeConfig, found: Labelled, buckets: Sequence[Bucket], workers: Workers) -> Source:
    """Pictures in files: one that cannot be read is set aside, and the next takes its place."""
    assert isinstance(found.pictures, Manifest), "it was asked"
    clips = Clips(
        found.pictures, buckets, config.seed, _quarantine(config), workers, placed=_FITS[config.fit]
    )
    counts = _some(config, buckets, _filled(config, buckets, clips.count))

    def get(bucket: Bucket, clip: int) -> Clip:
        sample = clips.get(clip, bucket)
        label = int(found.labels[sample.position])
        return Clip(frames=sample.video, captions=[sample.caption], stamp=sample.stamp, label=label)

    def stamp(bucket: Bucket, clip: int) -> str:
        return clips.stamp(clip, bucket)

    return Source(
        counts=counts, workers=workers, get=get, stamp=stamp, classes=found.classes, grey=found.grey,
        made_from={"fit": config.fit},
    )  # fmt: skip


def _table(config: PrecomputeConfig, found: Labelled, buckets: Sequence[Bucket], workers: Workers) -> Source:
    """Pictures in memory: the source is as the index says, or it is another one."""
    pictures, placed = found.pictures, _FITS[config.fit]
    assert isinstance(pictures, np.ndarray), "it was asked"
    count, height, width, _ = pictures.shape
    still = partial(admissible, duration=Fraction(1), fps=Fraction(1), height=height, width=width)

    def fill(bucket: Bucket) -> int:
        return count if bucket.frames == 1 and bucket in still(buckets) else 0

    counts = _some(config, buckets, _filled(config, buckets, fill))

    def get(bucket: Bucket, clip: int) -> Clip:
        picture = np.broadcast_to(pictures[clip], (height, width, 3))
        label = int(found.labels[clip])
        frames = placed(np.ascontiguousarray(picture)[None], bucket.height, bucket.width)
        return Clip(frames=frames, captions=[found.classes[label]], label=label)

    return Source(
        counts=counts, workers=workers, get=get, classes=found.classes, grey=found.grey,
        made_from={"fit": config.fit, "pictures": found.fingerprint},
    )  # fmt: skip


def _quarantine(config: PrecomputeConfig) -> Path:
    return Path(config.out) / "quarantine.jsonl"


def _filled(
    config: PrecomputeConfig, buckets: Sequence[Bucket], count: Callable[[Bucket], int]
) -> dict[str, int]:
    """How many of the source fill each bucket.

    Raises:
        UserError: none fills one of them.
    """
    counts = {str(bucket): count(bucket) for bucket in buckets}
    for name, found in counts.items():
        if found == 0:
            raise UserError(f"buckets: no clip of {', '.join(config.source)} fills {name}, remove it")
    return counts


def _some(config: PrecomputeConfig, buckets: Sequence[Bucket], counts: dict[str, int]) -> dict[str, int]:
    """As many pictures as config.clips asks for, each once."""
    if config.clips is None:
        return counts
    return {name: min(share, counts[name]) for name, share in _shares(config.clips, buckets).items()}


def _shares(clips: int, buckets: Sequence[Bucket]) -> dict[str, int]:
    total = sum(bucket.weight for bucket in buckets)
    return {str(bucket): max(round(clips * bucket.weight / total), 1) for bucket in buckets}
