"""`kinoflow train precompute CONFIG.yaml … out=latents/`: clips and captions to latents and text states.

Of labelled pictures the classes take the place of the texts, and without an autoencoder their pixels that of
the latents. Started by torchrun or srun, each process makes its own shards. A shard that is there already is
skipped, unless a clip of a list or its caption has changed since.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16
from torch import Tensor

from kinoflow.conditioning import checkpoints
from kinoflow.conditioning.checkpoints import TextConfig
from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.conditioning.prompt_encoder import PromptEncoder
from kinoflow.configs import launch
from kinoflow.configs.devices import device_of
from kinoflow.configs.errors import UserError
from kinoflow.configs.files import folder_fingerprint
from kinoflow.configs.pretrained import fingerprint
from kinoflow.configs.schema import load
from kinoflow.data.clips.buckets import Bucket, parse
from kinoflow.data.clips.workers import Workers
from kinoflow.data.engine.pools import Actors
from kinoflow.data.latents import shards, stored
from kinoflow.data.latents.index import LABELS, PIXELS, LatentIndex
from kinoflow.data.prefetch import prefetch
from kinoflow.sample.card import text_config
from kinoflow.sample.stable_diffusion import StableDiffusion, is_diffusers, open_release
from kinoflow.tae.cpu.accelerate import accelerate
from kinoflow.tae.model.inflate import inflate
from kinoflow.tae.model.pixels import Pixels
from kinoflow.tae.model.tae import TAE, Posterior
from kinoflow.train.tasks.clips import to_tensor
from kinoflow.train.tasks.sources import PrecomputeConfig, Source, open_source
from kinoflow.train.tasks.upsample import Twins, generated, twins

if TYPE_CHECKING:  # seconds of imports, for those who read Stable Diffusion's texts
    from kinoflow.conditioning.clip_t5 import ClipT5Encoder

_NEEDED = {
    "out": "name the folder to write, for example out=latents/mini",
    "source": "name the clip list (Parquet or JSONL), or say source=world or source=images:FOLDER",
    "release": "name the release folder whose tae/ and text/ are to encode",
    "buckets": "give at least one, for example buckets=[16x64x64@16]",
}


@dataclass(frozen=True, kw_only=True)
class NoText:
    """Stands where the text encoders do when clips have classes."""

    widths: tuple[int, ...] = ()
    pooled_widths: tuple[int, ...] = ()

    def __call__(self, prompts: list[str], fps: Fraction) -> tuple[TextEmbedding, ...]:  # noqa: ARG002
        """No states."""
        return ()

    def null(self) -> tuple[TextEmbedding, ...]:
        """No states."""
        return ()


@dataclass(frozen=True, kw_only=True)
class Unencoded:
    """Stands where the frozen parts do when pictures are stored as they are, in [-1, 1]."""

    channels: int
    tae: None = None
    text: NoText = NoText()

    @property
    def latent_mean(self) -> tuple[float, ...]:
        """They are in the range of normalized latents already."""
        return (0.0,) * self.channels

    @property
    def latent_std(self) -> tuple[float, ...]:
        """As `latent_mean`."""
        return (1.0,) * self.channels

    def latent(self, video: Float[Tensor, "b 3 frames h w"]) -> Float[Tensor, "b c frames h w"]:
        """The pixels."""
        return Pixels(self.channels).encode(video)


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The frozen parts, where they compute and in which number format."""

    tae: TAE
    text: "PromptEncoder | ClipT5Encoder | NoText"
    device: torch.device
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False

    @cached_property
    def _encode(self) -> Callable[[Tensor], Posterior]:
        return torch.compile(self.tae.encode, dynamic=False) if self.compile else self.tae.encode

    @property
    def latent_mean(self) -> tuple[float, ...]:
        """Of each channel of the latents."""
        return self.tae.config.latent_mean

    @property
    def latent_std(self) -> tuple[float, ...]:
        """Of each channel of the latents."""
        return self.tae.config.latent_std

    @torch.inference_mode()
    def latent(self, video: Float[Tensor, "b 3 frames height width"]) -> Float[Tensor, "b c t h w"]:
        """Posterior means, not normalized."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            return self._encode(video.to(self.device)).mean.float()


def main(sources: Sequence[str]) -> int:
    """Make every shard of this process; 0."""
    config = load(PrecomputeConfig, sources)
    for key, remedy in _NEEDED.items():
        if not getattr(config, key) and (key != "release" or config.images is None):
            raise UserError(f"{key}: {remedy}")
    if config.ray is not None:
        _on_actors(config, config.ray)
        return 0
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    precompute(config, load_encoders(config))
    return 0


def load_encoders(config: PrecomputeConfig) -> Encoders | None:
    """The autoencoder and the text encoders of the release folder, which needs no dit/ yet.

    None for pictures that are stored as pixels; no text encoder where they have labels.
    """
    if not config.release:
        return None
    device = device_of(launch.current().local_rank)
    return Encoders(
        tae=_autoencoder(config, device),
        text=_texts(config, device) if config.images is None else NoText(),
        device=device,
        precision=config.precision,
        compile=config.compile,
    )


def _autoencoder(config: PrecomputeConfig, device: torch.device) -> TAE:
    release = Path(config.release)
    tae = inflate(release / "vae") if is_diffusers(release) else TAE.from_pretrained(release / "tae")
    tae = tae.to(device).eval()
    return tae if config.compile else accelerate(tae)


def _texts(config: PrecomputeConfig, device: torch.device) -> "PromptEncoder | ClipT5Encoder":
    release = Path(config.release)
    if not is_diffusers(release):
        encoder = PromptEncoder.of_release(release, text_config(release), cache=config.text_cache)
        return encoder.to(device).eval()
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    opened = open_release(release, dtype=dtype)
    assert isinstance(opened, StableDiffusion), "it is laid out as one"
    return opened.encoder(None if config.text_cache is None else Path(config.text_cache), device)


def precompute(config: PrecomputeConfig, encoders: Encoders | None) -> None:
    """Write what config.out lacks of this process's shards: every one of them among as many as there are.

    Without `encoders` the source's pixels are stored.
    """
    me = launch.current()
    with closing(Workers(config.workers, config.clip_seconds)) as workers:
        work = _Work.of(config, encoders, workers)
        todo = _begun(work, me.rank, me.size)
        print(todo, flush=True)
        for done, each in enumerate(todo.shards, 1):
            print(f"{_made(work, *each)} ({done} of {len(todo.shards)})", flush=True)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """All that a shard is made with."""

    config: PrecomputeConfig
    encoders: Encoders | Unencoded
    source: Source
    index: LatentIndex

    @classmethod
    def of(cls, config: PrecomputeConfig, encoders: Encoders | None, workers: Workers) -> "_Work":
        source = open_source(config, [parse(text) for text in config.buckets], workers)
        coding = encoders or Unencoded(channels=config.channels or (1 if source.grey else 3))
        index = LatentIndex(
            buckets=source.counts, shard_size=config.shard_size, captions_per_clip=config.captions_per_clip,
            widths=coding.text.widths, latent_mean=coding.latent_mean, latent_std=coding.latent_std,
            made_from={"source": ", ".join(config.source), "seed": str(config.seed)} | dict(source.made_from)
            | made_with(Path(config.release), coding.tae, labelled=config.images is not None),
            classes=source.classes, keyframes=config.keyframes, upsample=config.upsample,
            pooled=coding.text.pooled_widths if any(coding.text.pooled_widths) else (),
        )  # fmt: skip
        return cls(config=config, encoders=coding, source=source, index=index)


@dataclass(frozen=True, kw_only=True)
class _Todo:
    """The shards that are to be made, by bucket and number, `of` so many; `again` are there already."""

    folder: str
    shards: Sequence[tuple[str, int]]
    of: int
    again: int

    def __str__(self) -> str:
        again = f"{self.again} of them again: their clips or captions are not those of before"
        said = f"{self.folder}: {len(self.shards)} of {self.of} shards to make"
        return f"{said}, {again}" if self.again else said


def _begun(work: _Work, rank: int, size: int) -> _Todo:
    """Write the index where there is none; what is to be done by the process of this rank among so many."""
    folder, text = Path(work.config.out), work.encoders.text
    with torch.inference_mode():
        null = text.null()
        pooled = [None if one.pooled is None else _array(one.pooled[0]) for one in null]
        shards.begin(folder, work.index, [_real(one.hidden[0], one.mask[0]) for one in null], pooled)
    buckets = [parse(text) for text in work.config.buckets]
    every = [(bucket, shard) for bucket in buckets for shard in range(work.index.num_shards(str(bucket)))]
    mine = [each for each in every[rank::size] if not _is_made(folder, work.index, work.source, *each)]
    named = [(str(bucket), shard) for bucket, shard in mine]
    again = sum(shards.is_finished(folder, *each) for each in named)
    return _Todo(folder=str(folder), shards=named, of=len(every), again=again)


def _made(work: _Work, name: str, shard: int) -> str:
    """Make a shard; what is said of it."""
    bucket = next(each for each in map(parse, work.config.buckets) if str(each) == name)
    began, clips = time.perf_counter(), work.index.shard_clips(name, shard)
    content = _encode(work.encoders, work.config, bucket, clips, work.source)
    shards.write_shard(Path(work.config.out), name, shard, content)
    return f"{name} shard {shard}: {len(clips) / (time.perf_counter() - began):.1f} clips/s"


def _on_actors(config: PrecomputeConfig, address: str) -> None:
    """As `precompute`, by the actors of a Ray cluster; this process sees neither models nor clips."""
    if launch.current().size > 1:
        raise UserError("ray: is for one process, torchrun started several; leave out one of them")
    with closing(Actors(address, config.actors, _opened, (config,))) as actors:
        (todo,) = actors.run(_begun, [(0, 1)])
        print(todo, flush=True)
        for done, said in enumerate(actors.run(_made, todo.shards), 1):
            print(f"{said} ({done} of {len(todo.shards)})", flush=True)


def _opened(config: PrecomputeConfig) -> _Work:
    """What an actor keeps until it ends."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return _Work.of(config, load_encoders(config), Workers(config.workers, config.clip_seconds))


def _is_made(folder: Path, index: LatentIndex, source: Source, bucket: Bucket, shard: int) -> bool:
    """Whether a shard is there, of the clips and captions that there are now."""
    if not shards.is_finished(folder, str(bucket), shard):
        return False
    if source.stamp is None:
        return True
    wanted = [source.stamp(bucket, clip) for clip in index.shard_clips(str(bucket), shard)]
    return shards.read_stamps(folder, str(bucket), shard) == wanted


def made_with(release: Path, tae: TAE | None, *, labelled: bool) -> dict[str, str]:
    """What names the encoders of a release in the index of latents, or what is in their place.

    `tae` is the one it has, None where the latents are pixels; clips that are `labelled` have no texts.
    """
    return {
        "tae": PIXELS if tae is None else fingerprint(tae.state_dict()),
        "text": LABELS if labelled else _made_with_texts(release),
    }


def _made_with_texts(release: Path) -> str:
    if is_diffusers(release):
        return checkpoints.clip_t5_fingerprint(release)
    text = text_config(release)
    if replace(text, offload=()) == TextConfig():
        return folder_fingerprint(release / "text")
    named = [f"{s}={checkpoints.fingerprint(s.folder())}" for s in checkpoints.find(text.sources(release))]
    return " ".join([*named, text.dtype])


@torch.inference_mode()
def _encode(
    encoders: Encoders | Unencoded, config: PrecomputeConfig, bucket: Bucket, clips: range, source: Source
) -> shards.Shard:
    size = bucket.batch_size or config.batch_size
    groups = [clips[i : i + size] for i in range(0, len(clips), size)]
    encoded, captions, stamps, labels, keyframes, smaller = [], [], [], [], [], []
    texts: list[list[np.ndarray]] = [[] for _ in encoders.text.widths]
    pooled: list[list[np.ndarray]] = [[] for _ in encoders.text.widths]
    get, tae = partial(source.get, bucket), f"{config.release}/tae"
    read = prefetch(lambda i: source.workers.map(get, groups[i]), range(len(groups)), workers=1)
    for numbers, group in zip(groups, read, strict=True):
        video = to_tensor([clip.frames for clip in group])
        if config.upsample:
            found = _twins(encoders, config, bucket, numbers, video)
            encoded.append(stored(found.latent, tae))
            smaller.append(stored(found.smaller, tae))
        else:
            encoded.append(stored(encoders.latent(video), tae))
        if config.keyframes and bucket.frames > 1:
            keyframes.append(stored(_alone(encoders, video), tae))
        captions += [clip.captions for clip in group]
        stamps += [clip.stamp for clip in group if clip.stamp is not None]
        labels += [clip.label for clip in group if clip.label is not None]
        prompts = [caption for clip in group for caption in clip.captions]
        for rows, whole, states in zip(texts, pooled, encoders.text(prompts, bucket.fps), strict=True):
            hidden, mask = states.hidden.half().cpu(), states.mask.cpu()  # one trip for all of them
            rows += [_real(*state) for state in zip(hidden, mask, strict=True)]
            whole.extend(() if states.pooled is None else _array(states.pooled))
    return shards.Shard(
        latent=np.concatenate(encoded), texts=texts, captions=captions, stamps=stamps, labels=labels,
        keyframes=np.concatenate(keyframes) if keyframes else None, pooled=pooled,
        smaller=np.concatenate(smaller) if smaller else None,
    )  # fmt: skip


def _twins(
    encoders: Encoders | Unencoded,
    config: PrecomputeConfig,
    bucket: Bucket,
    clips: Sequence[int],
    video: Float[Tensor, "b 3 frames height width"],
) -> Twins:
    assert encoders.tae is not None, "the configuration asks for a release"
    made = generated(config.seed, str(bucket).partition(" ")[0], clips)
    return twins(encoders.latent, encoders.tae, video, config.upsample, made)


def _alone(
    encoders: Encoders | Unencoded, video: Float[Tensor, "b 3 frames height width"]
) -> Float[Tensor, "b k c h w"]:
    """Latents of the first frame and of the last of each latent frame, each a clip of one frame."""
    frames, span = video.shape[2], 1 if encoders.tae is None else encoders.tae.config.factors[0]
    ends = [0, *(min(end, frames) - 1 for end in range(span, frames + span, span))]
    pictures = torch.cat([video[:, :, end : end + 1] for end in ends])
    return torch.stack(encoders.latent(pictures)[:, :, 0].chunk(len(ends)), dim=1)


def _real(hidden: Float[Tensor, "l d"], mask: Bool[Tensor, " l"]) -> Float[np.ndarray, "n d"]:
    """The states of the real tokens."""
    return hidden.half().cpu()[mask.cpu()].numpy()


def _array(values: Float[Tensor, "*n"]) -> Float16[np.ndarray, "*n"]:
    return values.half().cpu().numpy()
