"""Bytes that one GPU holds while it trains: states under ZeRO, activations, buffers.

Letters of the formulas: P parameters, N ranks that share states (all GPUs: Ulysses' groups are among them),
L video tokens of a rank, T text tokens, d width, f feed-forward width, n heads. "low" is the size of a
weight, 2 bytes in bf16 and 4 in fp32; "high" is 4, also that of a gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from kinoflow.dit_video.video_dit import DiTConfig
from kinoflow.tae.model.config import TAEConfig
from kinoflow.tae.model.tae import TAE

Precision = Literal["fp32", "bf16", "fp16"]
Offload = Literal["none", "optimizer", "parameters"]

# What DeepSpeed takes where a run sets nothing, in elements (deepspeed.runtime.zero.config).
REDUCE_BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
PREFETCH_BUCKET = 50_000_000
PERSISTENCE_THRESHOLD = 100_000
SUB_GROUP = 1_000_000_000
HIGH = 4
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How the states of one module are spread over `ranks` (train.config.DeepSpeedConfig)."""

    zero_stage: int
    precision: Precision
    offload: Offload
    ranks: int

    @property
    def low(self) -> int:
        """Bytes of a weight under ZeRO; without it bf16 is cast from fp32 where it is computed with."""
        return 4 if self.precision == "fp32" else 2


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes that stay over a step; `step` the optimizer needs beside them, when no activation lives."""

    parameters: float
    gradients: float
    optimizer: float
    ema: float
    communication: float
    step: float
    host: float


def zero_states(sizes: Sequence[int], sharding: Sharding) -> States:
    """States of parameters with `sizes` elements each, in the optimizer's order.

    After ZeRO (Rajbhandari et al. 2019, section 3 and figure 1), with what DeepSpeed adds.

    Beside fp32 or bf16 weights DeepSpeed keeps fp32 masters in every stage but 0, where the weights are
    their own masters; AdamW keeps two fp32 moments, the average one fp32 copy. Gradients are summed and
    sent in fp32 (train.run.spread). ZeRO 1 holds all of them until the backward pass ends, ZeRO 2 its share,
    and so does ZeRO 1 beside bf16 weights; ZeRO 3 also gathers weights while they are used and keeps those of
    fewer than 100,000 elements whole.
    """
    count, low = sum(sizes), sharding.low
    if sharding.zero_stage == 0:
        step = HIGH * min(count, REDUCE_BUCKET) if sharding.ranks > 1 else 0
        return States(parameters=HIGH * count, gradients=HIGH * count, optimizer=2 * HIGH * count,
                      ema=HIGH * count, communication=0, step=step, host=0)  # fmt: skip
    share = (
        sum(-(-size // sharding.ranks) for size in sizes)
        if sharding.zero_stage == 3
        else count / sharding.ranks
    )
    optimizer, ema = 3 * HIGH * share, HIGH * share  # masters and moments; the average of the masters
    parameters, gradients, step = low * count, *_gradients(tuple(sizes), share, sharding)
    communication = 2 * HIGH * REDUCE_BUCKET  # two, for one is reduced while the other fills
    if sharding.zero_stage == 3:
        persistent = sum(size for size in sizes if size < PERSISTENCE_THRESHOLD)
        parameters = low * (share + persistent)
        communication = HIGH * REDUCE_BUCKET + low * min(count, MAX_LIVE_PARAMETERS + PREFETCH_BUCKET)
    host = 0.0
    if sharding.offload != "none":
        host, optimizer, ema, step = optimizer + ema + HIGH * share, 0.0, 0.0, 0.0
        if sharding.zero_stage == 3 or (sharding.zero_stage == 2 and sharding.precision == "fp32"):
            host, gradients = host + gradients, 0.0
    if sharding.offload == "parameters":
        host, parameters = host + low * share, parameters - low * share
    return States(parameters=parameters, gradients=gradients, optimizer=optimizer, ema=ema,
                  communication=communication, step=step, host=host)  # fmt: skip


def _gradients(sizes: tuple[int, ...], share: float, sharding: Sharding) -> tuple[float, float]:
    """Bytes of gradients that stay until the step, and of their copy for the optimizer, by stage."""
    if sharding.zero_stage == 3:
        return HIGH * share, HIGH * min(share, SUB_GROUP)
    if sharding.precision != "fp32":
        return HIGH * share, 0.0  # the share lies as the optimizer takes it
    whole = sum(sizes) if sharding.zero_stage == 1 else _touched(sizes, sharding.ranks)
    return HIGH * whole, HIGH * share


@cache
def _touched(sizes: tuple[int, ...], ranks: int) -> int:
    """The most elements that a rank keeps gradients of under ZeRO 2 in fp32.

    A gradient that the border between two shares cuts stays whole on both.
    """
    ends = np.cumsum(sizes)
    borders = np.linspace(0, ends[-1], ranks + 1)
    first = np.searchsorted(ends, borders[:-1], side="right")
    last = np.searchsorted(ends, borders[1:], side="left")
    return int((ends[last] - ends[first] + np.asarray(sizes)[first]).max())


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What a rank works on at once: `clips` of `tokens` video tokens, shared with its sequence's other ranks.

    `text_tokens` are those of each encoder, with their padding.
    """

    tokens: int
    text_tokens: tuple[int, ...]
    clips: int
    precision: Precision
    sequence: int
    checkpoint_every: int

    @property
    def length(self) -> int:
        """Video tokens of this rank in the blocks; around them every rank has all."""
        return self.clips * -(-self.tokens // self.sequence)

    def checkpointed(self, depth: int) -> int:
        """Of `depth` blocks those that keep their input alone."""
        return -(-depth // self.checkpoint_every) if self.checkpoint_every else 0

    @property
    def low(self) -> int:
        """Bytes of an activation."""
        return 4 if self.precision == "fp32" else 2


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that the forward pass keeps for the backward pass, and what that needs beside them."""

    saved: float
    workspace: float


def dit_activations(config: DiTConfig, piece: Slice) -> Activations:
    """Activations of VideoDiT, counted tensor by tensor as by Korthikanti et al. 2022 (section 4.1).

    They are those of `dit_video.layers` with a kernel that keeps no scores. Checkpointing keeps the input of
    each block and, while its backward pass runs, the activations of that block.
    """
    block = piece.length * _block_bytes(config, piece) + piece.clips * _text_bytes(config, piece)
    boundary = piece.low * piece.length * config.width
    again = piece.checkpointed(config.depth)
    kept = again * boundary + (config.depth - again) * block
    # The widest moment is where the feed-forward network begins to go back: the gradients of the residual
    # stream, of what the network gave and of its product; what it saved is freed as it is used.
    gradients = piece.low * piece.length * (2 * config.width + config.ffn)
    return Activations(
        saved=kept + _outside_bytes(config, piece),
        workspace=gradients + (block if again else 0),
    )


def _block_bytes(config: DiTConfig, piece: Slice) -> float:
    """Bytes a token of one block: every tensor that autograd saves, in the order of the forward pass."""
    d, f, norms = config.width, config.ffn, 2 if config.qk_norm else 0
    widths = {
        "normalized, modulated": 2 * d,
        "queries, keys, values": 3 * d,
        "normalized queries and keys, with gain": 2 * norms * d,
        "attended, projected": 2 * d,
        "feed-forward: normalized, modulated": 2 * d,
        "feed-forward: gate and up, activated, product": 4 * f,
        "feed-forward: projected": d,
    }
    attentions = 1
    if config.text_widths:
        attentions = 2
        widths |= {
            "cross: normalized, with gain": 2 * d,
            "cross: queries": d * (norms or 1),
            "cross: attended": d,
        }
    if piece.sequence > 1:  # the exchange hands on copies, and what it was given need not be kept
        widths["exchanged"] = -d if config.qk_norm else d
    statistics = attentions * config.heads * HIGH  # log-sum-exp of each attention
    return piece.low * sum(widths.values()) + statistics


def _text_bytes(config: DiTConfig, piece: Slice) -> float:
    """Bytes of the text's keys and values in one block, one clip."""
    return piece.low * sum(piece.text_tokens) * config.width * (4 if config.qk_norm else 2)


def _outside_bytes(config: DiTConfig, piece: Slice) -> float:
    """Bytes around the blocks: patches in and out, positions, head, text."""
    d, patch, text = config.width, config.latent_channels * prod(config.patch_size), sum(piece.text_tokens)
    whole = piece.clips * piece.tokens
    head = whole * 2 * d  # normalized, modulated
    compared = HIGH * whole * 2 * patch  # prediction and target, as the loss takes them
    positions = piece.length / piece.clips * d if piece.checkpoint_every else 0  # an input of every block
    states = sum(
        tokens * (width + d) for tokens, width in zip(piece.text_tokens, config.text_widths, strict=True)
    )
    values = whole * patch + positions + head + piece.clips * (states + text * d)
    return piece.low * values + compared


@cache
def tae_activations(config: TAEConfig, size: tuple[int, int, int], precision: Precision) -> float:
    """Saved bytes of a clip of `size` frames, rows and columns: a forward pass on tensors without storage."""
    with torch.device("meta"):
        model = TAE(config)
    low = precision != "fp32"
    dtype = torch.bfloat16 if low else torch.float32  # fp16 takes as much
    held: dict[int, torch.UntypedStorage] = {}

    def hold(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage._cdata] = storage
        return tensor

    with FakeTensorMode():
        weights = {
            name: torch.empty(p.shape, dtype=dtype, requires_grad=True)
            for name, p in model.named_parameters()
        }
        video = torch.empty(1, 3, *size)
        hooks = torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            torch.func.functional_call(model, weights, (video,))
    own = {weight.untyped_storage()._cdata for weight in weights.values()}
    return sum(storage.nbytes() for key, storage in held.items() if key not in own)
