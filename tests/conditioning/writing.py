"""Tiny checkpoints of the real classes, written as the hub has them."""

import io
import json
import shutil
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    ByT5Tokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from kinoflow.conditioning.encoders import quiet

WORDS = ("a", "red", "star", "blue", "ring", "spins")


def t5_config(vocabulary: int, width: int = 24, **more) -> T5Config:
    return T5Config(vocab_size=vocabulary, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=3,
                    decoder_start_token_id=0, **more)  # fmt: skip


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -5.0) for word in WORDS]
    pieces += [(letter, -9.0) for letter in string.printable[:94]]
    return T5Tokenizer(vocab=pieces, extra_ids=4)


def write_ul2(folder: Path, width: int = 24) -> None:
    tokenizer = t5_tokenizer()
    tokenizer.save_pretrained(folder)
    whole = T5ForConditionalGeneration(t5_config(len(tokenizer) + 8, width))  # decoder and all, as google/ul2
    whole.save_pretrained(folder)


def write_byt5(folder: Path, width: int = 24) -> None:
    ByT5Tokenizer().save_pretrained(folder)
    T5EncoderModel(t5_config(384, width)).save_pretrained(folder)


def clip_tokenizer(**more: object) -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, **more)


def write_metaclip(folder: Path, width: int = 16) -> None:
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(folder)
    tokens = len(tokenizer)
    small = {"hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {
        "bos_token_id": tokens - 2,
        "eos_token_id": tokens - 1,
        "pad_token_id": tokens - 1,
    }
    text = {**small, **special, "vocab_size": tokens}
    vision = {**small, "image_size": 8, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder)  # both towers


def write_clip(folder: Path, words: Sequence[str]) -> Path:
    """Both towers of a CLIP with a processor, of these words and pictures of 16x16."""
    known = ["<pad>", "<unk>", "</s>", *words]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **names)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = size | {"vocab_size": len(known), "max_position_embeddings": 6, "eos_token_id": 2}
    seen = size | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=seen, projection_dim=8)).save_pretrained(folder)
    shown = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(shown, tokenizer).save_pretrained(folder)
    return folder


def sentencepiece_model() -> bytes:
    """A spiece.model with T5's special pieces, trained on a few sentences."""
    import sentencepiece

    text = [f"{word} {other} {string.printable[:94]}" for word in WORDS for other in WORDS]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=written, vocab_size=140, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


def write_big_ul2(folder: Path, weights: str = "safetensors") -> None:
    """As google/ul2: gated, untied, spiece.model and no tokenizer.json, weights in many shards.

    `weights` "bin" writes pickled shards, which is all that old repositories have.
    """
    model = T5ForConditionalGeneration(
        t5_config(300, feed_forward_proj="gated-silu", tie_word_embeddings=False)
    )
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "spiece.model").write_bytes(sentencepiece_model())
    about = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "eos_token": "</s>", "pad_token": "<pad>",
             "unk_token": "<unk>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    if weights == "bin":
        to_bin(folder)


def write_encoders(root: Path, ul2: Callable[[Path], None] = write_ul2) -> Path:
    """All three of a release's text folder, from one seed; the folder."""
    torch.manual_seed(0)
    with quiet():
        ul2(root / "ul2")
        write_byt5(root / "byt5")
        write_metaclip(root / "metaclip")
    return root


def to_bin(folder: Path) -> None:
    """Rewrite safetensors as pickles, with their index where there is one."""
    index = folder / "model.safetensors.index.json"
    for path in folder.glob("*.safetensors"):
        torch.save(load_file(path), folder / _bin_name(path.name))
        path.unlink()
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {key: _bin_name(name) for key, name in content["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))
        index.unlink()


def _bin_name(name: str) -> str:
    return name.replace("model", "pytorch_model").replace(".safetensors", ".bin")


def to_hub_cache(folder: Path, hub: Path, name: str, commit: str) -> Path:
    """Put a checkpoint where the hub's client keeps what it has fetched; the snapshot."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(folder, repository / "snapshots" / commit))
