"""Stable Diffusion 3 and 3.5 as they are released: a diffusers folder that `kinoflow sample` takes as it is.

model_index.json                        which classes wrote the parts; text_encoder_3 may be [null, null]
transformer/ vae/ scheduler/            read by dit_video.released, tae.model.inflate and here
text_encoder/ text_encoder_2/ text_encoder_3/ tokenizer/ tokenizer_2/ tokenizer_3/
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kinoflow.conditioning.checkpoints import CLIP_T5, CLIP_T5_TOKENIZERS, TextConfig, fingerprint, has_t5
from kinoflow.configs.errors import UserError
from kinoflow.configs.pretrained import CONFIG_NAME, resolve_folder, weight_files
from kinoflow.data.clips.buckets import Bucket
from kinoflow.sample.card import CARD_NAME, ReleaseConfig
from kinoflow.sample.generate import Sampling
from kinoflow.sample.release import DEFAULT_RELEASE, Release

if TYPE_CHECKING:
    from kinoflow.conditioning.clip_t5 import ClipT5Encoder
    from kinoflow.dit_video.mmdit import MMDiT, MMDiTConfig
    from kinoflow.tae.model.config import TAEConfig
    from kinoflow.tae.model.tae import TAE

INDEX = "model_index.json"
_PIPELINE = "StableDiffusion3Pipeline"
_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_STEM = "diffusion_pytorch_model"
_T5 = CLIP_T5["t5"]
_TEXT, _TOKENIZERS = tuple(CLIP_T5.values()), tuple(CLIP_T5_TOKENIZERS.values())
# What is fetched from the hub: safetensors in the precision that comes without a suffix, nothing twice.
_FETCHED = (INDEX, "*/*.json", "tokenizer*/*", *(f"{part}/{stem}{end}" for part, stem in (
    ("transformer", _STEM), ("vae", _STEM), ("text_encoder*", "model")
) for end in (".safetensors", "-0*.safetensors")))  # fmt: skip


def is_diffusers(folder: Path) -> bool:
    """Whether it is laid out as diffusers writes a pipeline, and not as a release."""
    return (folder / INDEX).is_file() and not (folder / CARD_NAME).is_file()


def open_release(
    source: str | Path | None,
    lora: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> Release:
    """A release of ours, or Stable Diffusion's where the folder or hub id has a model_index.json.

    So the weights of the system of the lecture notes' section 1.3.1 are sampled from as they are released.

    Beside a transformer that is computed in less than fp32 its text encoders are held in bf16. `revision` is
    a branch, tag or commit of a hub id.

    Raises:
        UserError: a missing or damaged file, a revision of a folder, another family of models, or adapters
            that do not fit.
    """
    source = DEFAULT_RELEASE if source is None else source
    folder = resolve_folder(source, [INDEX, CARD_NAME], revision)
    if (folder / CARD_NAME).is_file() or not (folder / INDEX).is_file():
        return Release.load(resolve_folder(source, revision=revision), lora)
    if lora:
        raise UserError(f"lora: {source} is Stable Diffusion, which takes no adapters here; leave --lora out")
    index = _read(folder / INDEX)
    if index.get("_class_name") != _PIPELINE:
        raise UserError(
            f"{folder / INDEX}: a {index.get('_class_name')}; give a {_PIPELINE} (Stable Diffusion 3 or 3.5) "
            "or a release of kinoflow"
        )
    return _opened(resolve_folder(source, list(_FETCHED), revision), Path(source).name, dtype)


def _opened(folder: Path, name: str, dtype: torch.dtype) -> StableDiffusion:
    from kinoflow.dit_video.released import read_shape

    with_t5 = has_t5(folder)
    _require(folder, with_t5=with_t5)
    shape, side = read_shape(folder / "transformer")
    pixels = _factor(folder / "vae")
    config = ReleaseConfig(
        name=name,
        buckets=(f"1x{side * pixels}x{side * pixels}@1",),
        default_bucket=f"1x{side * pixels}x{side * pixels}@1",
        sampling=_sampling(folder / "scheduler" / "scheduler_config.json"),
        text=TextConfig(dtype="float32" if dtype == torch.float32 else "bfloat16"),
    )
    grid = Grid(step=pixels * shape.patch, most=pixels * shape.patch * shape.max_tokens)
    return StableDiffusion(folder, config, text_width=shape.text_widths[0], with_t5=with_t5, grid=grid)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Sides that the transformer can make, in pixels: multiples of `step` up to `most`."""

    step: int
    most: int


@dataclass(frozen=True)
class StableDiffusion(Release):
    """A diffusers folder whose files are all there; models are read when they are asked for."""

    text_width: int = field(kw_only=True)
    with_t5: bool = field(kw_only=True)
    grid: Grid = field(kw_only=True)

    def bucket(
        self,
        *,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: Fraction | None = None,
    ) -> Bucket:
        """One frame of any size that the transformer's patches and positions allow.

        Raises:
            UserError: more frames, a frame rate, or another size.
        """
        if frames not in (None, 1):
            raise UserError(f"frames: {frames}, and {self.name} makes pictures; leave --frames out")
        if fps is not None:
            raise UserError(f"fps: {self.name} makes pictures, which have no rate; leave --fps out")
        (default,) = self.buckets
        sides = {"height": height or default.height, "width": width or default.width}
        for axis, side in sides.items():
            if side % self.grid.step or not 0 < side <= self.grid.most:
                raise UserError(f"size: {axis} {side}; {self.name} makes multiples of {self.grid.step} up to "
                                f"{self.grid.most} pixels")  # fmt: skip
        return Bucket(frames=1, fps=default.fps, **sides)

    def backbone_config(self) -> MMDiTConfig:
        """The shape of its transformer. Raises UserError for a damaged file."""
        from kinoflow.dit_video.released import read_shape

        return read_shape(self.folder / "transformer")[0]

    def tae(self, device: torch.device | str = "cpu") -> TAE:
        """Its image autoencoder, as one that takes a picture for a clip of one frame; fp32."""
        from kinoflow.tae.cpu.accelerate import accelerate
        from kinoflow.tae.model.inflate import inflate

        return accelerate(inflate(self.folder / "vae").to(device))

    @property
    def tae_config(self) -> TAEConfig:
        """The shape of its autoencoder."""
        from kinoflow.tae.model.inflate import inflated_config

        return inflated_config(self.folder / "vae")

    def backbone(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> MMDiT:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Read the transformer, in fp32 without a `dtype`. Raises UserError for a damaged file."""
        from kinoflow.dit_video.quantized import hold
        from kinoflow.dit_video.released import read_released

        read_as = torch.float32 if dtype in (None, torch.int8) else dtype
        return hold(read_released(self.folder / "transformer", read_as), device, dtype)  # pyright: ignore[reportReturnType]

    def encoder(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, text_cache: Path | None = None, device: torch.device | str = "cpu"
    ) -> ClipT5Encoder:
        """Read the text encoders, in the number type of `config.text`.

        Raises:
            UserError: a damaged file, or a cache, which their states do not go into.
        """
        from kinoflow.conditioning.clip_t5 import ClipT5Encoder

        if text_cache is not None:
            raise UserError(f"text-cache: states of {self.name} cannot be kept; leave --text-cache out")
        dtype = self.config.text.torch_dtype
        return ClipT5Encoder.from_folder(
            self.folder, width=self.text_width, with_t5=self.with_t5, dtype=dtype
        ).to(device)

    @property
    def tae_folder(self) -> None:
        """None: its autoencoder is not in our layout."""
        return

    @cached_property
    def vocabulary(self) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """None: it takes any words."""
        return

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 (its first 16 digits) over transformer, autoencoder, text encoders and tokenizers."""
        text = [part for part in (*_TEXT, *_TOKENIZERS) if self.with_t5 or not part.endswith("_3")]
        digest = hashlib.sha256()
        for part in ("transformer", "vae", *text):
            digest.update(f"{part} {fingerprint(self.folder / part)}".encode())
        return digest.hexdigest()[:16]


def _require(folder: Path, *, with_t5: bool) -> None:
    """See that every part is there.

    Raises:
        UserError: one that is not, with the remedy.
    """
    texts = [part for part in _TEXT if with_t5 or part != _T5]
    needed = [folder / "scheduler" / "scheduler_config.json"]
    for part, stem in (("transformer", _STEM), ("vae", _STEM), *((text, "model") for text in texts)):
        needed += [folder / part / CONFIG_NAME, *weight_files(folder / part, stem)]
    words = [part for part in _TOKENIZERS if with_t5 or not part.endswith("_3")]
    needed += [folder / part / "tokenizer_config.json" for part in words]
    for path in needed:
        if not path.is_file():
            remedy = "fetch it again"
            if path.parent.name == _T5:
                remedy += f", or write [null, null] for {_T5} into {INDEX} to go without T5"
            raise UserError(f"{path}: missing; {remedy}")


def _factor(vae: Path) -> int:
    """Pixels along the side of a latent cell."""
    levels = _read(vae / CONFIG_NAME).get("block_out_channels")
    if not isinstance(levels, list):
        raise UserError(f"{vae / CONFIG_NAME}: no block_out_channels; fetch the folder again")
    return 2 ** (len(levels) - 1)


def _sampling(path: Path) -> Sampling:
    """50 steps and a guidance of 5 (Esser et al. 2024), on the grid that the scheduler describes."""
    given = _read(path)
    if given.get("_class_name") != _SCHEDULER or given.get("use_dynamic_shifting"):
        raise UserError(f"{path}: only a {_SCHEDULER} without use_dynamic_shifting can be read")
    return Sampling(
        guidance_scale=5.0, num_steps=50, schedule="stable-diffusion-3", shift=float(given.get("shift", 1.0))
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch the folder again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; fetch the folder again")
    return found
