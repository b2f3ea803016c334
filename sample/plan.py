"""A clip that is to be made, with nothing left open, and a clip that was made."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from kinoflow.conditioning.labels import LabelEncoder
from kinoflow.configs.errors import UserError
from kinoflow.data.clips.buckets import Bucket
from kinoflow.sample import settings
from kinoflow.sample.cache import Passes
from kinoflow.sample.card import check_best_of
from kinoflow.sample.generate import Sampling, check_negative, check_seed
from kinoflow.sample.given import Given, Source, read_source
from kinoflow.sample.known import Windows
from kinoflow.sample.options import CRF
from kinoflow.sample.output import Output, file_metadata
from kinoflow.sample.release import Release
from kinoflow.sample.request import ClipRequest

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float, UInt8
    from torch import Tensor


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
    """Its frames, size and rate; of a clip that goes on from another, those made at once."""
    sampling: Sampling
    """How the flow is solved."""
    windows: Windows | None = None
    """Of a clip longer than the backbone's."""
    source: Source | None = field(default=None, compare=False)
    """What it is made from beside the prompt."""
    added: int = 0
    """Frames made behind the clip that it goes on from; 0 where there is none."""
    stills: bool = False
    """Whether each frame has a latent of its own: of an upsampler, whose source is the smaller clip."""
    larger: Plan | None = None
    """What an upsampler makes of the clip once it is there."""
    best_of: int = 1
    """How many clips may be made to keep the one that the release's verifier finds best."""

    @property
    def kept(self) -> int:
        """Frames of the clip that it goes on from which are encoded, and decoded with those that follow."""
        clip = self.source.clip if self.source is not None and self.added else None
        return 0 if clip is None else len(clip)

    @property
    def decoded(self) -> int:
        """Frames that the autoencoder makes."""
        return self.kept + self.added if self.added else self.bucket.frames

    @property
    def frames(self) -> int:
        """Frames of the whole clip."""
        if self.source is None or not self.added:
            return self.bucket.frames
        return self.source.before + self.added

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its frames."""
        bucket = self.bucket if self.larger is None else self.larger.bucket
        return bucket.height, bucket.width

    @property
    def num_steps(self) -> int:
        """How often `Progress` is told of it: each velocity, each frame."""
        after = self.frames if self.larger is None else self.larger.num_steps
        return self.best_of * self.num_velocities + after

    @property
    def num_velocities(self) -> int:
        """Of one take, computed or from a cache."""
        turns = -(-self.added // (self.bucket.frames - self.kept)) if self.added else 1
        return turns * self.sampling.num_evaluations


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
    passes: Passes = field(default_factory=Passes)
    """Through the backbone, and those that a cache saved."""

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


def filled(request: ClipRequest, plan: Plan) -> ClipRequest:
    """The request with the plan's settings, which gives the same plan."""
    bucket = plan.bucket
    size = {"frames": bucket.frames, "width": bucket.width, "height": bucket.height, "fps": bucket.fps}
    return replace(settings.filled(request, plan.sampling), prompt=plan.prompt, best_of=plan.best_of, **size)


def planned(release: Release, request: ClipRequest) -> Plan:
    """The clip with all defaults filled in, and what it is made from read.

    Raises:
        UserError: what cannot be made, in one line that names the key and the remedy.
    """
    if not request.prompt.strip():
        raise UserError('prompt: empty; describe the clip, for example "a red star moves left"')
    sampling = settings.chosen(release.config.sampling, request)
    if request.diffusion is not None and sampling.solver != "sde":
        raise UserError(f"diffusion: {sampling.solver} adds no noise; use solver sde with it")
    check_negative(request.negative, sampling.guidance_scale)
    bucket, windows = _bucket(release, request)
    prompt, negative = request.prompt, request.negative
    if release.config.classes:
        classes = LabelEncoder(release.config.classes)
        prompt = classes.name(prompt)
        negative = None if negative is None else classes.name(negative)
    check_seed(request.seed)
    source, added = _source(release, request, bucket)
    return Plan(
        prompt=prompt, negative=negative, seed=request.seed, bucket=bucket, sampling=sampling,
        windows=windows, source=source, added=added,
        best_of=_best_of(release, request, plain=source is None and windows is None),
    )  # fmt: skip


def _best_of(release: Release, request: ClipRequest, *, plain: bool) -> int:
    """As many as are asked for; by default the release's, of a `plain` clip: of a prompt alone, in one piece.

    Raises:
        UserError: it is no number of clips, or the release cannot choose.
    """
    if request.best_of is None:
        return release.config.best_of if plain else 1
    check_best_of(request.best_of)
    if request.best_of > 1 and not release.has_verifier:
        raise UserError(f"best_of: {release.name} has no verifier/ to choose by; leave it out")
    return request.best_of


def _bucket(release: Release, request: ClipRequest) -> tuple[Bucket, Windows | None]:
    """The clip that is asked for; one of more frames than the release makes is made in windows.

    Raises:
        UserError: the release makes no such clips.
    """
    size = {"height": request.height, "width": request.width, "fps": request.fps}
    most = max(bucket.frames for bucket in release.buckets)
    if request.frames is None or request.frames <= most or most == 1:
        return release.bucket(frames=request.frames, **size), None
    alike = release.bucket(frames=most, **size)
    length = release.tae_config.latent_shape(most, alike.height, alike.width).frames
    return replace(alike, frames=request.frames), Windows(length=length, overlap=length // 2)


def _source(release: Release, request: ClipRequest, bucket: Bucket) -> tuple[Source | None, int]:
    """What the clip is made from, and the frames that are added to a clip.

    Raises:
        UserError: files that do not go together or cannot be read, or a backbone that reads none.
    """
    given = Given(**{part.name: getattr(request, part.name) for part in fields(Given)})
    if request.seconds is not None and given.extend is None:
        raise UserError("seconds: how much extend adds; give it a clip, or use frames")
    if not given.files:
        return None, 0
    key = next(iter(given.files))
    if given.upsample is not None:
        raise UserError(f"upsample: {release.name} makes clips of prompts and none larger; name an "
                        "upsampler in --weights")  # fmt: skip
    if not release.reads_known:
        remedy = "use one that was trained with dit.known=true"
        raise UserError(f"{key}: {release.name} makes clips of text alone; {remedy}")
    if given.last is not None and bucket.frames == 1:
        raise UserError("last: a picture has one frame; leave it out, or ask for more frames")
    source = read_source(given, bucket, release.tae_config.factors[0])
    if given.extend is None:
        return source, 0
    assert source.clip is not None
    most = bucket.frames - len(source.clip)
    added = most if request.seconds is None else round(request.seconds * bucket.fps)
    if added < 1:
        raise UserError(f"seconds: {request.seconds} is not a frame at {bucket.fps} fps; use more")
    return source, added
