"""A temporal autoencoder from an image one (Movie Gen, section 3.1.1): 2D weights, time as the identity.

The image autoencoder is a folder of diffusers' AutoencoderKL, read as it lies: config.json and safetensors.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinoflow.configs.errors import UserError
from kinoflow.configs.pretrained import CONFIG_NAME, Weights, load_state, resolve_folder
from kinoflow.configs.schema import dump
from kinoflow.tae.model.config import TAEConfig
from kinoflow.tae.model.layers import Attention, Downsample, ResBlock, Upsample
from kinoflow.tae.model.tae import TAE, Decoder, Encoder

STEM = "diffusion_pytorch_model"
# Keys that this architecture fixes, and the only values it can stand for; a missing key means the first.
FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderKL",),
    "in_channels": (3,),
    "out_channels": (3,),
    "act_fn": ("silu", "swish"),
    "norm_num_groups": (32,),
    "mid_block_add_attention": (True,),
}
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
# Attention's names before diffusers 0.15, which the older Stable Diffusion weights still have.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class InflatedRun:
    """The keys of a training run that an inflated model decides."""

    model: str = "tae"
    tae: TAEConfig


def save_start(model: TAE, folder: Path) -> None:
    """Write what a training run starts from: `folder`/tae for init_from, `folder`/tae.yaml as its config."""
    model.save_pretrained(folder / "tae")
    dump(InflatedRun(tae=model.config), folder / "tae.yaml")


def inflate(source: str | Path) -> TAE:
    """The autoencoder that treats a one-frame clip as the image autoencoder `source` treats a picture.

    `source` is a folder or a hub id, owner/name or owner/name/subfolder. Time shrinks where height and width
    do. The statistics of the latent are those that the source's scaling and shift stand for.

    Raises:
        UserError: a missing or damaged file, or an architecture that is not latent diffusion's.
    """
    folder = _folder(source)
    config = inflated_config(folder)
    state = {_renamed(name): tensor for name, tensor in Weights(folder, STEM).items()}
    model = TAE(config)
    with torch.random.fork_rng(devices=[]):  # what the source has no value for: the same at every inflation
        torch.manual_seed(0)
        model.init_weights()
    try:
        weights = model.state_dict() | dict(_weights(model, state))
    except KeyError as error:
        raise UserError(f"{folder}: no weight {error}; fetch the folder again") from None
    load_state(model, weights, source)
    return model.to(memory_format=torch.channels_last_3d).eval()  # pyright: ignore[reportCallIssue]


def inflated_config(folder: Path) -> TAEConfig:
    """The shape of what `inflate` makes of a folder.

    Raises:
        UserError: a missing or damaged file, or an architecture that is not latent diffusion's.
    """
    path = folder / CONFIG_NAME
    try:
        image = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; give the folder of an AutoencoderKL, often vae/") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); fetch the folder again") from None
    return _config(image, path)


def _folder(source: str | Path) -> Path:
    path = Path(source)
    if path.is_dir() or path.is_absolute():
        return resolve_folder(path)
    repository, subfolder = Path(*path.parts[:2]), Path(*path.parts[2:])
    patterns = [str(subfolder / CONFIG_NAME), str(subfolder / f"{STEM}*.safetensors*")]
    return resolve_folder(repository, patterns) / subfolder


def _config(image: Mapping[str, Any], path: Path) -> TAEConfig:
    """The shape of the inflated model."""
    for key, allowed in FIXED.items():
        if image.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path}: {key} is {image[key]!r}; only {allowed[0]!r} can be inflated")
    for key, kind in BLOCKS.items():
        if set(image.get(key, ())) - {kind}:
            raise UserError(f"{path}: {key}: only {kind} can be inflated")
    try:
        widths, blocks, channels = (
            image[key] for key in ("block_out_channels", "layers_per_block", "latent_channels")
        )
    except KeyError as error:
        raise UserError(f"{path}: no key {error}; give the folder of an AutoencoderKL") from None
    if any(width % widths[0] for width in widths):
        raise UserError(f"{path}: block_out_channels: multiples of the first can be inflated")
    mean, std = _statistics(image, channels)
    try:
        return TAEConfig(
            channels=widths[0],
            multipliers=tuple(width // widths[0] for width in widths),
            strides=((2, 2, 2),) * (len(widths) - 1),
            encoder_blocks=(blocks,) * len(widths),
            decoder_blocks=(blocks + 1,) * len(widths),
            latent_channels=channels,
            post_quant=image.get("use_post_quant_conv", True),
            latent_mean=mean,
            latent_std=std,
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _statistics(image: Mapping[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel: diffusion sees (z - shift) · scale, or (z - mean) · scale / std."""
    shift, scale = image.get("shift_factor") or 0.0, image.get("scaling_factor", 0.18215)
    means = image.get("latents_mean") or [shift] * channels
    stds = image.get("latents_std") or [1.0] * channels
    return tuple(map(float, means)), tuple(std / scale for std in stds)


def _renamed(name: str) -> str:
    head, dot, tail = name.rpartition(".")
    stem, parent, last = head.rpartition(".")
    renamed = OLD_NAMES.get(last, last) if ".attentions." in name else last
    return f"{stem}{parent}{renamed}{dot}{tail}"


def _weights(model: TAE, state: State) -> Iterator[tuple[str, Tensor]]:
    """What the image autoencoder has a value for, under our names."""
    for side, half in (("encoder", model.encoder), ("decoder", model.decoder)):
        yield from _conv(f"{side}.conv_in.spatial", state, f"{side}.conv_in")
        yield from _conv(f"{side}.conv_out.spatial", state, f"{side}.conv_out")
        yield from _same(f"{side}.norm_out", state, f"{side}.conv_norm_out")
        for index, (layer, name) in enumerate(zip(half.layers, _image_names(half, side), strict=True)):
            yield from _layer(f"{side}.layers.{index}", layer, state, f"{side}.{name}")
    # The moments pass through conv_out's identity in time: there the quantizing 1x1 convolution fits exactly.
    weight = model.encoder.conv_out.temporal.weight.detach().clone()
    bias = torch.zeros(len(weight))
    if "quant_conv.weight" in state:
        weight[:, :, 1] = state["quant_conv.weight"].float()
        bias = state["quant_conv.bias"]
    yield "encoder.conv_out.temporal.weight", weight
    yield "encoder.conv_out.temporal.bias", bias
    if model.decoder.post_quant is not None:
        yield from _conv("decoder.post_quant", state, "post_quant_conv")


def _image_names(half: Encoder | Decoder, side: str) -> Iterator[str]:
    """diffusers' name of each of our layers, in order."""
    middle = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    blocks, resampler = ("down_blocks", "downsamplers") if side == "encoder" else ("up_blocks", "upsamplers")
    inner = list(half.layers)[:-3] if side == "encoder" else list(half.layers)[3:]
    if side == "decoder":
        yield from middle
    level = block = 0
    for layer in inner:
        if isinstance(layer, ResBlock):
            yield f"{blocks}.{level}.resnets.{block}"
            block += 1
        else:
            yield f"{blocks}.{level}.{resampler}.0.conv"
            level, block = level + 1, 0
    if side == "encoder":
        yield from middle


def _layer(ours: str, layer: torch.nn.Module, state: State, theirs: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(layer, ResBlock):
        for n in (1, 2):
            yield from _same(f"{ours}.norm{n}", state, f"{theirs}.norm{n}")
            yield from _conv(f"{ours}.conv{n}.spatial", state, f"{theirs}.conv{n}")
        if not isinstance(layer.skip, torch.nn.Identity):
            yield from _conv(f"{ours}.skip", state, f"{theirs}.conv_shortcut")
    elif isinstance(layer, Attention):
        yield from _same(f"{ours}.spatial_norm", state, f"{theirs}.group_norm")
        yield from _same(f"{ours}.spatial_out", state, f"{theirs}.to_out.0")
        for kind in ("weight", "bias"):
            parts = [state[f"{theirs}.{name}.{kind}"] for name in ("to_q", "to_k", "to_v")]
            joined = torch.cat(parts)
            yield f"{ours}.spatial_qkv.{kind}", joined.flatten(1) if kind == "weight" else joined
    else:
        assert isinstance(layer, Downsample | Upsample)
        yield from _conv(f"{ours}.spatial", state, theirs)


def _conv(ours: str, state: State, theirs: str) -> Iterator[tuple[str, Tensor]]:
    """A 2D convolution as one of a single frame."""
    yield f"{ours}.weight", state[f"{theirs}.weight"].unsqueeze(2)
    yield f"{ours}.bias", state[f"{theirs}.bias"]


def _same(ours: str, state: State, theirs: str) -> Iterator[tuple[str, Tensor]]:
    weight = state[f"{theirs}.weight"]
    yield f"{ours}.weight", weight.flatten(1) if weight.ndim > 2 else weight
    yield f"{ours}.bias", state[f"{theirs}.bias"]
