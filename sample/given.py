"""What a clip is made from beside its prompt.

A picture that it begins with, one that it ends with, a clip to go on from, or one to change in places.

Pictures and clips of any size are brought to the clip's as training brings them: the centre of its aspect,
resized; clips to its frame rate, with frames repeated or dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import file_digest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.data.clips.buckets import Bucket
from kinoflow.data.clips.fit import fit
from kinoflow.data.video import probe, read
from kinoflow.data.video.footage import footage
from kinoflow.dit_video.flow.known import Known, keep, nothing, show, went_on
from kinoflow.sample.seam import going_on
from kinoflow.tae.model.pixels import from_bytes
from kinoflow.tae.model.tae import TAE

_CHUNK = 32  # frames read at once
_MARGIN = 4  # pixels around what is to change, over which the old becomes the new
Frames = UInt8[np.ndarray, "frames height width 3"]
Piece = UInt8[np.ndarray, "_ height width 3"]


@dataclass(frozen=True, kw_only=True)
class Given:
    """Files that a clip is made from.

    Raises:
        UserError: files that do not go together.
    """

    image: str | None = None
    """Picture that the clip begins with."""
    last: str | None = None
    """Picture that it ends with."""
    extend: str | None = None
    """Clip that it goes on from."""
    edit: str | None = None
    """Clip that is changed."""
    mask: str | None = None
    """Picture, white where `edit` is made anew."""
    upsample: str | None = None
    """Clip that is made larger."""

    def __post_init__(self) -> None:
        ways = [key for key in ("image", "extend", "edit", "upsample") if getattr(self, key) is not None]
        if len(ways) > 1:
            raise UserError(f"{ways[1]}: not beside {ways[0]}; give one of the two")
        if self.last is not None and self.image is None:
            raise UserError("last: needs image as well, the picture that the clip begins with")
        if (self.edit is None) != (self.mask is None):
            raise UserError("mask: says where edit is made anew; give both")

    @property
    def files(self) -> dict[str, str]:
        """Those that are given."""
        return {key: path for key, path in asdict(self).items() if path is not None}

    @cached_property
    def described(self) -> dict[str, str]:
        """For metadata: where each file is, and what is in it.

        Raises:
            UserError: a file that cannot be read.
        """
        return {
            name: value
            for key, path in self.files.items()
            for name, value in ((key, str(Path(path).absolute())), (f"{key}_sha256", _digest(Path(path))))
        }

    @classmethod
    def again(cls, written: Mapping[str, str]) -> Given:
        """What metadata describe, if it is what it was.

        Raises:
            UserError: a file is gone or has changed.
        """
        given = cls(**{key: written[key] for key in asdict(cls()) if key in written})
        for key, path in given.files.items():
            if _digest(Path(path)) != written.get(f"{key}_sha256"):
                raise UserError(f"{path}: has changed since the clip was made; put it back")
        return given


@dataclass(frozen=True, kw_only=True)
class Source:
    """Given files at the size and rate of a clip that can be made."""

    given: Given
    bucket: Bucket
    first: UInt8[np.ndarray, "1 height width 3"] | None = None
    last: UInt8[np.ndarray, "1 height width 3"] | None = None
    clip: Frames | None = None
    """What stays of `edit` where it is not masked; of `extend` its end, a whole number of latent frames; of
    `upsample` all of it, at its own size."""
    mask: Bool[np.ndarray, "height width"] | None = None
    before: int = 0
    """Frames of `extend` that come before what is made."""

    def earlier(self) -> Iterator[Frames]:
        """The frames of `extend` before those that are made once more, a few at a time."""
        assert self.given.extend is not None and self.clip is not None
        left = self.before - len(self.clip)
        for frames in _stream(Path(self.given.extend), self.bucket):
            if left > 0:
                yield frames[:left]
            left -= len(frames)

    def joined(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Frames that were made, a few at a time, with those of the clip that stay."""
        if self.clip is None:
            yield from pieces
        elif self.mask is None:
            yield from going_on(self.clip, pieces)
        else:
            start, share = 0, _share(self.mask)[..., None]
            for made in pieces:
                own = self.clip[start : start + len(made)]
                yield np.rint(share * made + (1 - share) * own).astype(np.uint8)
                start += len(made)
                del made  # not held while the next ones are


def read_source(given: Given, bucket: Bucket, factor: int) -> Source:
    """Read what is given for a clip of the bucket, of which a latent frame holds `factor` frames.

    Raises:
        UserError: a file that is no picture or clip, or too short.
    """
    first, last = (
        None if path is None else _picture(Path(path), bucket) for path in (given.image, given.last)
    )
    if given.extend is not None:
        clip, before = _end(Path(given.extend), bucket, factor)
        return Source(given=given, bucket=bucket, clip=clip, before=before)
    if given.edit is not None and given.mask is not None:
        mask = _picture(Path(given.mask), bucket)[0].mean(axis=-1) > 127
        if not mask.any():
            raise UserError(f"{given.mask}: is black everywhere, and white is what is made anew")
        clip = _beginning(Path(given.edit), bucket)
        return Source(given=given, bucket=bucket, clip=clip, mask=_grown(mask))
    return Source(given=given, bucket=bucket, first=first, last=last)


@torch.no_grad()
def known_of(source: Source, tae: TAE, frames: int) -> Known:
    """What a backbone is told of a clip of so many latent frames."""

    def encoded(pixels: Frames) -> Float[Tensor, "1 c t h w"]:
        device = next(tae.parameters()).device
        return tae.normalize(tae.encode(from_bytes(torch.from_numpy(pixels)[None].to(device))).mean)

    ends = source.first if source.first is not None else source.clip
    assert ends is not None, "something is given"
    latent = encoded(ends)
    whole = latent.new_zeros(*latent.shape[:2], frames, *latent.shape[3:])
    if source.first is not None:
        known = show(nothing(whole), 0, latent[:, :, 0])
        return known if source.last is None else show(known, -1, encoded(source.last)[:, :, 0])
    whole[:, :, : latent.shape[2]] = latent
    if source.mask is None:
        return went_on(whole, latent.shape[2], encoded(ends[-1:])[:, :, 0])
    cells = F.adaptive_max_pool2d(torch.from_numpy(source.mask)[None, None].float(), latent.shape[3:])
    return keep(whole, (1 - cells)[:, :, None].expand(-1, -1, frames, -1, -1))


@torch.no_grad()
def last_alone(tae: TAE, latent: Float[Tensor, "1 c t h w"]) -> Float[Tensor, "1 c h w"]:
    """The last frame of a clip as a picture: normalized latents of both."""
    count = latent.shape[2] * tae.config.factors[0]
    frame = tae.decode(tae.denormalize(latent), count, slice(count - 1, count))
    return tae.normalize(tae.encode(frame.clamp(-1, 1)).mean)[:, :, 0]


def extended(
    make: Callable[[Known, int], Float[Tensor, "1 c t h w"]],
    begin: Known,
    end: int,
    frames: int,
    alone: Callable[[Float[Tensor, "1 c end h w"]], Float[Tensor, "1 c h w"]],
) -> Float[Tensor, "1 c _ h w"]:
    """A latent of `frames` latent frames that begins as `begin` does, whose first `end` are kept.

    `make` makes a clip of what is known, in turns counted from 0; each turn keeps the last `end` frames of
    what there is, and sees the last of them `alone`.
    """
    known, latent, turn = begin, begin.latent[:, :, :end], 0
    while latent.shape[2] < frames:
        if turn > 0:
            whole = torch.zeros_like(begin.latent)
            whole[:, :, :end] = latent[:, :, -end:]
            known = went_on(whole, end, alone(whole[:, :, :end]))
        latent, turn = torch.cat((latent, make(known, turn)[:, :, end:]), dim=2), turn + 1
    return latent[:, :, :frames]


def _picture(path: Path, bucket: Bucket) -> UInt8[np.ndarray, "1 height width 3"]:
    frames = probe(path).frames
    if frames > 1:
        raise UserError(f"{path}: has {frames} frames; give a picture")
    return fit(read(path), bucket.height, bucket.width)


def _stream(path: Path, bucket: Bucket) -> Iterator[Frames]:
    for chunk in footage(path, bucket.fps).stream(_CHUNK):
        yield fit(chunk, bucket.height, bucket.width)


def _end(path: Path, bucket: Bucket, factor: int) -> tuple[Frames, int]:
    """The last frames that a new clip keeps, half of it where there are as many, and how many there are."""
    most = max(bucket.frames // 2 // factor, 1) * factor
    kept: deque[np.ndarray] = deque(maxlen=most)
    before = 0
    for chunk in _stream(path, bucket):
        kept.extend(chunk)
        before += len(chunk)
    count = len(kept) // factor * factor
    if count == 0 or bucket.frames <= factor:
        need = f"to go on from it takes {factor}, and a clip of more than {factor}"
        raise UserError(f"{path}: has {before} frames at {bucket.fps} fps; {need}")
    return np.stack(list(kept)[-count:]), before


def _beginning(path: Path, bucket: Bucket) -> Frames:
    found: list[np.ndarray] = []
    for chunk in _stream(path, bucket):
        found.append(chunk)
        if sum(map(len, found)) >= bucket.frames:
            break
    frames = np.concatenate(found)[: bucket.frames]
    if len(frames) < bucket.frames:
        remedy = f"{bucket.frames} are made; give a longer clip, or --frames and --fps that it fills"
        raise UserError(f"{path}: has {len(frames)} frames at {bucket.fps} fps, and {remedy}")
    return frames


def _grown(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    side = 2 * _MARGIN + 1
    pooled = F.max_pool2d(torch.from_numpy(mask)[None, None].float(), side, stride=1, padding=_MARGIN)
    return pooled[0, 0].numpy() > 0


def _share(mask: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """How much is new: 0 outside of the mask, 1 where its edge is `_MARGIN` pixels away."""
    padded = F.pad(torch.from_numpy(mask)[None, None].float(), (_MARGIN,) * 4, mode="replicate")
    inside = F.avg_pool2d(padded, 2 * _MARGIN + 1, stride=1)[0, 0].numpy()
    return np.clip(2 * inside - 1, 0, 1) * mask


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error
