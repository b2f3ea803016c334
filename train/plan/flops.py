"""FLOPs of one clip: closed formulas for the transformers, torch's own counter for the autoencoder.

A multiply and an add are two; only matrix products and convolutions count, as in torch's FlopCounterMode,
which the tests compare with. A product whose two factors both need a gradient costs its forward twice more
in the backward pass, once for each factor; one whose input is data costs it once.

Letters of the formulas: L video tokens, T text tokens, d width, f feed-forward width, p values of a patch,
e width of an encoder's states, N blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch.utils.flop_counter import FlopCounterMode

from kinoflow.dit_video.flow.known import MASKS
from kinoflow.dit_video.mmdit import MMDiTConfig
from kinoflow.dit_video.video_dit import DiTConfig
from kinoflow.tae.model.config import TAEConfig
from kinoflow.tae.model.tae import TAE

SINUSOIDS = 256  # of the flow time


@dataclass(frozen=True, kw_only=True)
class Flops:
    """One part of a model, one clip. `recomputed` is what per-block checkpointing runs a second time."""

    forward: float
    backward: float
    recomputed: float = 0.0
    attention: float = 0.0
    """The share of `forward` that is attention: softmax(q kᵀ) v without the projections."""

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            forward=self.forward + other.forward,
            backward=self.backward + other.backward,
            recomputed=self.recomputed + other.recomputed,
            attention=self.attention + other.attention,
        )

    def times(self, count: float) -> "Flops":
        return Flops(
            forward=count * self.forward,
            backward=count * self.backward,
            recomputed=count * self.recomputed,
            attention=count * self.attention,
        )

    @property
    def model(self) -> float:
        """Forward and backward: what MFU counts (PaLM, Chowdhery et al. 2022, appendix B)."""
        return self.forward + self.backward

    @property
    def fused_attention(self) -> float:
        """What a fused kernel adds: q kᵀ once more (FlashAttention, Dao et al. 2022, section 3.1)."""
        return self.attention / 2


def total(parts: dict[str, Flops]) -> Flops:
    """The sum of the parts."""
    return sum(parts.values(), Flops(forward=0.0, backward=0.0))


def dit_flops(config: DiTConfig, tokens: int, text_tokens: Sequence[int]) -> dict[str, Flops]:
    """FLOPs of one clip of `tokens` video tokens by part of VideoDiT (Movie Gen, section 3.1.3).

    `text_tokens` are those of each encoder with their padding, none for labels. Named as in `plan.parts` of
    the parameters.
    """
    d, n, length, text = config.width, config.depth, tokens, sum(text_tokens)
    patch = config.latent_channels * prod(config.patch_size)
    known = _first(2 * length * (patch + MASKS * prod(config.patch_size)) * d)
    projections = sum(2 * t * width * d for t, width in zip(text_tokens, config.text_widths, strict=True))
    answers = 2 * text * d * 2 * d  # keys and values of the text
    cross = {
        "blocks.cross_attention": _block(2 * length * 2 * d * d + answers, attention=4 * length * text * d)
    }
    blocks = {
        "blocks.attention": _block(2 * length * 4 * d * d, attention=4 * length * length * d),
        **(cross if config.text_widths else {}),
        "blocks.ffn": _block(2 * length * 3 * d * config.ffn),
    }
    return {
        "embed": _first(2 * length * patch * d),
        **({"known": known} if config.known else {}),
        "time": _first(2 * SINUSOIDS * d) + _both(2 * d * d),
        "modulation": _both(2 * d * 6 * d),
        "text": _first(projections),
        **{name: flops.times(n) for name, flops in blocks.items()},
        "head_modulation": _both(2 * d * 2 * d),
        "head": _both(2 * length * d * patch),
    }


def mmdit_flops(config: MMDiTConfig, tokens: int, text_tokens: Sequence[int]) -> dict[str, Flops]:
    """FLOPs of one picture of `tokens` image tokens by part of MMDiT (Esser et al. 2024, figure 2).

    `text_tokens` are those of each text with their padding. The last block's gives keys and values alone.
    """
    d, n, length, text = config.width, config.depth, tokens, sum(text_tokens)
    second = len(config.dual_attention_layers)
    patch = config.latent_channels * config.patch**2
    matrices = 2 * d * d  # FLOPs of a token in one of d x d
    projections = sum(2 * t * width * d for t, width in zip(text_tokens, config.text_widths, strict=True))
    joint = 4 * d * (length + text)  # softmax(q kᵀ) v of one query
    pooled = _first(2 * config.pooled_width * d) + _both(matrices) if config.pooled_width else _first(0)
    return {
        "embed": _first(2 * length * patch * d),
        "time": _first(2 * SINUSOIDS * d) + _both(matrices),
        "pooled": pooled,
        "text": _first(projections),
        "blocks.image": _block((6 + 12 * length) * matrices).times(n) + _block(3 * matrices).times(second),
        "blocks.text": _block((6 + 12 * text) * matrices).times(n - 1) + _block((2 + 2 * text) * matrices),
        "blocks.joint_attention": _block(0, attention=joint * (length + text)).times(n - 1)
        + _block(0, attention=joint * length),
        "blocks.own_attention": _block(4 * length * matrices, attention=4 * d * length**2).times(second),
        "head_modulation": _both(2 * matrices),
        "head": _both(2 * length * d * patch),
    }


def _first(forward: float) -> Flops:
    """A product with data: the gradient of its weight alone."""
    return Flops(forward=forward, backward=forward)


def _both(forward: float) -> Flops:
    return Flops(forward=forward, backward=2 * forward)


def _block(projections: float, attention: float = 0.0) -> Flops:
    """Inside a block: checkpointing runs its forward once more (Chen et al. 2016, section 4)."""
    forward = projections + attention
    return Flops(forward=forward, backward=2 * forward, recomputed=forward, attention=attention)


@cache
def tae_flops(config: TAEConfig, frames: int, height: int, width: int) -> dict[str, Flops]:
    """FLOPs of one clip through encoder and decoder, counted on the meta device.

    Raises:
        ValueError: a side that is not a multiple of the spatial factor.
    """
    with torch.device("meta"):
        model = TAE(config)
        video = torch.empty(1, 3, frames, height, width)
    with FlopCounterMode(display=False) as encoding:
        latent = model.encode(video).mean
    with FlopCounterMode(display=False) as decoding:
        output = model.decode(latent.detach().requires_grad_(), frames)
    with FlopCounterMode(display=False) as decoder_backward:
        output.sum().backward()
    with FlopCounterMode(display=False) as encoder_backward:
        latent.sum().backward()
    counts = {"encoder": (encoding, encoder_backward), "decoder": (decoding, decoder_backward)}
    return {
        name: Flops(forward=forward.get_total_flops(), backward=backward.get_total_flops())
        for name, (forward, backward) in counts.items()
    }
