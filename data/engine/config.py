"""What `kinoflow data curate` and `kinoflow data select` are told."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import to_dict

_RULE = re.compile(r"(?P<least>[-+.\de]*):(?P<most>[-+.\de]*)")
_BEST = re.compile(r"best\s+([\d.]+)\s*%")
_FORM = 'write "least:most", either left out for no limit, or "best 10%"; null keeps all'


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """How videos are looked at; another value here means that they are decoded again."""

    side: int = 160
    """Pixels of the longer side of the pictures that every frame is made to."""
    detail: int = 640
    """Pixels of the longer side of those in which text, borders and sharpness are sought."""
    every: float = 1.0
    """Seconds between those larger pictures."""
    text: Literal["rapidocr", "none"] = "rapidocr"
    """What finds written text: RapidOCR's detector, or nothing."""
    text_every: float = 1.0
    """Seconds between pictures in which text is sought, the slowest stage; a multiple of `every`."""
    hash_every: float = 0.25
    """Seconds between the pictures whose hashes near duplicates are found by."""
    transnet: bool = False
    """Ask TransNetV2 as well, for shots.detector=transnetv2; several times as long as all else on a CPU."""
    range_seconds: float = 120.0
    """Videos are split into pieces of so many seconds, for several workers."""

    def __post_init__(self) -> None:
        for key in ("side", "detail"):
            if not 32 <= getattr(self, key) <= 4096:
                raise UserError(f"scan.{key}: {getattr(self, key)}; use 32 to 4096 pixels")
        for key in ("every", "text_every", "hash_every"):
            if not 0 < getattr(self, key) <= 3600:
                raise UserError(f"scan.{key}: {getattr(self, key)}; use seconds above 0, up to 3600")
        if not 5 <= self.range_seconds <= 86400:
            raise UserError(f"scan.range_seconds: {self.range_seconds}; use 5 to 86400")


@dataclass(frozen=True, kw_only=True)
class ShotConfig:
    """Where shots begin and end; another value here decodes nothing."""

    detector: Literal["adaptive", "content", "transnetv2"] = "adaptive"
    """PySceneDetect's: a change that stands out among its neighbours, or any large one; or TransNetV2's."""
    adaptive: float = 3.0
    """How many times as large as the mean of the changes around it a cut is."""
    window: int = 2
    """Frames on each side whose changes make that mean."""
    least_change: float = 15.0
    """The least change of a cut that the adaptive detector finds, in levels of 255."""
    content: float = 27.0
    """The change that is a cut to the content detector, and a jump within a shot."""
    dissolve: float = 24.0
    """How different, in levels of 255, pictures are that a dissolve leads between; 0 seeks none."""
    margin: int = 0
    """Frames that are left out on each side of a cut."""
    longest: float = 16.0
    """Longer shots are split evenly into pieces of at most so many seconds."""

    def __post_init__(self) -> None:
        if self.window < 1 or self.margin < 0:
            raise UserError(f"shots: window {self.window}, margin {self.margin}; use 1 or more and 0 or more")
        if min(self.adaptive, self.content, self.longest) <= 0 or min(self.dissolve, self.least_change) < 0:
            raise UserError("shots: adaptive, content and longest must be above 0, the others not below")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a score must be: from `least` to `most`, or among the `best` share of those that come to it."""

    least: float | None = None
    most: float | None = None
    best: float | None = None

    @classmethod
    def parse(cls, text: str | None, key: str) -> "Rule | None":
        """Read "0.5:7", ":0.1", "4:" or "best 10%"; None for null.

        Raises:
            UserError: anything else; it names the key.
        """
        if text is None:
            return None
        if (best := _BEST.fullmatch(text.strip())) is not None:
            share = float(best[1]) / 100
            if not 0 < share <= 1:
                raise UserError(f"{key}: {text}; use a share above 0, up to 100%")
            return cls(best=share)
        found = _RULE.fullmatch(text.strip())
        try:
            least, most = (
                float(part) if part else None for part in (found.groups() if found else ("?",) * 2)
            )
        except ValueError:
            raise UserError(f"{key}: {text!r} is no rule; {_FORM}") from None
        if least is not None and most is not None and least > most:
            raise UserError(f"{key}: {text}: the first number is the larger one; {_FORM}")
        return cls(least=least, most=most)


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Which clips are kept: a rule for each score, in the order in which they are asked.

    "least:most" with either left out, "best 10%" of those that come so far, or null for all. The paper's are
    in configs/stages/curate.yaml.
    """

    damaged: str | None = ":0"
    """1 where the file is truncated or damaged anywhere."""
    variable_rate: str | None = None
    """1 where frames last differently long."""
    seconds: str | None = "1:"
    """How long the shot lasts."""
    shorter_side: str | None = "64:"
    """Pixels of the picture's shorter side."""
    aspect: str | None = "0.4:2.5"
    """Width over height of the picture."""
    text: str | None = ":0.03"
    """Share of the picture that written text covers, on average."""
    borders: str | None = ":0.03"
    """Share of the picture that is letter or pillar box, throughout."""
    motion: str | None = "0.3:60"
    """Mean length of the optical flow: thousandths of the longer side in a 24th of a second."""
    shake: str | None = ":4"
    """How far the camera strays from its own smooth path, in thousandths of the longer side."""
    jumps: str | None = ":0.85"
    """Changes a second that a cut detector would take for a cut; flashes and jerks."""
    sharpness: str | None = "15:"
    """Variance of the picture's Laplacian at scan.detail pixels, median over time."""
    exposure: str | None = ":0.6"
    """Share of the pixels that are black or white, on average."""
    contrast: str | None = "8:"
    """Standard deviation of the brightness within the picture, in levels of 255, on average."""
    flicker: str | None = ":3"
    """How much the brightness goes up and down from frame to frame, in levels of 255."""
    aesthetic: str | None = None
    """What clip.aesthetic says of the shot's pictures, on its own scale, after kinoflow data embed."""
    match: str | None = None
    """Cosine of the caption's embedding and the pictures', after kinoflow data embed."""
    duplicates: int | None = 8
    """Of clips whose hashes differ by so many of 64 bits or fewer, the largest is kept; null keeps all."""
    resample: float | None = None
    """Clusters of more shots than this are thinned by 1/sqrt(size), after kinoflow data embed."""
    seed: int = 0
    """Of which shots of a cluster stay."""

    def __post_init__(self) -> None:
        self.rules()
        if self.duplicates is not None and not 0 <= self.duplicates <= 15:
            raise UserError(f"select.duplicates: {self.duplicates} bits; use 0 to 15, or null")
        if self.resample is not None and not self.resample >= 1:
            raise UserError(f"select.resample: {self.resample} shots; use 1 or more, or null")

    def rules(self) -> dict[str, Rule]:
        """The rules by their scores, in order, without those that keep all."""
        found = {key: Rule.parse(text, f"select.{key}") for key, text in to_dict(self).items()
                 if key not in ("duplicates", "resample", "seed")}  # fmt: skip
        return {key: rule for key, rule in found.items() if rule is not None}


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """The CLIP-like model that looks at kept shots, for select.aesthetic and select.match."""

    model: str | None = None
    """Folder or hub id of a CLIP or SigLIP of transformers; curate asks it last of all."""
    aesthetic: str | None = None
    """A safetensors file with a linear layer from its embedding to a score."""
    frames: int = 4
    """Pictures of each shot, evenly."""
    clusters: int | None = None
    """Clusters that the shots it looks at are put into, for select.resample."""

    def __post_init__(self) -> None:
        if not 1 <= self.frames <= 256:
            raise UserError(f"clip.frames: {self.frames}; use 1 to 256")
        if self.clusters is not None and not 1 <= self.clusters <= 100_000:
            raise UserError(f"clip.clusters: {self.clusters}; use 1 to 100000, or null")


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """All that the data engine is told."""

    scan: ScanConfig = field(default_factory=ScanConfig)
    shots: ShotConfig = field(default_factory=ShotConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    time_limit: float = 600.0
    """Seconds after which a worker that looks at one piece of a video is ended."""

    def __post_init__(self) -> None:
        if not self.time_limit > 0:
            raise UserError(f"time_limit: {self.time_limit}; use seconds above 0")
        if self.shots.detector == "transnetv2" and not self.scan.transnet:
            raise UserError("shots.detector: transnetv2 is not asked; say scan.transnet=true too")
        if self.select.aesthetic is not None and self.clip.aesthetic is None:
            raise UserError("select.aesthetic: asks for clip.aesthetic, a linear layer; give its file")

    def fingerprint(self, *sections: str) -> str:
        """A name for what these sections say."""
        return digest([to_dict(getattr(self, section)) for section in sections])


def digest(values: Sequence[object]) -> str:
    """A short name for plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
