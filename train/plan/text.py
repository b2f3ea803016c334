"""The three text encoders in a plan: how large they are and how many tokens they hand on.

A release folder says it in its config.json files; without one, the published checkpoint of that width does.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinoflow.configs.errors import UserError

NAMES = ("ul2", "byt5", "metaclip")
LIMITS = (512, 100, 256)  # tokens, end token included: what conditioning.encoders cuts at


@dataclass(frozen=True, kw_only=True)
class EncoderSize:
    """One encoder: its parameters, the tokens of its longest prompt and how wide their states are."""

    name: str
    source: str
    parameters: int
    width: int
    tokens: int

    @property
    def flops(self) -> float:
        """Forward FLOPs of one prompt, 2 a parameter and token (Kaplan et al. 2020, section 2.1)."""
        return 2.0 * self.parameters * self.tokens


# Of published config.json files, encoder halves. ByT5 base is as wide as large, which stands for both.
_UL2 = {"d_ff": 16384, "d_kv": 256, "num_heads": 16, "num_layers": 32, "vocab_size": 32128}
_BYT5_SMALL = {"d_ff": 3584, "d_kv": 64, "num_heads": 6, "num_layers": 12, "vocab_size": 384}
_BYT5_LARGE = {"d_ff": 3840, "d_kv": 64, "num_heads": 16, "num_layers": 36, "vocab_size": 384}
_BYT5_XL = {"d_ff": 6720, "d_kv": 64, "num_heads": 32, "num_layers": 36, "vocab_size": 384}
_BYT5_XXL = {"d_ff": 12352, "d_kv": 64, "num_heads": 64, "num_layers": 36, "vocab_size": 384}
_METACLIP_B = {"intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 49408}
_METACLIP_L = {"intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 49408}
_METACLIP_H = {"intermediate_size": 4096, "num_hidden_layers": 24, "vocab_size": 49408}
_PUBLISHED: dict[tuple[str, int], tuple[str, dict[str, int]]] = {
    ("ul2", 4096): ("google/ul2", _UL2),
    ("byt5", 1472): ("google/byt5-small", _BYT5_SMALL),
    ("byt5", 1536): ("google/byt5-large", _BYT5_LARGE),
    ("byt5", 2560): ("google/byt5-xl", _BYT5_XL),
    ("byt5", 4672): ("google/byt5-xxl", _BYT5_XXL),
    ("metaclip", 512): ("facebook/metaclip-b16-fullcc2.5b", _METACLIP_B),
    ("metaclip", 768): ("facebook/metaclip-l14-fullcc2.5b", _METACLIP_L),
    ("metaclip", 1024): ("facebook/metaclip-h14-fullcc2.5b", _METACLIP_H),
}


def encoder_sizes(widths: tuple[int, ...], release: Path | None) -> tuple[EncoderSize, ...]:
    """The encoders whose states are `widths` wide, in the order (UL2, ByT5, MetaCLIP).

    Raises:
        UserError: not three widths, or one that neither the release folder nor a published encoder has.
    """
    if len(widths) != len(NAMES):
        raise UserError(f"dit.text_widths: {list(widths)} are not three widths, of {', '.join(NAMES)}")
    return tuple(_size(*each, release) for each in zip(NAMES, widths, LIMITS, strict=True))


def _size(name: str, width: int, limit: int, release: Path | None) -> EncoderSize:
    folder = None if release is None else release / "text" / name
    config = {} if folder is None else _read(folder / "config.json")
    if folder is not None and config.get("d_model", config.get("hidden_size")) == width:
        source, shape = str(folder), config
        longest = _read(folder / "tokenizer_config.json").get("model_max_length", limit)
        limit = min(limit, int(config.get("max_position_embeddings", longest)))
    elif (name, width) in _PUBLISHED:
        source, shape = _PUBLISHED[name, width]
    else:
        known = ", ".join(str(size) for other, size in _PUBLISHED if other == name)
        where = "" if release is None else f" in {release}/text"
        raise UserError(f"dit.text_widths: no {name} is {width} wide{where}, and the published ones are "
                        f"{known}; correct the width or release=FOLDER")  # fmt: skip
    count: Callable[..., int] = clip_parameters if name == "metaclip" else t5_parameters
    parameters = count(width, shape, limit)
    return EncoderSize(name=name, source=source, parameters=parameters, width=width, tokens=limit)


def t5_parameters(d: int, shape: Mapping[str, Any], _: int) -> int:
    """Parameters of T5EncoderModel: in a layer attention, gated feed-forward, norms."""
    inner = shape["d_kv"] * shape["num_heads"]
    layer = 4 * d * inner + 3 * d * shape["d_ff"] + 2 * d
    biases = shape.get("relative_attention_num_buckets", 32) * shape["num_heads"]
    return shape["vocab_size"] * d + shape["num_layers"] * layer + biases + d


def clip_parameters(d: int, shape: Mapping[str, Any], tokens: int) -> int:
    """Parameters of CLIPTextModel: in a layer attention, feed-forward, two norms, all with bias."""
    hidden = shape["intermediate_size"]
    layer = 4 * (d * d + d) + 2 * d * hidden + hidden + d + 4 * d
    return (shape["vocab_size"] + tokens) * d + shape["num_hidden_layers"] * layer + 2 * d


def _read(path: Path) -> dict[str, Any]:
    """A JSON file, empty where there is none."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy the folder again") from None
