"""The text of Stable Diffusion 3 (Esser et al. 2024, section 4): two CLIP towers and T5, in one sequence.

Both towers' states of the layer before the last are joined on channels and padded with zeros to T5's width;
T5's states follow behind them. The towers' projections, joined, are the pooled text. As its users have it,
every text fills its limit with padding, and padding is seen by encoders and transformer like any token.
"""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

from kinoflow.conditioning.checkpoints import CLIP_T5, CLIP_T5_TOKENIZERS
from kinoflow.conditioning.embedding import TextEmbedding, warn_of_cuts
from kinoflow.conditioning.encoders import quiet
from kinoflow.configs.errors import UserError, one_line

LIMITS = {"clip_l": 77, "clip_g": 77, "t5": 256}
"""Tokens of each encoder, padding included."""


class _Encoder(nn.Module):
    """A tokenizer and its model, frozen."""

    def __init__(self, name: str, tokenizer: Any, model: Any) -> None:
        super().__init__()
        self.name, self.tokenizer = name, tokenizer
        self.model = model.eval().requires_grad_(False)

    def tokens(self, texts: list[str]) -> Tensor:
        """Ids "b limit", padded; warns of texts that are cut."""
        limit = LIMITS[self.name]
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = self.tokenizer(texts, max_length=limit, **options).input_ids
        lengths = map(len, self.tokenizer(texts).input_ids)
        warn_of_cuts(self.name, limit, [length > limit for length in lengths])
        return ids.to(self.model.device)


class ClipT5Encoder(nn.Module):
    """Prompts to the one sequence and the pooled text of Stable Diffusion 3 (lecture notes, section 1.3.1).

    Args:
        clip_l, clip_g: the towers with their tokenizers.
        t5: None leaves its states zero, as users without memory for it do.
        width: of the sequence's states, T5's.
    """

    def __init__(self, *, clip_l: _Encoder, clip_g: _Encoder, t5: _Encoder | None, width: int) -> None:
        super().__init__()
        self.clip_l, self.clip_g, self.t5 = clip_l, clip_g, t5
        self.width = width

    @classmethod
    def from_folder(
        cls, folder: Path, *, width: int, with_t5: bool = True, dtype: torch.dtype = torch.float32
    ) -> "ClipT5Encoder":
        """Read text_encoder/, tokenizer/ and those numbered 2 and 3 of a diffusers folder, in `dtype`.

        Raises:
            UserError: a missing or damaged part, or widths that do not go into `width`.
        """
        names = [name for name in CLIP_T5 if with_t5 or name != "t5"]
        found = {name: _load(folder, name, dtype) for name in names}
        clip = sum(found[name].model.config.hidden_size for name in ("clip_l", "clip_g"))
        t5 = found.get("t5")
        if clip > width or (t5 is not None and t5.model.config.d_model != width):
            raise UserError(
                f"{folder}: the transformer takes text states {width} wide, the towers' are {clip} and "
                f"T5's {'absent' if t5 is None else t5.model.config.d_model}; fetch the folder again"
            )
        return cls(clip_l=found["clip_l"], clip_g=found["clip_g"], t5=t5, width=width)

    @property
    def widths(self) -> tuple[int]:
        """Of the states of the one sequence."""
        return (self.width,)

    @property
    def pooled_widths(self) -> tuple[int]:
        """Of the pooled text: both projections."""
        return (sum(each.model.config.projection_dim for each in (self.clip_l, self.clip_g)),)

    @torch.no_grad()
    def forward(self, prompts: list[str], fps: Fraction) -> tuple[TextEmbedding, ...]:
        """One embedding of 77 + 256 tokens a prompt; a picture has no frame rate."""
        del fps
        states, pooled = zip(*(_tower(each, prompts) for each in (self.clip_l, self.clip_g)), strict=True)
        joined = torch.cat(states, dim=2)
        joined = functional.pad(joined, (0, self.width - joined.shape[2]))
        if self.t5 is None:
            sentence = joined.new_zeros(len(prompts), LIMITS["t5"], self.width)
        else:
            sentence = self.t5.model(self.t5.tokens(prompts)).last_hidden_state
        hidden = torch.cat((joined, sentence), dim=1)
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return (TextEmbedding(hidden=hidden, mask=mask, pooled=torch.cat(pooled, dim=1)),)

    def null(self) -> tuple[TextEmbedding, ...]:
        """The states of the empty prompt, a batch of one."""
        return self([""], Fraction(1))


def _tower(encoder: _Encoder, prompts: list[str]) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b p"]]:
    """States of the layer before the last, and the projection of the last one's end token."""
    found = encoder.model(encoder.tokens(prompts), output_hidden_states=True)
    return found.hidden_states[-2], found.text_embeds


def _load(folder: Path, name: str, dtype: torch.dtype) -> _Encoder:
    weights, words = folder / CLIP_T5[name], folder / CLIP_T5_TOKENIZERS[name]
    for part in (weights / "config.json", words / "tokenizer_config.json"):
        if not part.is_file():
            raise UserError(f"{part}: missing; fetch the folder again")
    kind = T5EncoderModel if name == "t5" else CLIPTextModelWithProjection
    given = _class_of(weights / "config.json")
    if given != kind.__name__:
        raise UserError(f"{weights}: holds a {given}, and {kind.__name__} is needed; fetch the folder again")
    where: dict[str, Any] = {"local_files_only": True}
    try:
        with quiet():
            loaded: Any = kind.from_pretrained(weights, dtype=dtype, output_loading_info=True, **where)
            tokenizer = AutoTokenizer.from_pretrained(words, **where)
    # What a damaged file raises depends on where the damage is: JSON, safetensors, sizes, tokenizer.
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{weights}: can't be read; fetch the folder again ({one_line(error)})") from error
    model, info = loaded
    if info["missing_keys"]:
        raise UserError(f"{weights}: no weight {min(info['missing_keys'])}; fetch the folder again")
    if tokenizer.unk_token_id in tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise UserError(f"{words}: the tokenizer's files are missing or empty; fetch the folder again")
    return _Encoder(name, tokenizer, model)


def _class_of(path: Path) -> str:
    """The class that wrote a model's config.json."""
    try:
        named = json.loads(path.read_text(encoding="utf-8")).get("architectures") or [""]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a JSON object ({error}); fetch the folder again") from None
    return str(named[0])
