"""`kinoflow train precompute CONFIG.yaml … out=latents/`: clips and captions to latents and text states.

Started by torchrun or srun, each process makes its own shards. A shard that is there already is skipped,
unless a clip of a list or its caption has changed since.
"""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from kinoflow.conditioning import checkpoints
from kinoflow.conditioning.checkpoints import TextConfig
from kinoflow.conditioning.prompt_encoder import PromptEncoder
from kinoflow.configs.errors import UserError
from kinoflow.configs.files import folder_fingerprint
from kinoflow.configs.pretrained import fingerprint
from kinoflow.configs.schema import load
from kinoflow.data.clips.buckets import Bucket, parse
from kinoflow.data.clips.sets import ClipSets
from kinoflow.data.clips.workers import Workers
from kinoflow.data.latents import shards, stored
from kinoflow.data.prefetch import prefetch
from kinoflow.data.world import Split, sample_scene
from kinoflow.sample.release import text_config
from kinoflow.tae.cpu.accelerate import accelerate
from kinoflow.tae.model.tae import TAE, Posterior
from kinoflow.train.run import launch
from kinoflow.train.run.processes import device_of
from kinoflow.train.tasks.clips import describe, renderer, to_tensor

_WORLD_CLIPS = 1024
_NEEDED = {
    "out": "name the folder to write, for example out=latents/mini",
    "source": "name the clip list (Parquet or JSONL), or say source=world for the toy world",
    "release": "name the release folder whose tae/ and text/ are to encode",
    "buckets": "give at least one, for example buckets=[16x64x64@16]",
}


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """What to encode, with what, and into which folder.

    text_cache serves when the same captions come again: another tae or size, a lost folder. It grows as big
    as the text states of `out`.
    """

    out: str = ""
    """Folder to write."""
    source: tuple[str, ...] = ()
    """Clip lists, or the toy world: `world`, held out `world:heldout`."""
    release: str = ""
    """Release with tae/ and text/, or with the text encoders' names in kinoflow.yaml."""
    text_cache: str | None = None
    """Folder that keeps text states for the next time; may be deleted."""
    buckets: tuple[str, ...] = ()
    """Frames x height x width @ fps; ' weight=2' and ' batch=8' behind it."""
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

    def __post_init__(self) -> None:
        for key in ("clips", "captions_per_clip", "shard_size", "batch_size", "threads"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key}: {value} is too small, the least is 1")
        if self.split is None and self.captions_per_clip > 1:
            raise UserError("captions_per_clip: a clip of a list has one caption, set captions_per_clip=1")

    @property
    def split(self) -> Split | None:
        """That of the toy world, None where the source is a list.

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


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The frozen parts, where they compute and in which number format."""

    tae: TAE
    text: PromptEncoder
    device: torch.device
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False

    @cached_property
    def _encode(self) -> Callable[[Tensor], Posterior]:
        return torch.compile(self.tae.encode, dynamic=False) if self.compile else self.tae.encode

    @torch.inference_mode()
    def latent(self, video: Float[Tensor, "b 3 frames height width"]) -> Float[Tensor, "b c t h w"]:
        """Posterior means, not normalized."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            return self._encode(video.to(self.device)).mean.float()


@dataclass(frozen=True, kw_only=True)
class _Clip:
    frames: UInt8[np.ndarray, "frames height width 3"]
    captions: list[str]
    stamp: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Clips by bucket: how many, clip i, and what its stamp would be (None: it never changes)."""

    counts: dict[str, int]
    workers: Workers
    get: Callable[[Bucket, int], _Clip]
    stamp: Callable[[Bucket, int], str] | None = None


def main(sources: Sequence[str]) -> int:
    """Make every shard of this process; 0."""
    config = load(PrecomputeConfig, sources)
    for key, remedy in _NEEDED.items():
        if not getattr(config, key):
            raise UserError(f"{key}: {remedy}")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    precompute(config, load_encoders(config))
    return 0


def load_encoders(config: PrecomputeConfig) -> Encoders:
    """The autoencoder and the text encoders of the release folder, which needs no dit/ yet."""
    device = device_of(launch.current().local_rank)
    release = Path(config.release)
    tae = TAE.from_pretrained(release / "tae").to(device).eval()
    if not config.compile:
        accelerate(tae)
    text = PromptEncoder.of_release(release, text_config(release), cache=config.text_cache)
    return Encoders(
        tae=tae,
        text=text.to(device).eval(),
        device=device,
        precision=config.precision,
        compile=config.compile,
    )


def precompute(config: PrecomputeConfig, encoders: Encoders) -> None:
    """Write what config.out lacks of this process's shards: every one of them among as many as there are."""
    with closing(Workers(config.workers, config.clip_seconds)) as workers:
        buckets = [parse(text) for text in config.buckets]
        make = _listed if config.split is None else _world
        _write(config, encoders, buckets, make(config, buckets, workers))


def _write(config: PrecomputeConfig, encoders: Encoders, buckets: Sequence[Bucket], source: _Source) -> None:
    me, folder = launch.current(), Path(config.out)
    index = shards.LatentIndex(
        buckets=source.counts, shard_size=config.shard_size, captions_per_clip=config.captions_per_clip,
        widths=encoders.text.widths,
        made_from={"source": ", ".join(config.source), "seed": str(config.seed)}
        | made_with(Path(config.release), encoders.tae),
        latent_mean=encoders.tae.config.latent_mean, latent_std=encoders.tae.config.latent_std,
    )  # fmt: skip
    with torch.inference_mode():
        shards.begin(folder, index, [_real(null.hidden[0], null.mask[0]) for null in encoders.text.null()])
    every = [(bucket, shard) for bucket in buckets for shard in range(index.num_shards(str(bucket)))]
    mine = [each for each in every[me.rank :: me.size] if not _is_made(folder, index, source, *each)]
    again = sum(shards.is_finished(folder, str(bucket), shard) for bucket, shard in mine)
    reason = f", {again} of them again: their clips or captions are not those of before" if again else ""
    print(f"{folder}: {len(mine)} of {len(every)} shards to make{reason}", flush=True)
    for done, (bucket, shard) in enumerate(mine, 1):
        began, clips = time.perf_counter(), index.shard_clips(str(bucket), shard)
        content = _encode(encoders, config, bucket, clips, source)
        shards.write_shard(folder, str(bucket), shard, content)
        speed = len(clips) / (time.perf_counter() - began)
        print(f"{bucket} shard {shard} ({done} of {len(mine)}): {speed:.1f} clips/s", flush=True)


def _is_made(folder: Path, index: shards.LatentIndex, source: _Source, bucket: Bucket, shard: int) -> bool:
    """Whether a shard is there, of the clips and captions that there are now."""
    if not shards.is_finished(folder, str(bucket), shard):
        return False
    if source.stamp is None:
        return True
    wanted = [source.stamp(bucket, clip) for clip in index.shard_clips(str(bucket), shard)]
    return shards.read_stamps(folder, str(bucket), shard) == wanted


def _world(config: PrecomputeConfig, buckets: Sequence[Bucket], workers: Workers) -> _Source:
    """Scenes of a split; buckets and seeds lie far apart, so that none shares a scene."""
    assert config.split is not None, "the source is the world"
    draw = partial(sample_scene, split=config.split)
    first = {str(bucket): (config.seed * 1000 + i) * 10**9 for i, bucket in enumerate(buckets)}

    def get(bucket: Bucket, clip: int) -> _Clip:
        seed = first[str(bucket)] + clip
        scene = draw(seed)
        captions = [describe(scene, seed, bucket, choice) for choice in range(config.captions_per_clip)]
        return _Clip(frames=workers.call(renderer(bucket), scene), captions=captions)

    return _Source(counts=_shares(config.clips or _WORLD_CLIPS, buckets), workers=workers, get=get)


def _listed(config: PrecomputeConfig, buckets: Sequence[Bucket], workers: Workers) -> _Source:
    clips = ClipSets(config.source, "source", buckets, seed=config.seed,
                     quarantine=Path(config.out) / "quarantine.jsonl", workers=workers)  # fmt: skip
    if clips.weights is not None:
        raise UserError("source: lists have no weights here; precompute each into a folder of its own and "
                        "weigh the folders, data.latents=['a weight=3','b']")  # fmt: skip
    for warning in clips.warnings if launch.current().rank == 0 else ():
        print(f"warning: {warning}", file=sys.stderr)
    counts = {str(bucket): clips.count(bucket) for bucket in buckets}
    for name, count in counts.items():
        if count == 0:
            raise UserError(f"buckets: no clip of {', '.join(config.source)} fills {name}, remove it")

    def get(bucket: Bucket, clip: int) -> _Clip:
        sample = clips.get(clip, bucket)
        return _Clip(frames=sample.video, captions=[sample.caption], stamp=sample.stamp)

    def stamp(bucket: Bucket, clip: int) -> str:
        return clips.stamp(clip, bucket)

    counts = counts if config.clips is None else _shares(config.clips, buckets)
    return _Source(counts=counts, workers=workers, get=get, stamp=stamp)


def _shares(clips: int, buckets: Sequence[Bucket]) -> dict[str, int]:
    total = sum(bucket.weight for bucket in buckets)
    return {str(bucket): max(round(clips * bucket.weight / total), 1) for bucket in buckets}


def made_with(release: Path, tae: TAE) -> dict[str, str]:
    """What names the encoders of a release in the index of latents; `tae` is the one it has."""
    made = {"tae": fingerprint(tae.state_dict()), "text": folder_fingerprint(release / "text")}
    text = text_config(release)
    if replace(text, offload=()) != TextConfig():
        named = [
            f"{s}={checkpoints.fingerprint(s.folder())}" for s in checkpoints.find(text.sources(release))
        ]
        made["text"] = " ".join([*named, text.dtype])
    return made


@torch.inference_mode()
def _encode(
    encoders: Encoders, config: PrecomputeConfig, bucket: Bucket, clips: range, source: _Source
) -> shards.Shard:
    size = bucket.batch_size or config.batch_size
    groups = [clips[i : i + size] for i in range(0, len(clips), size)]
    encoded, captions, stamps = [], [], []
    texts: list[list[np.ndarray]] = [[] for _ in encoders.text.widths]
    get = partial(source.get, bucket)
    for group in prefetch(lambda i: source.workers.map(get, groups[i]), range(len(groups)), workers=1):
        video = to_tensor([clip.frames for clip in group])
        encoded.append(stored(encoders.latent(video), f"{config.release}/tae"))
        captions += [clip.captions for clip in group]
        stamps += [clip.stamp for clip in group if clip.stamp is not None]
        prompts = [caption for clip in group for caption in clip.captions]
        for rows, states in zip(texts, encoders.text(prompts, bucket.fps), strict=True):
            hidden, mask = states.hidden.half().cpu(), states.mask.cpu()  # one trip for all of them
            rows += [_real(*state) for state in zip(hidden, mask, strict=True)]
    return shards.Shard(latent=np.concatenate(encoded), texts=texts, captions=captions, stamps=stamps)


def _real(hidden: Float[Tensor, "l d"], mask: Bool[Tensor, " l"]) -> Float[np.ndarray, "n d"]:
    """The states of the real tokens."""
    return hidden.half().cpu()[mask.cpu()].numpy()
