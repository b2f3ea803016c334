"""`Pipeline`: a release with its models in memory, which makes videos of prompts or classes.

The command, the server and Python programs go through it, so that all of them give the same frames. `batch`
says how several are made at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kinoflow.conditioning.embedding import Condition
from kinoflow.conditioning.labels import LabelEncoder
from kinoflow.configs.devices import name_of, parse_device, parse_dtype
from kinoflow.configs.errors import UserError
from kinoflow.data.clips.buckets import Bucket
from kinoflow.dit_video.backbone import Backbone
from kinoflow.sample.batch import alive, in_threads
from kinoflow.sample.generate import (
    Encoder,
    Sampling,
    SolverName,
    check_negative,
    check_seed,
    decode_pieces,
    null_condition,
    sample_latent,
)
from kinoflow.sample.output import Output, file_metadata, installed
from kinoflow.sample.release import Release
from kinoflow.sample.request import ClipRequest
from kinoflow.sample.stable_diffusion import open_release
from kinoflow.tae.model.pixels import Pixels
from kinoflow.tae.model.tae import TAE
from kinoflow.tae.tiles.tiled import DEFAULT_MEMORY

CRF = 18.0
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A clip that can be made, with nothing left open."""

    prompt: str
    """What it shows; of a release of classes the name of one."""
    negative: str | None
    """What it is steered away from."""
    seed: int
    """Of its noise."""
    bucket: Bucket
    """Its frames, size and rate."""
    sampling: Sampling
    """How the flow is solved."""

    @property
    def num_steps(self) -> int:
        """How often `Progress` is told of it: each velocity, each frame."""
        return self.sampling.num_evaluations + self.bucket.frames


# Called with the velocities or frames that were just made; what it raises ends the work.
Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Video:
    """A clip that was made."""

    frames: UInt8[np.ndarray, "frames height width 3"]
    """RGB, 0..255."""
    fps: Fraction
    """Frames per second."""
    metadata: dict[str, str]
    """All that decides the frames, as it goes into files: what `kinoflow sample again` reads."""
    latent: Float[Tensor, "1 c t h w"] | None = None
    """Normalized, where it was asked for."""

    def save(self, path: str | Path, *, crf: float | int = CRF) -> Path:
        """Write it, as what the name ends in (see `Output`); returns the path.

        Raises:
            UserError: a name or folder that does not work, or a full disk.
        """
        path, (count, height, width, _) = Path(path), self.frames.shape
        metadata = file_metadata(path, self.metadata, crf)
        size = {"frames": count, "height": height, "width": width, "fps": self.fps}
        Output(path, **size, crf=crf, metadata=metadata).write([self.frames])
        return path


class Pipeline:
    """A release that makes videos; its models are read when the first one is asked for.

    Args:
        device: of the models.
        dtype: of the backbone's weights; flow time, the state of the flow and the autoencoder stay in fp32.
        threads: of the CPU for each clip. It decides how kernels round, so it belongs to the settings that
            give equal frames; 1 is what the command has.
        memory: bytes that the tiles may take in which a large clip is decoded, of each clip of a batch.
        text_cache: folder that keeps the text states of prompts.
        lora: the adapters of the release by name, for the metadata.
    """

    def __init__(
        self,
        release: Release,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
        memory: int = DEFAULT_MEMORY,
        text_cache: Path | None = None,
        lora: Sequence[str] = (),
    ) -> None:
        if threads < 1:
            raise UserError(f"threads: {threads}; use 1 or more")
        self.release, self.device, self.dtype = release, torch.device(device), dtype
        self.threads, self.memory, self._text_cache, self._lora = threads, memory, text_cache, tuple(lora)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        revision: str | None = None,
        lora: Sequence[str] = (),
        device: str = "auto",
        dtype: str = "auto",
        threads: int = 1,
        memory: int = DEFAULT_MEMORY,
        text_cache: Path | None = None,
    ) -> Pipeline:
        """Open a folder or hub id, by default the shipped mini release; Stable Diffusion 3's are taken too.

        `revision` is a branch, tag or commit of a hub id; `device` and `dtype` are as the command has them:
        "auto" takes the GPU where there is one, and bf16 on it.

        Raises:
            UserError: a missing or damaged file, a device that is not there, adapters that do not fit.
        """
        on = parse_device(device)
        number = parse_dtype(dtype, on)
        release = open_release(source, lora, number, revision)
        return cls(
            release, device=on, dtype=number, threads=threads, memory=memory, text_cache=text_cache, lora=lora
        )

    def __call__(
        self,
        prompt: str,
        *,
        seed: int = 0,
        negative: str | None = None,
        frames: int | None = None,
        width: int | None = None,
        height: int | None = None,
        fps: Fraction | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        solver: SolverName | None = None,
        diffusion: float | None = None,
        latent: bool = False,
        progress: Progress | None = None,
    ) -> Video:
        """The video of a prompt (of a release of classes: of a class), the same for the same arguments.

        Settings that are None are the release's. `latent` keeps the latent beside the frames; `progress` is
        called with 1 after each velocity and with the number of frames after each piece that was decoded.

        Raises:
            UserError: what the release cannot make, in one line.
        """
        request = ClipRequest(
            prompt=prompt, negative=negative, seed=seed, frames=frames, width=width, height=height, fps=fps,
            steps=steps, guidance=guidance, solver=solver, diffusion=diffusion,
        )  # fmt: skip
        return self.make(self.plan(request), latent=latent, progress=progress)

    def batch(self, requests: Sequence[ClipRequest], *, at_once: int | None = None) -> Iterator[Video]:
        """Videos of many requests, in their order, `at_once` of them at a time; each equals the one alone.

        Raises:
            UserError: before anything is made, what the release cannot make.
        """
        plans = [self.plan(request) for request in requests]
        return self.at_once(self.make, plans, at_once)

    def at_once(self, work: Callable[[T], R], items: Sequence[T], count: int | None = None) -> Iterator[R]:
        """Results of `work` for all items, in their order, up to `count` (see `default_batch`) at a time.

        What `work` raises comes out at its place, and what has not begun is left undone.

        Raises:
            UserError: a count below 1.
        """
        count = self.default_batch if count is None else count
        if count < 1:
            raise UserError(f"batch: {count}; use 1 or more")
        if min(count, len(items)) == 1:
            return map(work, items)
        self.load()  # once, before there are threads
        return in_threads(work, items, count)

    @property
    def default_batch(self) -> int:
        """As many clips at once as the CPU has cores for; 1 on a GPU, where one clip keeps it busy.

        A clip of the mini release of 4 steps costs 1.3 s of CPU time, alone and beside another one: a second
        one loses nothing, and more than there are cores for would only take memory.
        """
        if self.device.type != "cpu":
            return 1
        return max(1, (os.cpu_count() or 1) // self.threads)

    def plan(self, request: ClipRequest) -> Plan:
        """The clip with all defaults filled in.

        Raises:
            UserError: what cannot be made, in one line that names the key and the remedy.
        """
        if not request.prompt.strip():
            raise UserError('prompt: empty; describe the clip, for example "a red star moves left"')
        sampling = self.release.sampling(
            num_steps=request.steps,
            guidance_scale=request.guidance,
            solver=request.solver,
            diffusion=request.diffusion,
        )
        if request.diffusion is not None and sampling.solver != "sde":
            raise UserError(f"diffusion: {sampling.solver} adds no noise; use solver sde with it")
        check_negative(request.negative, sampling.guidance_scale)
        size = {"frames": request.frames, "height": request.height, "width": request.width}
        bucket = self.release.bucket(**size, fps=request.fps)
        prompt, negative = request.prompt, request.negative
        if self.release.config.classes:
            classes = LabelEncoder(self.release.config.classes)
            prompt = classes.name(prompt)
            negative = None if negative is None else classes.name(negative)
        check_seed(request.seed)
        return Plan(prompt=prompt, negative=negative, seed=request.seed, bucket=bucket, sampling=sampling)

    def load(self) -> None:
        """Read the models now: text encoders, backbone, decoder.

        Raises:
            UserError: a damaged file.
        """
        _ = self._models

    @cached_property
    def _models(self) -> tuple[Backbone, TAE | Pixels, Encoder]:
        encoder = self.release.encoder(self._text_cache, self.device)
        return self.release.backbone(self.device, self.dtype), self.release.decoder(self.device), encoder

    @property
    def decoder(self) -> TAE | Pixels:
        """What makes frames of latents."""
        return self._models[1]

    def bytes(self) -> dict[str, int]:
        """Memory that the weights of each part take."""
        names = ("backbone", "decoder", "text")
        return {name: _bytes(model) for name, model in zip(names, self._models, strict=True)}

    def make(self, plan: Plan, *, latent: bool = False, progress: Progress | None = None) -> Video:
        """The video of a plan, all of its frames in memory."""
        found = self.latent(plan, progress)
        frames = np.concatenate(list(self.decode(plan, found, progress)))
        kept = found if latent else None
        return Video(frames=frames, fps=plan.bucket.fps, metadata=self.metadata(plan), latent=kept)

    def pieces(
        self, plan: Plan, progress: Progress | None = None
    ) -> Iterator[UInt8[np.ndarray, "_ height width 3"]]:
        """The frames of a plan, a few at a time, in order: memory does not grow with the clip's length."""
        return self.decode(plan, self.latent(plan, progress), progress)

    def latent(self, plan: Plan, progress: Progress | None = None) -> Float[Tensor, "1 c t h w"]:
        """The normalized latent of a plan, which takes most of the time."""
        return self.flow(plan, self.conditions(plan), progress)

    def conditions(self, plan: Plan) -> tuple[Condition, Condition]:
        """What the backbone is told of the prompt, and of what it is steered away from."""
        encoder, fps = self._models[2], plan.bucket.fps
        with _threads(self.threads):
            return encoder([plan.prompt], fps), null_condition(encoder, plan.negative, fps)

    def flow(
        self, plan: Plan, conditions: tuple[Condition, Condition], progress: Progress | None = None
    ) -> Float[Tensor, "1 c t h w"]:
        """The normalized latent of a plan whose `conditions` are there."""
        bucket = plan.bucket
        shape = self.decoder.config.latent_shape(bucket.frames, bucket.height, bucket.width)
        with _threads(self.threads):
            return sample_latent(
                self._models[0], *conditions, shape, seed=plan.seed, sampling=plan.sampling,
                progress=lambda: _tell(progress, 1),
            )  # fmt: skip

    def decode(
        self, plan: Plan, latent: Float[Tensor, "1 c t h w"], progress: Progress | None = None
    ) -> Iterator[UInt8[np.ndarray, "_ height width 3"]]:
        """The frames of a latent, a few at a time, in order.

        Raises:
            UserError: frames too large for the memory, when the first piece is asked for.
        """
        with _threads(self.threads):
            for piece in decode_pieces(self.decoder, latent, plan.bucket.frames, self.memory):
                yield piece[0].numpy()
                _tell(progress, piece.shape[1])
                del piece  # not held while the next one is made

    def unknown_words(self, plan: Plan) -> list[str]:
        """Words of a plan that mean nothing to the release."""
        known = self.release.vocabulary
        return [] if known is None else known.unknown(f"{plan.prompt} {plan.negative or ''}")

    def metadata(self, plan: Plan) -> dict[str, str]:
        """All that decides the frames on a machine of one kind: what makes the clip again."""
        sampling, release = plan.sampling, self.release
        sde, score = sampling.solver == "sde", sampling.objective == "score"
        values = {
            "label" if release.config.classes else "prompt": plan.prompt,
            "negative": plan.negative,
            "seed": plan.seed,
            "steps": sampling.num_steps,
            "guidance": sampling.guidance_scale,
            "schedule": sampling.schedule,
            "shift": sampling.shift if sampling.is_shifted else None,
            "solver": sampling.solver,
            "diffusion": sampling.diffusion if sde else None,
            "path": sampling.path if sde or score else None,
            "objective": sampling.objective if score else None,
            "clip": plan.bucket,
            "release": release.name,
            "weights": release.weights_hash,
            "lora": " ".join(self._lora) or None,
            "text_dtype": None if release.config.classes else release.config.text.dtype,
            "device": self.device.type,
            "dtype": name_of(self.dtype),
            "threads": self.threads,
            "memory": self.memory,
            "kinoflow": installed("kinoflow"),
            "torch": installed("torch"),
        }
        return {key: str(value) for key, value in values.items() if value is not None}


def filled(request: ClipRequest, plan: Plan) -> ClipRequest:
    """The request with the plan's settings, which gives the same plan."""
    bucket, sampling = plan.bucket, plan.sampling
    return replace(
        request, prompt=plan.prompt, frames=bucket.frames, width=bucket.width, height=bucket.height,
        fps=bucket.fps, steps=sampling.num_steps, guidance=sampling.guidance_scale,
    )  # fmt: skip


def _bytes(model: object) -> int:
    tensors = (*model.parameters(), *model.buffers()) if isinstance(model, torch.nn.Module) else ()
    return sum(tensor.nbytes for tensor in tensors)


def _tell(progress: Progress | None, count: int) -> None:
    alive()
    if progress is not None:
        progress(count)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute on so many threads, in this thread of Python alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
