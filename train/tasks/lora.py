"""Adapters in a backbone that is trained, by peft: put in, given values, and written as peft writes them."""

import math
import re
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import seeded
from kinoflow.configs.pretrained import packed
from kinoflow.dit_video.lora import PREFIX, STEM, Adapter, LoRAConfig, Pair, ends_with, read_adapter

_BASE, _A, _B = ".base_layer.", ".lora_A.default.", ".lora_B.default."


def inject(model: nn.Module, config: LoRAConfig, base: str) -> None:
    """Put adapters beside the targets of a model on the meta device, and freeze all else.

    `base` is where the model's weights come from, which adapters that are written will say.

    Raises:
        UserError: a target that is no linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in config.targets:
        if not any(ends_with(name, [target]) for name in linear):
            names = sorted({re.sub(r"^blocks\.\d+\.", "", name) for name in linear})
            raise UserError(f"lora.targets: {target} is no linear layer; there are {', '.join(names)}")
    chosen = [name for name in linear if ends_with(name, config.targets)]
    settings = LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout,
                          target_modules=chosen, base_model_name_or_path=base)  # fmt: skip
    inject_adapter_in_model(settings, model)


def earlier(config: LoRAConfig) -> Adapter:
    """The adapters that a run begins with, in its rank and weight.

    Of a larger rank they become the nearest of this one.

    Raises:
        UserError: they can't be read.
    """
    assert config.init_from is not None, "the configuration asks for it"
    found, scale = read_adapter(config.init_from), config.alpha / config.rank
    pairs = {name: _fitted(pair, found.scale / scale, config.rank) for name, pair in found.pairs.items()}
    return Adapter(source=found.source, scale=scale, pairs=pairs)


def _fitted(pair: Pair, times: float, rank: int) -> Pair:
    """So many times B A, or the nearest of this rank: its largest singular values, in each the root."""
    if len(pair.a) <= rank:
        return Pair(pair.a.float(), times * pair.b.float())
    (left, b), (right, a) = torch.linalg.qr(pair.b.double()), torch.linalg.qr(pair.a.double().T)
    u, values, v = torch.linalg.svd(b @ a.T)
    root = (times * values[:rank]).sqrt()
    return Pair((root[:, None] * (v[:rank] @ right.T)).float(), (left @ u[:, :rank] * root).float())


def base_name(name: str) -> str | None:
    """What a parameter is called in the model without adapters; None for one of an adapter."""
    return None if _A in name or _B in name else name.replace(_BASE, ".")


@torch.no_grad()
def init_parameter(name: str, value: Float[Tensor, "..."], earlier: Adapter | None = None) -> None:
    """Write the starting value of an adapter's parameter: that of `earlier`, else A is random and B zero.

    As in peft, and from torch's seed and the name alone, as the values of `VideoDiT.init_parameter` are.

    Raises:
        UserError: `earlier` has none for this layer, or one of a smaller rank.
    """
    if earlier is not None:
        layer, half, _ = name.partition(_A if _A in name else _B)
        pair = earlier.pairs.get(f"{layer}.weight")
        if pair is None or pair[half == _B].shape != value.shape:
            has = "none" if pair is None else f"one of rank {len(pair.a)}"
            raise UserError(f"lora.init_from: {earlier.source} has {has} for {layer}; give this run its "
                            "lora.targets and lora.rank")  # fmt: skip
        value.copy_(pair[half == _B])
    elif _B in name:
        nn.init.zeros_(value)
    else:
        generator = torch.Generator(value.device).manual_seed(seeded("weight", torch.initial_seed(), name))
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)


def trained(config: LoRAConfig, state: Mapping[str, Tensor], source: str) -> Adapter:
    """The adapter whose values a checkpoint holds."""
    names = [name.partition(_A)[0] for name in state if _A in name]
    pairs = {f"{name}.weight": Pair(state[f"{name}{_A}weight"], state[f"{name}{_B}weight"]) for name in names}
    return Adapter(source=source, scale=config.alpha / config.rank, pairs=pairs)


def write(
    model: nn.Module, state: Mapping[str, Tensor], folder: Path, dtype: torch.dtype = torch.float16
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as peft's own save_pretrained does.

    `model` is what `inject` made, on the meta device; `state` has the values. What is written in torch.int8
    (`save_pretrained`) peft does not read.
    """
    from peft import get_peft_model_state_dict

    values = get_peft_model_state_dict(model, dict(state), save_embedding_layers=False)
    named = packed({f"{PREFIX}{name}": value for name, value in values.items()}, dtype)
    save_file(named, folder / f"{STEM}.safetensors", metadata={"format": "pt"})
    adapters: Any = model.peft_config
    settings = copy(adapters["default"])
    settings.inference_mode = True
    settings.target_modules = sorted(settings.target_modules)  # a set, in another order each time
    settings.save_pretrained(str(folder))
