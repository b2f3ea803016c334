"""UL2, ByT5 and MetaCLIP: Hugging Face checkpoints behind one Protocol.

Letters: b prompts, l tokens, d width of an encoder. The states are raw (the last hidden states): they
can be computed once and stored; the projections to the model width belong to the video transformer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, ByT5Tokenizer, CLIPTextModel, T5EncoderModel

from kinoflow.conditioning.checkpoints import LIMITS, Source
from kinoflow.conditioning.embedding import (
    Encoded,
    TextEmbedding,
    warn_of_cuts,
)
from kinoflow.conditioning.offload import stream
from kinoflow.configs.errors import UserError, one_line

_MODEL_TYPES = {"ul2": ("t5",), "byt5": ("t5",), "metaclip": ("clip", "clip_text_model")}
_CLIP_POSITIONS = 77
_CLIP_WELL_TRAINED = 20


class PretrainedEncoder(nn.Module):
    """A tokenizer and a T5 encoder or a CLIP text tower, frozen. A TextEncoder.

    Args:
        name: "ul2", "byt5" or "metaclip"; names the encoder in warnings.
        tokenizer: a Hugging Face tokenizer that pads on the right and gives attention masks.
        model: T5EncoderModel or CLIPTextModel.
        limit: the longest input in tokens; what is longer is cut with a TruncatedPromptWarning.
        offload: keep a T5's weights in main memory; each block visits the device when it runs.
    """

    def __init__(self, name: str, tokenizer: Any, model: Any, limit: int, *, offload: bool = False) -> None:
        super().__init__()
        self.name = name
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)
        self.width = int(model.config.hidden_size)
        self.limit = limit
        self.offload = offload
        # Says where .to() has moved this module, which an offloaded model's weights do not.
        self.register_buffer("anchor", torch.empty(0, dtype=model.dtype), persistent=False)
        self.anchor: Tensor
        if offload:
            stack = model.encoder
            stream([*stack.block, stack.embed_tokens, stack.final_layer_norm], lambda: self.anchor.device)

    def forward(self, texts: list[str]) -> TextEmbedding:
        """Encode texts to ``hidden (b, l, d)`` and ``mask (b, l)``, l the longest text's tokens."""
        encoded = self.encode(texts)
        warn_of_cuts(self.name, self.limit, encoded.cut)
        return encoded.states

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Encoded:
        """The states of ``forward``, and which texts were cut, without a warning."""
        tokens = self._tokenize(texts, self.limit + 1)  # one more tells what is too long, at no great cost
        cut = (tokens["attention_mask"].sum(1) > self.limit).tolist()
        if any(cut):
            tokens = self._tokenize(texts, self.limit)
        mask = tokens["attention_mask"].to(self.anchor.device)
        states = self.model(input_ids=tokens["input_ids"].to(self.anchor.device), attention_mask=mask)
        mask = mask.bool()
        hidden = states.last_hidden_state.masked_fill(~mask[..., None], 0)
        return Encoded(states=TextEmbedding(hidden=hidden, mask=mask), cut=tuple(cut))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PretrainedEncoder":
        """``.to`` and its kin. The weights of an offloaded model follow in dtype and stay in main memory."""
        if not self.offload:
            return super()._apply(fn, recurse)
        self.anchor = fn(self.anchor)
        self.model.to(self.anchor.dtype)
        return self

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


def load_encoder(
    source: Source, folder: Path, dtype: torch.dtype, *, offload: bool = False
) -> PretrainedEncoder:
    """Load an encoder from the folder where its source is, weights and states in `dtype`.

    Raises:
        UserError: files that are missing, damaged or another model's; one line that names the source.
    """
    try:
        with quiet():
            return _load_unchecked(source, folder, dtype, offload)
    except UserError:
        raise
    # What a damaged file raises depends on where the damage is: JSON, safetensors, sizes, tokenizer.
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        remedy = _remedy(source, folder)
        message = f"{source}: the {source.name} encoder can't be loaded; {remedy} ({one_line(error)})"
        raise UserError(message) from error


def _remedy(source: Source, folder: Path) -> str:
    return (
        "copy the folder again" if Path(source.location).is_dir() else f"delete {folder} and fetch it again"
    )


def _load_unchecked(source: Source, folder: Path, dtype: torch.dtype, offload: bool) -> PretrainedEncoder:
    again, where = _remedy(source, folder), {"local_files_only": True}
    config, _ = transformers.PretrainedConfig.get_config_dict(folder, **where)
    if not config:
        raise UserError(f"{source}: has no config.json; {again}")
    wanted = _MODEL_TYPES[source.name]
    if config.get("model_type") not in wanted:
        raise UserError(
            f"{source}: holds a {config.get('model_type')!r} model, {source.name} needs one of type "
            f"{' or '.join(map(repr, wanted))}; give another folder"
        )
    # The encoder half or the text tower; what else the checkpoint holds is left on the disk.
    model_class = CLIPTextModel if source.name == "metaclip" else T5EncoderModel
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, **where}
    loaded: Any = model_class.from_pretrained(folder, **options)
    model, info = loaded
    if info["missing_keys"]:
        raise UserError(f"{source}: the weights lack {min(info['missing_keys'])}; {again}")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right", **where)
    _check_tokenizer(source, tokenizer, model.get_input_embeddings().num_embeddings, again)
    limit = _limit(source.name, tokenizer, model)
    return PretrainedEncoder(source.name, tokenizer, model, limit, offload=offload)


def _check_tokenizer(source: Source, tokenizer: Any, rows: int, again: str) -> None:
    """Hugging Face makes up an empty tokenizer where the files are missing, and says nothing."""
    if tokenizer.unk_token_id in tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise UserError(f"{source}: the tokenizer's files are missing or empty; {again}")
    if isinstance(tokenizer, ByT5Tokenizer) != (source.name == "byt5"):
        raise UserError(f"{source}: holds {type(tokenizer).__name__}, not what {source.name} needs; "
                           "ByT5 reads bytes, the others pieces of words: give another folder")  # fmt: skip
    if len(tokenizer) > rows:
        raise UserError(f"{source}: the tokenizer has {len(tokenizer)} tokens, the weights {rows}; "
                           f"they belong to two models, {again}")  # fmt: skip


def _limit(name: str, tokenizer: Any, model: Any) -> int:
    """The longest input: the paper's, or the shorter one that a small checkpoint was trained for."""
    if name != "metaclip":
        return min(LIMITS[name], tokenizer.model_max_length)
    positions = model.config.max_position_embeddings
    if positions == _CLIP_POSITIONS:  # CLIP's own; a table of any other length was trained as it is
        _stretch(model, LIMITS[name])
        return LIMITS[name]
    return min(LIMITS[name], positions)


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
