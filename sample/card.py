"""kinoflow.yaml: what a release is called, the clips it can make, and how."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from kinoflow.conditioning.checkpoints import TextConfig
from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import load
from kinoflow.data.clips.buckets import parse
from kinoflow.sample.generate import Sampling
from kinoflow.sample.upsample import UpsampleConfig

CARD_NAME = "kinoflow.yaml"


@dataclass(frozen=True, kw_only=True)
class ReleaseConfig:
    """kinoflow.yaml: what a release is called, the clips it can make and its defaults.

    Raises:
        UserError: a bucket or pattern that cannot be read, or a default bucket that is not among the buckets.
    """

    name: str
    """What it is called."""
    version: str = "1"
    """Of the release."""
    trained_from: str = ""
    """What its training went on from: name and version of a release, or where that lies."""
    buckets: tuple[str, ...] = ("16x64x64@16",)
    """Clips that it can make: frames x height x width @ fps."""
    default_bucket: str = "16x64x64@16"
    """The one that is made unless others are asked for."""
    sampling: Sampling = field(default_factory=Sampling)
    """Default settings."""
    best_of: int = 1
    """How many clips of a prompt may be made to keep the one that verifier/ finds best; 1 keeps the first."""
    text: TextConfig = field(default_factory=TextConfig)
    """Text encoders that lie elsewhere."""
    written: str = ""
    """Regular expression for the quoted words that it can write; empty: any."""
    classes: tuple[str, ...] = ()
    """Names of the classes that it makes, by label; none: it reads prompts."""
    pixels: int = 0
    """Channels of the pixels that its backbone makes, 1 grey or 3 RGB; 0: latents of tae/."""
    upsample: UpsampleConfig = field(default_factory=UpsampleConfig)
    """Of an upsampler: what it does to a clip."""

    def __post_init__(self) -> None:
        check_best_of(self.best_of)
        if self.pixels not in (0, 1, 3):
            raise UserError(f"pixels: {self.pixels} is none of 0, 1 and 3")
        if twice := {name for name in self.classes if self.classes.count(name) > 1}:
            raise UserError(f"classes: {min(twice)} is listed twice; give each class a name of its own")
        try:
            re.compile(self.written)
        except re.error as error:
            raise UserError(f"written: {self.written!r} is no regular expression ({error})") from None
        try:
            parsed = [parse(text) for text in (*self.buckets, self.default_bucket)]
        except UserError as error:
            raise UserError(f"buckets: {error}") from None
        if parsed[-1] not in parsed[:-1]:
            raise UserError(f"default_bucket: {self.default_bucket} is not among {', '.join(self.buckets)}")


def check_best_of(count: int) -> None:
    """Refuse a number of clips that is none, or more than anybody waits for.

    Raises:
        UserError: it is not in 1 .. 100.
    """
    if not 1 <= count <= 100:
        raise UserError(f"best_of: {count} is not in 1..100; try 4")


def text_config(folder: Path) -> TextConfig:
    """The text encoders of a release that need not be whole yet: those of its kinoflow.yaml, if there is one.

    Raises:
        UserError: a kinoflow.yaml that can't be read.
    """
    card = read_card(folder)
    return TextConfig() if card is None else card.text


def read_card(folder: Path) -> ReleaseConfig | None:
    """What a folder's kinoflow.yaml says, None where there is none.

    Raises:
        UserError: a kinoflow.yaml that can't be read.
    """
    return require_card(folder) if (folder / CARD_NAME).is_file() else None


def require_card(folder: Path) -> ReleaseConfig:
    """What a folder's kinoflow.yaml says.

    Raises:
        UserError: there is none, or it can't be read.
    """
    return load(ReleaseConfig, [str(folder / CARD_NAME)])
