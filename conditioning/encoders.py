"""UL2, ByT5 and MetaCLIP: Hugging Face checkpoints behind one Protocol.

Letters: b prompts, l tokens, d width of an encoder. The states are raw (the last hidden states): they
can be computed once and stored; the projections to the model width belong to the video transformer.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import transformers
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, ByT5Tokenizer, CLIPTextModel, T5EncoderModel

from conditioning.embedding import TextEmbedding
from conditioning.prompt import PromptTexts, prepare

# In the order in which the states are handed on. Limits in tokens, end token included.
_LIMITS = {"ul2": 512, "byt5": 100, "metaclip": 256}
_MODEL_TYPES = {"ul2": ("t5",), "byt5": ("t5",), "metaclip": ("clip", "clip_text_model")}
_CLIP_POSITIONS = 77
_CLIP_WELL_TRAINED = 20
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


class EncoderError(ValueError):
    """A text encoder that can't be loaded."""


class TruncatedPromptWarning(UserWarning):
    """A prompt was longer than an encoder can read; the rest was left out."""


@runtime_checkable
class TextEncoder(Protocol):
    """Text to states: real tokens first, then padding, no longer than the longest text of the batch.

    The states of a text do not depend on the others in the batch.
    """

    @property
    def width(self) -> int: ...

    def __call__(self, texts: list[str]) -> TextEmbedding: ...


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where one encoder lies: a local folder, or a repository of the hub and a folder in it."""

    name: str
    location: str
    subfolder: str = ""

    @property
    def is_local(self) -> bool:
        return Path(self.location).is_dir()

    @property
    def may_be_hub_id(self) -> bool:
        return _HUB_ID.fullmatch(self.location) is not None

    def __str__(self) -> str:
        return f"{self.location}/{self.subfolder}" if self.subfolder else self.location


class PretrainedEncoder(nn.Module):
    """A tokenizer and a T5 encoder or a CLIP text tower, frozen. A TextEncoder.

    Args:
        name: "ul2", "byt5" or "metaclip"; names the encoder in warnings.
        tokenizer: a Hugging Face tokenizer that pads on the right and gives attention masks.
        model: T5EncoderModel or CLIPTextModel.
        limit: the longest input in tokens; what is longer is cut with a TruncatedPromptWarning.
    """

    def __init__(self, name: str, tokenizer: Any, model: Any, limit: int) -> None:
        super().__init__()
        self.name = name
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)
        self.width = int(model.config.hidden_size)
        self.limit = limit

    @torch.no_grad()
    def forward(self, texts: list[str]) -> TextEmbedding:
        """Encode texts to ``hidden (b, l, d)`` and ``mask (b, l)``, l the longest text's tokens."""
        tokens = self._tokenize(texts, self.limit + 1)  # one more tells what is too long, at no great cost
        if tokens["input_ids"].shape[1] > self.limit:
            cut = int((tokens["attention_mask"].sum(1) > self.limit).sum())
            warnings.warn(
                f"{self.name} reads at most {self.limit} tokens: the end of {cut} of {len(texts)} prompts "
                "was left out; shorten the prompt",
                TruncatedPromptWarning,
                stacklevel=2,
            )
            tokens = self._tokenize(texts, self.limit)
        parameter = next(self.model.parameters())
        mask = tokens["attention_mask"].to(parameter.device)
        states = self.model(input_ids=tokens["input_ids"].to(parameter.device), attention_mask=mask)
        mask = mask.bool()
        return TextEmbedding(hidden=states.last_hidden_state.masked_fill(~mask[..., None], 0), mask=mask)

    def _tokenize(self, texts: list[str], length: int) -> Any:
        return self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")


def stretch_positions(table: Float[Tensor, "n d"], length: int) -> Float[Tensor, "length d"]:
    """Lengthen CLIP's position table, the first 20 rows untouched, the rest interpolated linearly.

    Captions are short, so the first rows are trained well and the last hardly at all: keeping the first
    ones keeps what the checkpoint knows (Long-CLIP, Zhang et al. 2024, section 3.1). Movie Gen fine-tunes
    its tower from 77 to 256 tokens and does not say where that starts from.

    Raises:
        ValueError: when length is less than the table's.
    """
    if length < len(table):
        raise ValueError(f"length: {length} is less than the {len(table)} positions there are")
    kept = min(_CLIP_WELL_TRAINED, len(table) - 1)
    rest = functional.interpolate(
        table[kept:].float().T[None], size=length - kept, mode="linear", align_corners=True
    )
    return torch.cat([table[:kept], rest[0].T.to(table.dtype)])


def _stretch(model: CLIPTextModel, length: int) -> None:
    """Give a text tower room for `length` tokens, in place."""
    embeddings = model.embeddings
    table = stretch_positions(embeddings.position_embedding.weight.data, length)
    embeddings.position_embedding = nn.Embedding.from_pretrained(table)
    embeddings.register_buffer(
        "position_ids", torch.arange(length, device=table.device)[None], persistent=False
    )
    model.config.max_position_embeddings = length


class PromptEncoder(nn.Module):
    """The three encoders of a prompt. Moves with ``.to(device, dtype)`` like every module.

    Args:
        ul2, byt5, metaclip: the encoders of the whole prompt, of the quoted text, of the whole prompt.
    """

    def __init__(self, *, ul2: TextEncoder, byt5: TextEncoder, metaclip: TextEncoder) -> None:
        super().__init__()
        self.ul2, self.byt5, self.metaclip = ul2, byt5, metaclip

    @classmethod
    def from_pretrained(
        cls, source: str | Path | Mapping[str, str | Path], *, dtype: torch.dtype = torch.float32
    ) -> "PromptEncoder":
        """Load the encoders.

        Args:
            source: a folder (or hub id) with ul2/, byt5/ and metaclip/ in it, or a mapping of these three
                names to a folder or hub id each, such as {"ul2": "google/ul2", "byt5": "google/byt5-large",
                "metaclip": "facebook/metaclip-h14-fullcc2.5b"}.
            dtype: of the weights and of the states.

        Raises:
            EncoderError: a folder that is missing, damaged or another model's; one line that names it.
        """
        return cls(**{one.name: _load(one, dtype) for one in _sources(source)})

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the states in the order (ul2, byt5, metaclip)."""
        return tuple(encoder.width for encoder in (self.ul2, self.byt5, self.metaclip))

    def forward(self, prompts: list[str], fps: Fraction) -> tuple[TextEmbedding, ...]:
        """Encode prompts at a frame rate; an empty prompt is the null prompt.

        Returns:
            States in the order (ul2, byt5, metaclip), each ``(b, l, d)`` with its own l and d.

        Raises:
            PromptError: a prompt that is not valid text, or a frame rate that is not positive.
            ValueError: no prompts at all.
        """
        if not prompts:
            raise ValueError("prompts: at least one is needed; the null prompt is an empty string")
        return self._encode([prepare(prompt, fps) for prompt in prompts])

    def null(self) -> tuple[TextEmbedding, ...]:
        """The states of the null prompt, a batch of one: what guidance steers away from."""
        return self._encode([PromptTexts(ul2="", byt5="", metaclip="")])

    def _encode(self, texts: list[PromptTexts]) -> tuple[TextEmbedding, ...]:
        return (
            self.ul2([text.ul2 for text in texts]),
            self.byt5([text.byt5 for text in texts]),
            self.metaclip([text.metaclip for text in texts]),
        )


def _sources(source: str | Path | Mapping[str, str | Path]) -> list[_Source]:
    if isinstance(source, Mapping):
        if set(source) != set(_LIMITS):
            raise EncoderError(
                f"text encoders: the names must be {', '.join(_LIMITS)}, not {', '.join(source) or 'none'}"
            )
        return [_Source(name=name, location=str(source[name])) for name in _LIMITS]
    if Path(source).is_dir():
        return [_Source(name=name, location=str(Path(source) / name)) for name in _LIMITS]
    return [_Source(name=name, location=str(source), subfolder=name) for name in _LIMITS]


def _load(source: _Source, dtype: torch.dtype) -> PretrainedEncoder:
    if not (source.is_local or source.may_be_hub_id):
        raise EncoderError(
            f"{source}: no such folder; a release has its {source.name} encoder there, give its text/ folder"
        )
    try:
        with quiet():
            return _load_unchecked(source, dtype)
    except EncoderError:
        raise
    # What a damaged file raises depends on where the damage is: JSON, safetensors, sizes, tokenizer.
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        remedy = "copy the folder again" if source.is_local else "give a folder, or check id and network"
        message = f"{source}: the {source.name} encoder can't be loaded; {remedy} ({reason})"
        raise EncoderError(message) from error


def _load_unchecked(source: _Source, dtype: torch.dtype) -> PretrainedEncoder:
    where = {"subfolder": source.subfolder, "local_files_only": source.is_local}
    config, _ = transformers.PretrainedConfig.get_config_dict(source.location, **where)
    if not config:
        raise EncoderError(f"{source}: has no config.json; copy the folder again")
    wanted = _MODEL_TYPES[source.name]
    if config.get("model_type") not in wanted:
        raise EncoderError(
            f"{source}: holds a {config.get('model_type')!r} model, {source.name} needs one of type "
            f"{' or '.join(map(repr, wanted))}; give another folder"
        )
    model_class = CLIPTextModel if source.name == "metaclip" else T5EncoderModel
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, **where}
    loaded: Any = model_class.from_pretrained(source.location, **options)
    model, info = loaded
    if info["missing_keys"]:
        raise EncoderError(f"{source}: the weights lack {min(info['missing_keys'])}; copy the folder again")
    tokenizer = AutoTokenizer.from_pretrained(source.location, padding_side="right", **where)
    _check_tokenizer(source, tokenizer, model.get_input_embeddings().num_embeddings)
    return PretrainedEncoder(source.name, tokenizer, model, _limit(source.name, tokenizer, model))


def _check_tokenizer(source: _Source, tokenizer: Any, rows: int) -> None:
    """Hugging Face makes up an empty tokenizer where the files are missing, and says nothing."""
    if tokenizer.unk_token_id in tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise EncoderError(f"{source}: the tokenizer's files are missing or empty; copy the folder again")
    if isinstance(tokenizer, ByT5Tokenizer) != (source.name == "byt5"):
        raise EncoderError(f"{source}: holds {type(tokenizer).__name__}, not what {source.name} needs; "
                           "ByT5 reads bytes, the others pieces of words: give another folder")  # fmt: skip
    if len(tokenizer) > rows:
        raise EncoderError(f"{source}: the tokenizer has {len(tokenizer)} tokens, the weights {rows}; "
                           "they belong to two models, copy the folder again")  # fmt: skip


def _limit(name: str, tokenizer: Any, model: Any) -> int:
    """The longest input: the paper's, or the shorter one that a small checkpoint was trained for."""
    if name != "metaclip":
        return min(_LIMITS[name], tokenizer.model_max_length)
    positions = model.config.max_position_embeddings
    if positions == _CLIP_POSITIONS:  # CLIP's own; a table of any other length was trained as it is
        _stretch(model, _LIMITS[name])
        return _LIMITS[name]
    return min(_LIMITS[name], positions)


@contextmanager
def quiet() -> Iterator[None]:
    """Hugging Face without reports and bars: decoders are left out on purpose, and errors are raised."""
    log = transformers.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()
