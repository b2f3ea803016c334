"""Release folders: everything that turns a prompt into a clip, in one place.

kinoflow.yaml   name, version, what it can make, default settings
tae/ dit/       model folders: config.json and safetensors
text/           ul2/, byt5/ and metaclip/: Hugging Face checkpoints, those that kinoflow.yaml doesn't name
judge/          (optional) the judge that evaluates the release
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from conditioning.checkpoints import LIMITS, TextConfig, find, fingerprint
from conditioning.text_encoder import EncoderError
from configs import ConfigError, dump, load
from configs.pretrained import CONFIG_NAME, PretrainedError, load_config, resolve_folder, weight_files
from data.buckets import Bucket, BucketError, parse
from sample.generate import Sampling, SolverName

if TYPE_CHECKING:
    from conditioning.encoders import PromptEncoder
    from dit_video.model import VideoDiT
    from sample.judge import Judge
    from tae.model import TAE

CARD_NAME = "kinoflow.yaml"
DEFAULT_RELEASE = Path(__file__).parent / "mini"
_MODELS = ("tae", "dit")


class ReleaseError(ValueError):
    """A release that cannot be read, or asked for a clip that it cannot make."""


@dataclass(frozen=True, kw_only=True)
class ReleaseConfig:
    """kinoflow.yaml: what a release is called, the clips it can make ("16x64x64@16") and its defaults.

    `text` names text encoders that lie elsewhere: folders or hub ids such as google/ul2.

    Raises:
        ReleaseError: no bucket, one that cannot be read, or a default bucket that is not among them.
    """

    name: str
    version: str = "1"
    buckets: tuple[str, ...] = ("16x64x64@16",)
    default_bucket: str = "16x64x64@16"
    sampling: Sampling = field(default_factory=Sampling)
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        try:
            parsed = [parse(text) for text in (*self.buckets, self.default_bucket)]
        except BucketError as error:
            raise ReleaseError(f"buckets: {error}") from None
        if parsed[-1] not in parsed[:-1]:
            raise ReleaseError(
                f"default_bucket: {self.default_bucket} is not among {', '.join(self.buckets)}"
            )


@dataclass(frozen=True)
class Release:
    """A release folder whose files are all there; models are read when they are asked for."""

    folder: Path
    config: ReleaseConfig

    @classmethod
    def load(cls, source: str | Path | None = None) -> Release:
        """Open a folder or hub id; the shipped mini release when there is none.

        Raises:
            ReleaseError: a missing or damaged file.
        """
        with _release_errors():
            folder = resolve_folder(DEFAULT_RELEASE if source is None else source)
        if not (folder / CARD_NAME).is_file():
            raise ReleaseError(
                f"{folder / CARD_NAME}: missing; give a release folder (kinoflow train export writes one)"
            )
        release = cls(folder, _read_card(folder))
        for path in release._needed():
            if not path.is_file():
                raise ReleaseError(f"{path}: missing; fetch or export the release again")
        return release

    @property
    def name(self) -> str:
        """The release's name."""
        return self.config.name

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """The clips it can make."""
        return tuple(parse(text) for text in self.config.buckets)

    def bucket(
        self,
        *,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: Fraction | None = None,
    ) -> Bucket:
        """The bucket with all the given values, and else as near to the default one as there is.

        Raises:
            ReleaseError: no bucket has them; the message lists those that there are.
        """
        default = parse(self.config.default_bucket)
        keys = ("frames", "height", "width", "fps")
        wanted = {k: v for k, v in zip(keys, (frames, height, width, fps), strict=True) if v is not None}
        fitting = [b for b in self.buckets if all(getattr(b, key) == value for key, value in wanted.items())]
        if not fitting:
            asked = ", ".join(f"{key} {value}" for key, value in wanted.items())
            raise ReleaseError(f"{asked}: {self.name} makes no such clips; it makes {self.offers()}")
        return min(fitting, key=lambda b: sum(getattr(b, key) != getattr(default, key) for key in keys))

    def offers(self) -> str:
        """The clips it can make, as options of the command line."""
        offers = [f"--frames {b.frames} --size {b.width}x{b.height} --fps {b.fps}" for b in self.buckets]
        return "; ".join(offers)

    def sampling(
        self,
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        solver: SolverName | None = None,
        diffusion: float | None = None,
    ) -> Sampling:
        """The default settings, with those that are given in their place.

        Raises:
            GenerateError: a value outside its range.
        """
        given = {
            "num_steps": num_steps, "guidance_scale": guidance_scale, "solver": solver, "diffusion": diffusion
        }  # fmt: skip
        chosen = {key: value for key, value in given.items() if value is not None}
        return replace(self.config.sampling, **chosen)

    def tae(self) -> TAE:
        """Read the autoencoder. Raises ReleaseError for a damaged file."""
        from tae.model import TAE

        with _release_errors():
            return TAE.from_pretrained(self.folder / "tae")

    def dit(self) -> VideoDiT:
        """Read the transformer. Raises ReleaseError for a damaged file."""
        from dit_video.model import VideoDiT

        with _release_errors():
            return VideoDiT.from_pretrained(self.folder / "dit")

    def encoder(self, text_cache: Path | None = None) -> PromptEncoder:
        """Read the text encoders; with a cache of text states only when it lacks some.

        Raises:
            ReleaseError: a damaged file, a hub that can't be reached, or encoders that don't suit the dit.
        """
        from conditioning.prompt_encoder import PromptEncoder

        with _release_errors():
            encoder = PromptEncoder.of_release(self.folder, self.config.text, cache=text_cache)
            given, wanted = encoder.widths, self._text_widths()
        if given != wanted:
            raise ReleaseError(
                f"{self.folder / CARD_NAME}: text: the encoders' states are {given} wide, dit/ was trained "
                f"on {wanted}; name the encoders that it was trained with"
            )
        return encoder

    def judge(self) -> Judge:
        """Read the judge. Raises ReleaseError when there is none or its files are damaged."""
        from sample.judge import Judge

        with _release_errors():
            return Judge.from_pretrained(self.folder / "judge")

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 (its first 16 digits) over the weight files of tae, dit and text, in a fixed order."""
        digest = hashlib.sha256()
        elsewhere = [name for name in LIMITS if getattr(self.config.text, name)]
        for part in (*_MODELS, *(f"text/{name}" for name in LIMITS if name not in elsewhere)):
            for path in sorted((self.folder / part).glob("*.safetensors")):
                digest.update(f"{part}/{path.name}".encode())
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        for source in find(self.config.text.sources(self.folder)):
            if source.name in elsewhere:
                with _release_errors():
                    digest.update(f"{source.name} {fingerprint(source.folder())}".encode())
        return digest.hexdigest()[:16]

    def _text_widths(self) -> tuple[int, ...]:
        from dit_video.model import DiTConfig

        with _release_errors():
            return load_config(self.folder / "dit", DiTConfig).text_widths

    def _needed(self) -> list[Path]:
        own = [f"text/{name}" for name in LIMITS if not getattr(self.config.text, name)]
        needed = [self.folder / part / CONFIG_NAME for part in (*_MODELS, *own)]
        with _release_errors():
            return needed + [path for part in _MODELS for path in weight_files(self.folder / part)]


def text_config(folder: Path) -> TextConfig:
    """The text encoders of a release that need not be whole yet: those of its kinoflow.yaml, if there is one.

    Raises:
        ReleaseError: a kinoflow.yaml that can't be read.
    """
    return _read_card(folder).text if (folder / CARD_NAME).is_file() else TextConfig()


def _read_card(folder: Path) -> ReleaseConfig:
    try:
        return load(ReleaseConfig, [str(folder / CARD_NAME)])
    except (ConfigError, EncoderError) as error:
        raise ReleaseError(str(error)) from None


def write(folder: str | Path, *, config: ReleaseConfig, parts: dict[str, Path]) -> Release:
    """Make or update a release: copy the part folders ("tae", "dit", "text", "judge"), write kinoflow.yaml.

    Parts that are not named stay as they are; each is copied aside and then renamed. kinoflow.yaml comes
    last, so that a folder with one is whole.

    Raises:
        ReleaseError: an unknown part, or a release that is not whole afterwards.
    """
    folder = Path(folder)
    unknown = parts.keys() - {"tae", "dit", "text", "judge"}
    if unknown:
        raise ReleaseError(f"{min(unknown)}: not a part of a release; use tae, dit, text or judge")
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in parts.items():
        if source.resolve() != (folder / name).resolve():
            _replace_folder(source, folder / name)
    dump(config, folder / CARD_NAME)
    return Release.load(folder)


def _replace_folder(source: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        shutil.copytree(source, aside)
        shutil.rmtree(target, ignore_errors=True)
        aside.replace(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _release_errors() -> Iterator[None]:
    try:
        yield
    except (PretrainedError, EncoderError) as error:
        raise ReleaseError(str(error)) from None
