"""What a sampled clip is called, what is written into it, and how it reaches the disk."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16, UInt8

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.configs.files import seeded
from kinoflow.data.latents.kino import CHUNK, LatentInfo, write
from kinoflow.data.video import VideoWriter, probe
from kinoflow.sample import picture

_SLUG_LENGTH = 60
_OTHER_PICTURES = frozenset({".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ""})


def slug(prompt: str) -> str:
    """The prompt as a file name: ASCII letters and digits joined by dashes, "clip" when none is left."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    return "-".join(words)[:_SLUG_LENGTH].strip("-") or "clip"


def derived_seed(seed: int, prompt: str, repeat: int = 0) -> int:
    """A seed of its own for each prompt of a list, whatever stands before it; `repeat` counts equal lines."""
    return seeded("prompt", seed, repeat, prompt) % 2**32


def free_path(path: Path, taken: Collection[Path] = ()) -> Path:
    """The path itself, or with -2, -3, ... before its suffix when such files exist or are `taken`."""
    number, free = 1, path
    while free in taken or free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def is_lossless(path: Path) -> bool:
    """Whether what is written there has no quality to choose, as H.264 has one."""
    return path.suffix.lower() in picture.SUFFIXES


def file_metadata(path: Path, metadata: Mapping[str, str], crf: float | int) -> dict[str, str]:
    """What a file at the path says of itself: what made its frames, and its quality where it has one."""
    return dict(metadata) if is_lossless(path) else {**metadata, "crf": str(float(crf))}


def read_metadata(path: Path) -> dict[str, str]:
    """What a clip or picture says of itself.

    Raises:
        UserError: a file that cannot be read.
    """
    return picture.read_metadata(path) if is_lossless(path) else dict(probe(path).metadata)


def finished(path: Path, metadata: Mapping[str, str]) -> bool:
    """Whether a readable file made with exactly this metadata is at the path."""
    try:
        written = read_metadata(path)
    except (UserError, OSError):
        return False
    return all(written.get(key) == value for key, value in metadata.items())


class Output:
    """A clip to be written: what can be wrong about it is found before any sampling.

    Args:
        path: ends in .mp4 (.m4v, .mov), .gif, .webp, or .png: a frame as it is, of more a contact sheet.
        metadata: goes into the file.

    Raises:
        UserError: a name, quality or folder that does not work.
    """

    def __init__(
        self,
        path: Path,
        *,
        frames: int,
        height: int,
        width: int,
        fps: Fraction,
        crf: float | int,
        metadata: Mapping[str, str],
    ) -> None:
        self.path, self._metadata, self._writer = path, dict(metadata), None
        self._shape: dict[str, Any] = {"frames": frames, "height": height, "width": width, "fps": fps}
        if frames == 1 and path.suffix.lower() in _OTHER_PICTURES:
            raise UserError(f"{path}: a picture is written as PNG; end the name in .png")
        if not is_lossless(path):
            self._writer = VideoWriter(path, fps=fps, width=width, height=height, crf=crf, metadata=metadata)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(os_error_line(path, error)) from None
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(f"{path}: cannot be written there; name a file in a folder of yours with --out")

    def write(self, pieces: Iterable[UInt8[np.ndarray, "_ height width 3"]]) -> None:
        """Write the clip, a few frames at a time; the file appears whole or not at all.

        Of an mp4 no more than that is held; pictures are held whole.

        Raises:
            UserError: the disk is full, or the file cannot be written.
            Exception: what `pieces` raises; then there is no file.
        """
        if self._writer is not None:
            with self._writer as writer:
                for piece in pieces:
                    writer.write(piece)
                    del piece  # not held while the next one is made
            return
        frames = np.concatenate(list(pieces))
        picture.write_picture(self.path, frames, self._shape["fps"], self._metadata)

    def save_latent(self, latent: Float16[np.ndarray, "t c h w"], *, tae: str, tae_sha256: str) -> Path:
        """Keep the latent of a clip that could not be decoded, as a latent file beside it; returns its path.

        `latent` is not normalized; `tae` says where its autoencoder is, `tae_sha256` is the fingerprint.

        Raises:
            UserError: the file cannot be written.
        """
        path = free_path(self.path.with_suffix(".kino"))
        info = LatentInfo(
            **self._shape,
            color={},
            source=self._metadata.get("prompt", self.path.name),
            tae=tae,
            tae_sha256=tae_sha256,
            channels=latent.shape[1],
            tile=CHUNK,
            metadata=self._metadata,
        )
        write(path, info, latent)
        return path


def installed(package: str) -> str:
    """The version of a package, "unknown" where it is not installed: in a bare checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
