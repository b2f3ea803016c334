"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): their shape, and weights with them added.

A linear layer's weight W "out in" becomes W + s · B A, with A "rank in", B "out rank" and s = alpha / rank.
Folders of adapters are peft's: adapter_config.json beside adapter_model.safetensors.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kinoflow.configs.errors import UserError
from kinoflow.configs.pretrained import Weights, fingerprint, resolve_folder

TARGETS = ("qkv", "query", "key_value", "gate_up", "out")  # all linear layers of a block
CONFIG_NAME, STEM, PREFIX = "adapter_config.json", "adapter_model", "base_model.model."
# Of what peft's LoRA can be beside the plain one, what a weight of ours would not be changed rightly by.
_PLAIN = (
    "use_dora", "use_rslora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "rank_pattern",
    "alpha_pattern", "modules_to_save", "layer_replication", "alora_invocation_tokens",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Adapters that are trained while the weights of init_from stay."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: int = 16
    """Their weight is alpha / rank."""
    targets: tuple[str, ...] = TARGETS
    """Linear layers that get one: ends of names."""
    dropout: float = 0.0
    """Share of their inputs that a step drops."""
    init_from: str | None = None
    """Folder of adapters to begin with."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UserError(f"lora.rank: {self.rank} is negative; 0 trains all weights")
        if self.alpha < 1:
            raise UserError(f"lora.alpha: {self.alpha} is too small, the least is 1")
        if not self.targets:
            raise UserError(f"lora.targets: name at least one linear layer, such as {TARGETS[0]}")
        if self.init_from is not None and not self.rank:
            raise UserError("lora.init_from: needs lora.rank, that of the adapters to begin with")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout: {self.dropout} must lie in [0, 1)")


class Pair(NamedTuple):
    """What changes one weight "out in"."""

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Pairs by the name of the weight that they change; `source` is what messages call it."""

    source: str
    scale: float
    pairs: Mapping[str, Pair]

    def digest(self) -> str:
        """SHA-256 over names and values."""
        return fingerprint(
            {f"{name}.{i}": half for name, pair in self.pairs.items() for i, half in enumerate(pair)}
        )


class Merged(Mapping[str, Tensor]):
    """Weights with adapters added, one by one as they are asked for; fp32 at least where one is changed.

    Raises:
        UserError: an adapter changes a weight that is not there, or has another shape.
    """

    def __init__(self, weights: Weights, adapters: Sequence[Adapter]) -> None:
        self._weights, self._adapters = weights, adapters
        for adapter in adapters:
            for name, (a, b) in adapter.pairs.items():
                if name not in weights:
                    raise UserError(f"{adapter.source}: changes {name}, which this transformer has not; take "
                                    "an adapter that was made for it")  # fmt: skip
                made_for, shape = (b.shape[0], a.shape[1]), weights.shape(name)
                if made_for != shape:
                    raise UserError(f"{adapter.source}: made for a {name} of {made_for}, this transformer's "
                                    f"has {shape}; take an adapter that was made for it")  # fmt: skip

    def __getitem__(self, name: str) -> Tensor:
        value = self._weights[name]
        for adapter in self._adapters:
            if name in adapter.pairs:
                a, b = adapter.pairs[name]
                value = value.to(torch.promote_types(value.dtype, torch.float32))
                value = value + adapter.scale * (b.to(value.dtype) @ a.to(value.dtype))
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def read_adapter(words: str) -> Adapter:
    """Read the adapter of "FOLDER" or "FOLDER:scale", a folder or hub id of plain LoRA as peft writes it.

    Raises:
        UserError: a scale that is no number, a missing or damaged file, or another kind of adapter.
    """
    source, strength = split_scale(words)
    folder = resolve_folder(source, ["adapter_*"])
    config = _read_config(folder / CONFIG_NAME)
    pairs = _pair_up(Weights(folder, STEM), folder)
    rank = config["r"]
    for name, (a, b) in pairs.items():
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise UserError(f"{folder}: A and B of {name} are {shapes}, not of rank {rank} as {CONFIG_NAME} "
                            "says; export it again")  # fmt: skip
    return Adapter(source=str(folder), scale=strength * config["lora_alpha"] / rank, pairs=pairs)


def split_scale(words: str) -> tuple[str, float]:
    """The folder and the scale of "FOLDER" (1) or "FOLDER:scale".

    Raises:
        UserError: a scale that is no number.
    """
    folder, colon, scale = words.rpartition(":")
    if not colon or Path(words).is_dir():
        return words, 1.0
    try:
        return folder, float(scale)
    except ValueError:
        raise UserError(f"lora: {words}: {scale!r} is no number; write FOLDER or FOLDER:0.8") from None


def _read_config(path: Path) -> dict[str, int]:
    """Its rank and alpha, where it describes plain LoRA."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, numbers = config["peft_type"], {key: config[key] for key in ("r", "lora_alpha")}
    except FileNotFoundError:
        raise UserError(f"{path}: missing; an adapter has it beside {STEM}.safetensors") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); export it again") from None
    others = [key for key in _PLAIN if config.get(key)]
    if kind != "LORA" or others or config.get("bias", "none") != "none":
        said = kind if kind != "LORA" else ", ".join(others) or "bias"
        raise UserError(f"{path}: {said} is not plain LoRA; take one without")
    if not all(isinstance(value, int | float) and value > 0 for value in numbers.values()):
        raise UserError(f"{path}: r and lora_alpha must be numbers above 0; export it again")
    return numbers


def _pair_up(weights: Mapping[str, Tensor], folder: Path) -> dict[str, Pair]:
    halves: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for key in weights:
        name = key.removeprefix(PREFIX)
        for half, end in zip(halves, (".lora_A.weight", ".lora_B.weight"), strict=True):
            if name != key and name.endswith(end):
                half[name.removesuffix(end) + ".weight"] = weights[key]
                break
        else:
            raise UserError(f"{folder}: {key} is no part of plain LoRA as peft names it; take one without")
    if odd := halves[0].keys() ^ halves[1].keys():
        raise UserError(f"{folder}: A or B of {min(odd)} is missing; export it again")
    if not halves[0]:
        raise UserError(f"{folder}: {STEM}.safetensors is empty; export it again")
    return {name: Pair(halves[0][name], halves[1][name]) for name in sorted(halves[0])}


def ends_with(name: str, targets: Collection[str]) -> bool:
    """Whether a layer of this name is meant, as peft reads such words."""
    return any(name == target or name.endswith(f".{target}") for target in targets)
