"""The transformer of Stable Diffusion 3 and 3.5 as it is released: a diffusers folder, read as it lies.

Our weights are theirs joined, cut or turned: each name of ours follows from some names of theirs, which are
read when it is asked for. Nothing is written.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from kinoflow.configs.errors import UserError, one_line
from kinoflow.configs.pretrained import CONFIG_NAME, Weights, load_state
from kinoflow.dit_video.attention.kernels import KernelName
from kinoflow.dit_video.mmdit import MMDiT, MMDiTConfig

STEM = "diffusion_pytorch_model"
CLASS = "SD3Transformer2DModel"
_TABLE = "pos_embed.pos_embed"
_ROUNDING = 1e-3  # of a table that was kept in fp16, beside its exact values


@dataclass(frozen=True, kw_only=True)
class Source:
    """How one of our tensors is made: of which of theirs, of which shapes, and by what."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    make: Callable[..., Tensor]


def read_shape(folder: Path) -> tuple[MMDiTConfig, int]:
    """The shape that a folder's config.json describes, and the side in latent cells that it was made for.

    Raises:
        UserError: a missing or damaged file, another class, or a kind that this architecture does not have.
    """
    path = folder / CONFIG_NAME
    try:
        given: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if given.get("_class_name", CLASS) != CLASS:
            raise UserError(f"{path}: holds a {given['_class_name']}, and only {CLASS} can be read")
        width = given["num_attention_heads"] * given["attention_head_dim"]
        config = MMDiTConfig(
            width=width,
            depth=given["num_layers"],
            heads=given["num_attention_heads"],
            latent_channels=given["in_channels"],
            patch=given["patch_size"],
            text_widths=(given["joint_attention_dim"],),
            pooled_width=given["pooled_projection_dim"],
            max_tokens=given["pos_embed_max_size"],
            qk_norm=given.get("qk_norm") is not None,
            dual_attention_layers=tuple(given.get("dual_attention_layers") or ()),
        )
        side = int(given["sample_size"])
    except FileNotFoundError:
        raise UserError(f"{path}: missing; fetch the folder again") from None
    except KeyError as error:
        raise UserError(f"{path}: no key {error}; fetch the folder again") from None
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); fetch the folder again") from None
    fixed = {"qk_norm": (None, "rms_norm"), "caption_projection_dim": (width,),
             "out_channels": (None, given["in_channels"])}  # fmt: skip
    for key, allowed in fixed.items():
        if given.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path}: {key} is {given[key]!r}, and only {allowed[-1]!r} can be read")
    return config, side


def read_released(folder: Path, dtype: torch.dtype = torch.float32, attention: KernelName = "sdpa") -> MMDiT:
    """The transformer of a diffusers folder, its weights in `dtype`, in evaluation mode.

    Raises:
        UserError: a missing or damaged file, or weights that config.json does not describe.
    """
    config, _ = read_shape(folder)
    with torch.device("meta"):
        model = MMDiT(replace(config, attention=attention))
    load_state(model, Released(folder, config), folder, dtype)
    return model.eval()


class Released(Mapping[str, Tensor]):
    """Our tensors, each made of theirs when it is asked for.

    Raises:
        UserError: a tensor that is missing, unknown or of another shape.
    """

    def __init__(self, folder: Path, config: MMDiTConfig) -> None:
        self._weights = Weights(folder, STEM)
        self._sources = sources(config)
        wanted = unread(config)
        for source in self._sources.values():
            wanted |= dict(zip(source.names, source.shapes, strict=True))
        for name in sorted(wanted.keys() | self._weights.keys()):
            if name not in self._weights:
                raise UserError(f"{folder}: no weight {name}, which config.json describes; fetch it again")
            if name not in wanted:
                raise UserError(f"{folder}: {name} is no weight of what config.json describes; "
                                "fetch it again")  # fmt: skip
            if (shape := self._weights.shape(name)) != wanted[name]:
                raise UserError(f"{folder}: {name} is {shape} and not {wanted[name]}, as config.json "
                                "describes it; fetch it again")  # fmt: skip

    def __getitem__(self, name: str) -> Tensor:
        source = self._sources[name]
        return source.make(*(self._weights[each] for each in source.names))

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def sources(config: MMDiTConfig) -> dict[str, Source]:
    """What each of our tensors is made of."""
    d, c, p = config.width, config.latent_channels, config.patch
    table = config.max_tokens**2

    def pixels(weight: Tensor) -> Tensor:  # they give the channels of a pixel last
        return rearrange(weight, "(ph pw c) ... -> (c ph pw) ...", ph=p, pw=p)

    found = {
        "positions.rows": _one(_TABLE, (1, table, d), lambda grid: _axes(grid, config.max_tokens)[0]),
        "positions.columns": _one(_TABLE, (1, table, d), lambda grid: _axes(grid, config.max_tokens)[1]),
        "embed.weight": _one("pos_embed.proj.weight", (d, c, p, p), lambda weight: weight.flatten(1)),
        "embed.bias": _one("pos_embed.proj.bias", (d,)),
        "head.weight": _one("proj_out.weight", (p * p * c, d), pixels),
        "head.bias": _one("proj_out.bias", (p * p * c,), pixels),
        **_linear("head_modulation", "norm_out.linear", (2 * d, d), _shift_first),
        **_linear("text.0", "context_embedder", (d, config.text_widths[0])),
    }
    for ours, theirs, inside in (("time.mlp", "timestep", 256), ("pooled", "text", config.pooled_width)):
        for index, (number, width) in enumerate(((1, inside), (2, d))):
            name = f"time_text_embed.{theirs}_embedder.linear_{number}"
            found |= _linear(f"{ours}.{2 * index}", name, (d, width))
    for index in range(config.depth):
        found |= _block(config, index)
    return found


def unread(config: MMDiTConfig) -> dict[str, tuple[int, ...]]:
    """Their tensors, with their shapes, that nothing follows from: the last block's text asks nobody."""
    last, head = f"transformer_blocks.{config.depth - 1}.attn", config.width // config.heads
    found: dict[str, tuple[int, ...]] = {f"{last}.add_q_proj.weight": (config.width,) * 2}
    found[f"{last}.add_q_proj.bias"] = (config.width,)
    return found | ({f"{last}.norm_added_q.weight": (head,)} if config.qk_norm else {})


def _block(config: MMDiTConfig, index: int) -> dict[str, Source]:
    d, block, theirs = config.width, f"blocks.{index}", f"transformer_blocks.{index}"
    last, second = index == config.depth - 1, index in config.dual_attention_layers
    found: dict[str, Source] = {}
    for stream, norm, feed_forward, queries, keys, out, parts in (
        ("image", "norm1", "ff", ("to_q", "to_k", "to_v"), "", "to_out.0", 9 if second else 6),
        ("text", "norm1_context", "ff_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "added_",
         "to_add_out", 2 if last else 6),
    ):  # fmt: skip
        ends = last and stream == "text"
        name = f"{block}.{stream}"
        # Theirs that ends gives the scale first.
        turn = _shift_first if ends else _same
        found |= _linear(f"{name}.modulation", f"{theirs}.{norm}.linear", (parts * d, d), turn)
        asks = queries[1:] if ends else queries
        found |= _projections(config, f"{name}.projections", f"{theirs}.attn", asks, keys)
        if not ends:
            found |= _linear(f"{name}.out", f"{theirs}.attn.{out}", (d, d))
            found |= _linear(f"{name}.ffn.into", f"{theirs}.{feed_forward}.net.0.proj", (4 * d, d))
            found |= _linear(f"{name}.ffn.out", f"{theirs}.{feed_forward}.net.2", (d, 4 * d))
    if second:
        own = f"{block}.own_attention"
        found |= _projections(config, f"{own}.projections", f"{theirs}.attn2", ("to_q", "to_k", "to_v"), "")
        found |= _linear(f"{own}.out", f"{theirs}.attn2.to_out.0", (d, d))
    return found


def _projections(
    config: MMDiTConfig, ours: str, theirs: str, names: tuple[str, ...], norm: str
) -> dict[str, Source]:
    """One matrix of their two or three, in order, and the norms of queries and keys."""
    d, head = config.width, config.width // config.heads
    found = {
        f"{ours}.linear.{kind}": Source(
            names=tuple(f"{theirs}.{name}.{kind}" for name in names),
            shapes=(shape,) * len(names),
            make=lambda *parts: torch.cat(parts),
        )
        for kind, shape in (("weight", (d, d)), ("bias", (d,)))
    }
    if config.qk_norm:
        found[f"{ours}.key_norm.weight"] = _one(f"{theirs}.norm_{norm}k.weight", (head,))
        if len(names) == 3:
            found[f"{ours}.query_norm.weight"] = _one(f"{theirs}.norm_{norm}q.weight", (head,))
    return found


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _shift_first(tensor: Tensor) -> Tensor:
    scale, shift = tensor.chunk(2)
    return torch.cat((shift, scale))


def _one(name: str, shape: tuple[int, ...], make: Callable[[Tensor], Tensor] = _same) -> Source:
    return Source(names=(name,), shapes=(shape,), make=make)


def _linear(
    ours: str, theirs: str, shape: tuple[int, int], make: Callable[[Tensor], Tensor] = _same
) -> dict[str, Source]:
    return {
        f"{ours}.weight": _one(f"{theirs}.weight", shape, make),
        f"{ours}.bias": _one(f"{theirs}.bias", shape[:1], make),
    }


def _axes(grid: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of their square of positions, each half of whose width says one of them.

    Raises:
        UserError: it says more than that.
    """
    columns, rows = grid[0].unflatten(0, (size, size)).chunk(2, dim=2)
    row, column = rows[:, 0], columns[0]
    if (rows - row[:, None]).abs().max() > _ROUNDING or (columns - column).abs().max() > _ROUNDING:
        raise UserError(f"{_TABLE}: its positions are not those of a row and of a column; fetch it again")
    return row.clone(), column.clone()
