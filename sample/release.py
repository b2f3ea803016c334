"""Release folders: everything that turns a prompt or a label into a clip, in one place.

kinoflow.yaml   name, version, what it can make, default settings
tae/            the autoencoder: config.json and safetensors; none where the backbone makes pixels
dit/ …          the backbone, one of dit/, unet/ and mmdit/, a model folder as well
text/           ul2/, byt5/ and metaclip/: Hugging Face checkpoints, those that kinoflow.yaml doesn't name;
                none where it names classes or Stable Diffusion's
judge/          (optional) the judge that evaluates the release
strict/         (optional) the one that asks for everything that a caption names
verifier/       (optional) another of that kind, or a CLIP-like model of transformers: it chooses among clips
                of a prompt (`best_of`)
adapters/       (optional) adapters of the backbone by name, such as students of few steps
upsampler/      (optional) a release of its own, which makes the clips larger

What a release lacks of these parts is taken from the release that its folder lies in, if it lies in one: an
upsampler need not have the autoencoder and the text encoders again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kinoflow.conditioning.checkpoints import (
    LIMITS,
    clip_t5_fingerprint,
    clip_t5_folder,
    find,
    fingerprint,
    has_t5,
)
from kinoflow.conditioning.labels import LabelEncoder
from kinoflow.conditioning.vocabulary import Vocabulary, known_words
from kinoflow.configs.errors import UserError
from kinoflow.configs.files import folder_fingerprint, replacing_folder
from kinoflow.configs.pretrained import CONFIG_NAME, load_config, resolve_folder, weight_files
from kinoflow.configs.schema import dump
from kinoflow.data.clips.buckets import Bucket, parse
from kinoflow.dit_video.backbone import BACKBONES
from kinoflow.dit_video.video_dit import DiTConfig
from kinoflow.sample.adapters import read_adapters
from kinoflow.sample.card import CARD_NAME, ReleaseConfig, read_card, require_card
from kinoflow.tae.model.config import LatentShape, TAEConfig
from kinoflow.tae.model.pixels import Pixels

if TYPE_CHECKING:
    import torch

    from kinoflow.conditioning.clip_t5 import ClipT5Encoder
    from kinoflow.conditioning.prompt_encoder import PromptEncoder
    from kinoflow.dit_video.backbone import Backbone, BackboneConfig
    from kinoflow.dit_video.lora import Adapter
    from kinoflow.sample.evaluation.verifier import Verifier
    from kinoflow.tae.model.tae import TAE

DEFAULT_RELEASE = Path(__file__).parent / "mini"
PARTS = ("tae", *BACKBONES, "text", "judge", "strict", "verifier")
UPSAMPLER = "upsampler"


@dataclass(frozen=True)
class Release:
    """A release folder whose files are all there; models are read when they are asked for."""

    folder: Path
    config: ReleaseConfig
    adapters: tuple[Adapter, ...] = ()
    """Added to the backbone's weights."""

    @classmethod
    def load(cls, source: str | Path | None = None, lora: Sequence[str] = ()) -> Release:
        """Open a folder or hub id; the shipped mini release when there is none.

        `lora` names adapters of its backbone, FOLDER or FOLDER:scale (0 none of it, 1 all) each, or one that
        comes with it by its name; a student among them brings the default settings.

        Raises:
            UserError: a missing or damaged file, or an adapter that does not fit.
        """
        folder = resolve_folder(DEFAULT_RELEASE if source is None else source)
        _refuse_a_part(folder, read_card(folder))
        if not (folder / CARD_NAME).is_file():
            raise UserError(f"{folder / CARD_NAME}: missing; a release has it beside tae/, dit/ and text/")
        config, (adapters, sampling) = require_card(folder), read_adapters(lora, folder)
        release = cls(folder, config if sampling is None else replace(config, sampling=sampling), adapters)
        for path in release._needed():
            if not path.is_file():
                raise UserError(f"{path}: missing; fetch or export the release again")
        if release.config.best_of > 1 and not release.has_verifier:
            asked = f"{folder / CARD_NAME}: best_of: {release.config.best_of}"
            raise UserError(f"{asked}, and no verifier/ to choose by; fetch it again, or set it to 1")
        if release.adapters:
            release._check_adapters()
        return release

    @property
    def name(self) -> str:
        """The release's name."""
        return self.config.name

    def place(self, part: str) -> Path:
        """Where a part lies, its own or that of the release around it."""
        return holder(self.folder, part) / part

    @property
    def text_holder(self) -> Path:
        """The release folder that its text encoders are looked for in."""
        return holder(self.folder, "text")

    @property
    def tae_folder(self) -> Path | None:
        """Where its autoencoder lies, for the commands that take it alone."""
        return self.place("tae")

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
            UserError: no bucket has them; the message lists those that there are.
        """
        default = parse(self.config.default_bucket)
        keys = ("frames", "height", "width", "fps")
        wanted = {k: v for k, v in zip(keys, (frames, height, width, fps), strict=True) if v is not None}
        fitting = [b for b in self.buckets if all(getattr(b, key) == value for key, value in wanted.items())]
        if not fitting:
            asked = ", ".join(f"{key} {value}" for key, value in wanted.items())
            raise UserError(f"{asked}: {self.name} makes no such clips; it makes {self.offers()}")
        return min(fitting, key=lambda b: sum(getattr(b, key) != getattr(default, key) for key in keys))

    def offers(self) -> str:
        """The clips it can make, as options of the command line."""
        offers = [f"--frames {b.frames} --size {b.width}x{b.height} --fps {b.fps}" for b in self.buckets]
        return "; ".join(offers)

    @property
    def part(self) -> str:
        """What its backbone is called: dit, unet or mmdit, which is its folder as well."""
        return next((name for name in BACKBONES if (self.folder / name).is_dir()), "dit")

    def decoder(self, device: torch.device | str = "cpu") -> TAE | Pixels:
        """What makes frames of the backbone's latents: the autoencoder, or `Pixels` where they are pixels."""
        return Pixels(self.config.pixels) if self.config.pixels else self.tae(device)

    def tae(self, device: torch.device | str = "cpu") -> TAE:
        """Read the autoencoder, in fp32.

        Raises:
            UserError: a damaged file, or a release whose latents are pixels.
        """
        if self.config.pixels:
            raise UserError(f"{self.folder}: has no autoencoder, its latents are pixels")
        from kinoflow.tae.cpu.accelerate import accelerate
        from kinoflow.tae.model.tae import TAE

        return accelerate(TAE.from_pretrained(self.place("tae")).to(device))

    def backbone(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Backbone:
        """Read the transformer or U-Net, in fp32 without a `dtype`; of int8 see `hold`.

        Raises:
            UserError: a damaged file.
        """
        from kinoflow.dit_video.quantized import hold

        model = BACKBONES[self.part].from_pretrained(self.folder / self.part, adapters=self.adapters)
        return hold(model, device, dtype)  # pyright: ignore[reportReturnType]

    def encoder(
        self, text_cache: Path | None = None, device: torch.device | str = "cpu"
    ) -> PromptEncoder | ClipT5Encoder | LabelEncoder:
        """Read the text encoders, in the number type that the card names; with a cache only if it lacks some.

        Of a release of classes there are none to read: what it gives knows the names.

        Raises:
            UserError: a damaged file, a hub that can't be reached, or encoders or classes that don't suit the
                backbone.
        """
        backbone = self.backbone_config()
        if backbone.classes != len(self.config.classes):
            raise UserError(
                f"{self.folder / CARD_NAME}: classes: names {len(self.config.classes)}, and {self.part}/ was "
                f"trained on {backbone.classes}; name them all, in their order"
            )
        if self.config.classes:
            return LabelEncoder(self.config.classes)
        if self.config.text.clip_t5:
            from kinoflow.conditioning.clip_t5 import ClipT5Encoder

            (width,), dtype = backbone.text_widths, self.config.text.torch_dtype
            folder = clip_t5_folder(self.config.text.clip_t5)
            states = ClipT5Encoder.from_folder(folder, width=width, with_t5=has_t5(folder), dtype=dtype)
            return states.to(device)
        from kinoflow.conditioning.prompt_encoder import PromptEncoder

        encoder = PromptEncoder.of_release(self.text_holder, self.config.text, cache=text_cache)
        given, wanted = encoder.widths, backbone.text_widths
        if given != wanted:
            raise UserError(
                f"{self.folder / CARD_NAME}: text: the encoders' states are {given} wide, {self.part}/ was "
                f"trained on {wanted}; name the encoders that it was trained with"
            )
        return encoder.to(device)

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The words that it knows, None where it takes any: small releases have a tokenizer that tells."""
        if self.config.classes or self.config.text.clip_t5:
            return None
        words = known_words(Path(self.config.text.sources(self.text_holder)["ul2"]))
        return None if words is None else Vocabulary(words=words, written=self.config.written)

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 (its first 16 digits) over the weight files of its parts, in a fixed order.

        Adapters and their scales as well.
        """
        digest, sources = hashlib.sha256(), []
        elsewhere = [name for name in LIMITS if getattr(self.config.text, name)]
        for part in ("tae", self.part, *self._texts):
            for path in sorted(self.place(part).glob("*.safetensors")):
                digest.update(f"{part}/{path.name}".encode())
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        if self.config.text.clip_t5:
            digest.update(clip_t5_fingerprint(clip_t5_folder(self.config.text.clip_t5)).encode())
        elif elsewhere:
            sources = find(self.config.text.sources(self.text_holder))
        for source in sources:
            if source.name in elsewhere:
                digest.update(f"{source.name} {fingerprint(source.folder())}".encode())
        for adapter in self.adapters:
            digest.update(f"lora {adapter.scale} {adapter.digest()}".encode())
        return digest.hexdigest()[:16]

    def _check_adapters(self) -> None:
        """Raise UserError for adapters of another backbone."""
        from kinoflow.configs.pretrained import Weights
        from kinoflow.dit_video.lora import Merged

        Merged(Weights(self.folder / self.part), self.adapters)

    def backbone_config(self) -> BackboneConfig:
        """The shape of its backbone.

        Raises:
            UserError: a damaged file.
        """
        return load_config(self.folder / self.part, BACKBONES[self.part].config_type)

    @property
    def reads_known(self) -> bool:
        """Whether its backbone reads what is known of a clip: pictures, a beginning, all but a region."""
        config = self.backbone_config()
        return isinstance(config, DiTConfig) and config.known

    @property
    def tae_config(self) -> TAEConfig:
        """The shape of its autoencoder."""
        return load_config(self.place("tae"), TAEConfig)

    def latent_shape(self, frames: int, height: int, width: int) -> LatentShape:
        """Sizes of the latent of a clip."""
        config = Pixels(self.config.pixels).config if self.config.pixels else self.tae_config
        return config.latent_shape(frames, height, width)

    @property
    def has_verifier(self) -> bool:
        """Whether it can say which of several clips shows a prompt best."""
        return (self.place("verifier") / CONFIG_NAME).is_file()

    @cached_property
    def verifier(self) -> Verifier:
        """What says so, read when it is first asked for.

        Raises:
            UserError: a missing or damaged file.
        """
        from kinoflow.sample.evaluation.verifier import verifier_of

        return verifier_of(self.place("verifier"), self.bucket())

    @cached_property
    def verifier_hash(self) -> str:
        """The first 16 digits of its folder's fingerprint."""
        return folder_fingerprint(self.place("verifier"))[:16]

    @property
    def _texts(self) -> list[str]:
        """The folders of the text encoders that are its own."""
        if self.config.classes or self.config.text.clip_t5:
            return []
        return [f"text/{name}" for name in LIMITS if not getattr(self.config.text, name)]

    def _needed(self) -> list[Path]:
        models = [*([] if self.config.pixels else ["tae"]), self.part]
        parts = [*models, *self._texts]
        needed = [self.place(part) / CONFIG_NAME for part in parts]
        return needed + [path for part in models for path in weight_files(self.place(part))]


def holder(folder: Path, part: str) -> Path:
    """The release folder that has a part of a release: its own or, where that lacks it, the one around it."""
    around, top = folder.resolve().parent, Path(part).parts[0]
    lends = (folder / CARD_NAME).is_file() and (around / CARD_NAME).is_file()
    return around if lends and not (folder / top).exists() else folder


def lent(folder: Path, source: Path) -> set[str]:
    """Parts of the release `source` that one in `folder` need not have: that around it has the same."""
    around = folder.resolve().parent
    if not (around / CARD_NAME).is_file():
        return set()
    places = {part: (around / part, holder(source, part) / part) for part in PARTS if part not in BACKBONES}
    return {
        part
        for part, (lender, own) in places.items()
        if lender.is_dir() and own.is_dir() and folder_fingerprint(lender) == folder_fingerprint(own)
    }


def _refuse_a_part(folder: Path, card: ReleaseConfig | None) -> None:
    """Say what a folder is for that holds only a part of a release, as an export may write it.

    Raises:
        UserError: an autoencoder or a backbone alone, two backbones, or a model's own folder.
    """
    has = {part: (folder / part).is_dir() for part in BACKBONES}
    has["tae"] = (holder(folder, "tae") / "tae").is_dir()
    backbones = [name for name in BACKBONES if has[name]]
    if len(backbones) > 1:
        named = " and ".join(f"{name}/" for name in backbones)
        raise UserError(f"{folder}: has {named}, and a release has one backbone; remove the other")
    if (folder / CONFIG_NAME).is_file() and not any(has.values()):
        raise UserError(
            f"{folder}: one model, and a release has several; give the folder that holds {folder.name}/"
        )
    together = "export its run into a copy of {} (kinoflow train export RUN COPY)"
    if has["tae"] and not backbones:
        release = together.format("a release whose dit/ was trained on its latents")
        use = f"kinoflow tae encode CLIP CLIP.kino --weights {folder / 'tae'}"
        raise UserError(f"{folder}: an autoencoder only, for {use}; to sample with it, {release}")
    if backbones and not has["tae"] and (card is None or not card.pixels):
        if card is not None and card.upsample.factor:
            raise UserError(f"{folder}: has no tae/; an upsampler takes it and text/ from the release that "
                            "its folder lies in: put it back there, or copy both into it")  # fmt: skip
        release = together.format("the release whose tae/ and text/ made what it was trained on")
        raise UserError(f"{folder}: a backbone only; to sample with it, {release}")


def write(folder: str | Path, *, config: ReleaseConfig, parts: dict[str, Path]) -> Release:
    """Make or update a release: copy the part folders (`PARTS`), write kinoflow.yaml.

    Parts that are not named stay as they are; each is copied aside and then renamed. kinoflow.yaml comes
    last, so that a folder with one is whole.

    Raises:
        UserError: an unknown part, or a release that is not whole afterwards.
    """
    folder = Path(folder)
    unknown = parts.keys() - set(PARTS)
    if unknown:
        raise UserError(f"{min(unknown)}: not a part of a release; use {', '.join(PARTS)}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in parts.items():
        if source.resolve() != (folder / name).resolve():
            with replacing_folder(folder / name) as aside:
                shutil.copytree(source, aside, dirs_exist_ok=True)
    dump(config, folder / CARD_NAME)
    return Release.load(folder)
