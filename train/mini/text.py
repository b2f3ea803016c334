"""Trains the small text encoders of the mini release: UL2, ByT5 and MetaCLIP, each by its own objective.

UL2 denoises captions (Tay et al. 2022) and describes the scene in canonical words; ByT5 denoises and spells
written words; MetaCLIP tells which caption belongs to which clip (Radford et al. 2021). UL2's and MetaCLIP's
states also answer linear questions about the scene. What is kept are checkpoints as the large ones have
them: T5EncoderModel, T5EncoderModel, CLIPTextModel.
"""

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from kinoflow.conditioning.encoders import quiet
from kinoflow.configs.files import replacing_folder, write_json
from kinoflow.data.world import render
from kinoflow.train.mini.config import EncoderConfig, TextTrainConfig
from kinoflow.train.mini.corpus import (
    ATTRIBUTES,
    Corruption,
    attributes,
    corrupt,
    quoted,
    sample,
    spell,
)
from kinoflow.train.mini.probe import AttributeHeads, measure
from kinoflow.train.mini.tokenizers import END, PAD, SENTINELS, byte_pair_tokenizer, word_tokenizer
from kinoflow.train.run.config import RunConfig

_CORPUS = 20000
_IGNORED = -100
_WARMUP = 50
_DENOISED = 0.5
_THUMBNAIL = (6, 24, 24)
_THUMBNAIL_FPS = Fraction(4)
_EMBEDDING = 64


def main(config: RunConfig) -> int:
    """Train the encoders of `config.text` into RUN/text and print the figures; 0 on success."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    figures = train(config.text, seed=config.seed, run=Path(config.run))
    print(json.dumps(figures, indent=2))
    return 0


def train(config: TextTrainConfig, *, seed: int, run: Path) -> dict[str, Any]:
    """Write RUN/text/{ul2,byt5,metaclip} and RUN/text/figures.json, whole or not at all.

    The same seed gives the same files on the same machine. Returns the figures.
    """
    seconds: dict[str, float] = {}
    parts = {"ul2": _train_ul2, "byt5": _train_byt5, "metaclip": _train_metaclip}
    with replacing_folder(run / "text") as aside:
        for name, part in parts.items():
            began = time.perf_counter()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                part(config, seed, aside / name)
            seconds[name] = round(time.perf_counter() - began, 1)
        figures = measure(aside, config.probes)
        figures |= {"train_seconds": seconds, "config": asdict(config), "seed": seed}
        write_json(aside / "figures.json", figures)
    return figures


def _train_ul2(config: TextTrainConfig, seed: int, folder: Path) -> None:
    samples = [sample(index) for index in range(_CORPUS)]
    texts = [each.prompt for each in samples]
    texts += [re.sub(r"sign \w+", "sign", each.description) for each in samples]
    tokenizer = word_tokenizer(texts, config.ul2.max_tokens)
    sentinels = _sentinels(tokenizer)

    def batch(step: int) -> list[Corruption]:
        """Some prompts are denoised, most described; complete captions are more often seen."""
        random = Random(f"ul2/{seed}/{step}")
        first = step * config.ul2.batch_size
        drawn = [sample(first + i, complete=random.random() < 0.7) for i in range(config.ul2.batch_size)]
        sources = tokenizer([each.prompt for each in drawn])["input_ids"]
        aims = tokenizer([each.description for each in drawn])["input_ids"]
        return [
            corrupt(source, sentinels, random)
            if random.random() < _DENOISED
            else Corruption(inputs=source, targets=aim, attributes=attributes(each.scene))
            for each, source, aim in zip(drawn, sources, aims, strict=True)
        ]

    shape = _t5_config(config.ul2, vocab_size=len(tokenizer), feed_forward_proj="gated-silu")
    _save(_train_t5(config.ul2, shape, batch, folder.name), tokenizer, folder)


def _train_byt5(config: TextTrainConfig, seed: int, folder: Path) -> None:
    tokenizer = ByT5Tokenizer(model_max_length=config.byt5.max_tokens)
    sentinels = _sentinels(tokenizer)
    digits = tokenizer("123456789", add_special_tokens=False)["input_ids"]

    def batch(step: int) -> list[Corruption]:
        random = Random(f"byt5/{seed}/{step}")
        first = step * config.byt5.batch_size
        texts = [quoted(first + index) for index in range(config.byt5.batch_size)]
        return [
            spell(ids, digits, random) if random.random() < 0.7 else corrupt(ids, sentinels, random)
            for ids in tokenizer(texts)["input_ids"]
        ]

    # 384 rows as in the published checkpoints: three special tokens, 256 bytes, 125 sentinels.
    shape = _t5_config(config.byt5, vocab_size=384, feed_forward_proj="gated-gelu")
    _save(_train_t5(config.byt5, shape, batch, folder.name), tokenizer, folder)


def _sentinels(tokenizer: Any) -> list[int]:
    return tokenizer.convert_tokens_to_ids(SENTINELS)


def _t5_config(config: EncoderConfig, **options: Any) -> T5Config:
    options |= {"dropout_rate": 0.0, "tie_word_embeddings": False, "decoder_start_token_id": PAD}
    return T5Config(
        d_model=config.width,
        d_kv=config.width // config.heads,
        d_ff=config.feed_forward,
        num_layers=config.layers,
        num_decoder_layers=1,
        num_heads=config.heads,
        pad_token_id=PAD,
        eos_token_id=END,
        **options,
    )


def _train_t5(
    config: EncoderConfig, shape: T5Config, batch: Callable[[int], list[Corruption]], name: str
) -> T5EncoderModel:
    """Train a T5 on the corruptions; what it returns is the encoder alone."""
    model = T5ForConditionalGeneration(shape)
    # Hugging Face starts an untied head at 1, hundreds of steps away from anything useful.
    nn.init.normal_(model.lm_head.weight, std=config.width**-0.5)

    heads = AttributeHeads(config.width, [len(values) for values in ATTRIBUTES])

    def loss(step: int) -> Float[Tensor, ""]:
        drawn = batch(step)
        inputs = _pad([each.inputs for each in drawn], PAD)
        mask = torch.arange(inputs.shape[1]) < torch.tensor([[len(each.inputs)] for each in drawn])
        targets = _pad([each.targets for each in drawn], _IGNORED)
        output = model(input_ids=inputs, attention_mask=mask, labels=targets)
        whole = torch.tensor([bool(each.attributes) for each in drawn])
        if not whole.any():
            return output.loss
        truth = torch.tensor([each.attributes for each in drawn if each.attributes])
        return output.loss + heads(output.encoder_last_hidden_state[whole], mask[whole], truth)

    _optimize(name, nn.ModuleList([model, heads]), config, loss)
    encoder = T5EncoderModel(shape)
    state = model.state_dict()
    encoder.load_state_dict({key: state[key] for key in encoder.state_dict()})
    return encoder


def _train_metaclip(config: TextTrainConfig, seed: int, folder: Path) -> None:
    """Contrast captions with thumbnails of clips: 6 frames of 24x24 at 4 frames a second.

    The loss of the lecture notes' figure 4, on the right (Radford et al. 2021).
    """
    shape = config.metaclip
    texts = (sample(index).prompt for index in range(_CORPUS))
    tokenizer = byte_pair_tokenizer(texts, config.merges, shape.max_tokens)
    tower = CLIPTextModelWithProjection(_clip_config(shape, tokenizer))
    watcher = _watcher()
    heads = AttributeHeads(shape.width, [len(values) for values in ATTRIBUTES])
    scale = nn.Parameter(torch.tensor(math.log(10.0)))
    model = nn.ModuleList([tower, watcher, heads, nn.ParameterList([scale])])
    clips = _thumbnails(config.clips)

    def loss(step: int) -> Float[Tensor, ""]:
        chosen = Random(f"metaclip/{seed}/{step}").sample(range(config.clips), shape.batch_size)
        drawn = [sample(index, wording=step) for index in chosen]
        texts = [each.prompt for each in drawn]
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        output = tower(**tokens)
        said = functional.normalize(output.text_embeds, dim=-1)
        video = torch.from_numpy(clips[chosen]).permute(0, 1, 4, 2, 3).flatten(1, 2).float()
        seen = functional.normalize(watcher(video / 127.5 - 1), dim=-1)
        logits = scale.clamp(max=math.log(50.0)).exp() * said @ seen.T
        pairs = torch.arange(len(chosen))
        matched = (functional.cross_entropy(logits, pairs) + functional.cross_entropy(logits.T, pairs)) / 2
        truth = torch.tensor([attributes(each.scene) for each in drawn])
        return matched + heads(output.last_hidden_state, tokens["attention_mask"].bool(), truth)

    _optimize(folder.name, model, shape, loss)
    _save(tower.text_model, tokenizer, folder)


def _watcher() -> nn.Module:
    """The tower that looks: thumbnails (b, frames * 3, height, width) to embeddings."""
    frames, height, width = _THUMBNAIL
    return nn.Sequential(
        nn.Conv2d(3 * frames, 48, 4, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(48, 96, 4, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(96 * height * width // 16, 256),
        nn.GELU(),
        nn.Linear(256, _EMBEDDING),
    )


def _clip_config(shape: EncoderConfig, tokenizer: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        projection_dim=_EMBEDDING,
        max_position_embeddings=shape.max_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _thumbnails(count: int) -> UInt8[np.ndarray, "n f h w 3"]:
    frames, height, width = _THUMBNAIL
    return np.stack(
        [
            render(sample(index).scene, frames=frames, height=height, width=width, fps=_THUMBNAIL_FPS)
            for index in range(count)
        ]
    )


def _pad(rows: Sequence[Sequence[int]], value: int) -> Int[Tensor, "b l"]:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def _optimize(name: str, model: nn.Module, config: EncoderConfig, loss: Callable[[int], Tensor]) -> None:
    """AdamW, a short warm-up, then the rate falls linearly to nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / _WARMUP, 1 - step / config.steps)
    )
    mean = 0.0
    for step in range(config.steps):
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean = value.item() if step == 0 else 0.98 * mean + 0.02 * value.item()
        if (step + 1) % 100 == 0 or step + 1 == config.steps:
            print(f"{name} {step + 1}/{config.steps} loss {mean:.4f}", flush=True)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    with quiet():
        model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner only
