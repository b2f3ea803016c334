"""Clips of a release, with the functions and the metadata that `kinoflow sample` has."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kinoflow.conditioning.labels import LabelEncoder
from kinoflow.configs.devices import name_of
from kinoflow.data.clips.buckets import Bucket
from kinoflow.sample.generate import (
    Sampling,
    check_negative,
    decode_pieces,
    noise_stream,
    null_condition,
    sample_latent,
)
from kinoflow.sample.output import Output, installed
from kinoflow.sample.release import Release
from kinoflow.sample.serve.request import ClipRequest
from kinoflow.tae.model.config import LatentShape
from kinoflow.tae.tiles.tiled import DEFAULT_MEMORY

_CRF = 18.0


class ReleaseMaker:
    """Makes the clips of a release whose models stay in memory; a Maker.

    Args:
        dtype: of the backbone.
        threads: of the CPU.

    Raises:
        UserError: a damaged file, or memory that does not suffice.
    """

    def __init__(self, release: Release, *, device: torch.device, dtype: torch.dtype, threads: int) -> None:
        torch.set_num_threads(threads)
        self._release, self._device, self._dtype, self._threads = release, device, dtype, threads
        self._backbone = release.backbone(device, dtype)
        self._decoder, self._encoder = release.decoder(device), release.encoder(device=device)
        self.name = release.name
        default = release.bucket()
        self.clips = (default, *(clip for clip in release.buckets if clip != default))
        first = release.config.classes[0] if release.config.classes else "a clip"
        self.defaults = self.check(ClipRequest(prompt=first))

    def check(self, request: ClipRequest) -> ClipRequest:
        """See Maker. Of a release of classes the prompt is one, by its name or number."""
        sampling, bucket = self._sampling(request), self._bucket(request)
        check_negative(request.negative, sampling.guidance_scale)
        if request.negative is not None:
            self._named(request.negative)
        noise_stream(self._shape(bucket), request.seed)
        return replace(
            request,
            prompt=self._named(request.prompt),
            frames=bucket.frames,
            width=bucket.width,
            height=bucket.height,
            fps=bucket.fps,
            steps=sampling.num_steps,
            guidance=sampling.guidance_scale,
        )

    def _named(self, prompt: str) -> str:
        """A prompt as it is; of a release of classes the class's name."""
        return self._encoder.name(prompt) if isinstance(self._encoder, LabelEncoder) else prompt

    def _shape(self, bucket: Bucket) -> LatentShape:
        return self._decoder.config.latent_shape(bucket.frames, bucket.height, bucket.width)

    def _bucket(self, request: ClipRequest) -> Bucket:
        size = {"frames": request.frames, "height": request.height, "width": request.width}
        return self._release.bucket(**size, fps=request.fps)

    def _sampling(self, request: ClipRequest) -> Sampling:
        return self._release.sampling(num_steps=request.steps, guidance_scale=request.guidance)

    def make(self, request: ClipRequest, path: Path, progress: Callable[[float], None]) -> dict[str, Any]:
        """See Maker."""
        bucket, sampling = self._bucket(request), self._sampling(request)
        metadata = self._metadata(request, bucket, sampling)
        size = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width, "fps": bucket.fps}
        output = Output(path, **size, crf=_CRF, metadata=metadata)
        done, total = 0, sampling.num_evaluations + bucket.frames

        def advance(parts: int = 1) -> None:
            nonlocal done
            done += parts
            progress(done / total)

        output.write(self._frames(request, bucket, sampling, advance))
        return {"unknown_words": self._unknown_words(request)}

    def _frames(
        self, request: ClipRequest, bucket: Bucket, sampling: Sampling, advance: Callable[..., None]
    ) -> Iterator[np.ndarray]:
        """The frames, a few at a time; each step and each frame advances."""
        shape = self._shape(bucket)
        told = self._encoder([request.prompt], bucket.fps)
        null = null_condition(self._encoder, request.negative, bucket.fps)
        latent = sample_latent(
            self._backbone, told, null, shape, seed=request.seed, sampling=sampling, progress=advance
        )
        for piece in decode_pieces(self._decoder, latent, bucket.frames, DEFAULT_MEMORY):
            yield piece[0].numpy()
            advance(piece.shape[1])

    def _unknown_words(self, request: ClipRequest) -> list[str]:
        known = self._release.vocabulary
        return [] if known is None else known.unknown(f"{request.prompt} {request.negative or ''}")

    def _metadata(self, request: ClipRequest, bucket: Bucket, sampling: Sampling) -> dict[str, str]:
        sde, score = sampling.solver == "sde", sampling.objective == "score"
        classes = self._release.config.classes
        values = {
            "label" if classes else "prompt": request.prompt,
            "negative": request.negative,
            "seed": request.seed,
            "steps": sampling.num_steps,
            "guidance": sampling.guidance_scale,
            "schedule": sampling.schedule,
            "shift": sampling.shift if sampling.is_shifted else None,
            "solver": sampling.solver,
            "diffusion": sampling.diffusion if sde else None,
            "path": sampling.path if sde or score else None,
            "objective": sampling.objective if score else None,
            "clip": bucket,
            "release": self._release.name,
            "weights": self._release.weights_hash,
            "text_dtype": None if classes else self._release.config.text.dtype,
            "crf": _CRF,
            "device": self._device.type,
            "dtype": name_of(self._dtype),
            "threads": self._threads,
            "memory": DEFAULT_MEMORY,
            "kinoflow": installed("kinoflow"),
            "torch": installed("torch"),
        }
        return {key: str(value) for key, value in values.items() if value is not None}
