"""Plain twins of fast paths: the formulas as the paper writes them, one line an operation."""

import torch
from torch import Tensor

from kinoflow.dit_video.attention.kernels import math_attention
from kinoflow.dit_video.layers import Block


def rms_norm(x: Tensor, gain: Tensor | None = None) -> Tensor:
    normalized = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    return normalized if gain is None else normalized * gain


def swiglu(x: Tensor, gate_up: Tensor, out: Tensor) -> Tensor:
    gate, up = (x @ weight.T for weight in gate_up.chunk(2))
    return (gate * torch.sigmoid(gate) * up) @ out.T


def heads(x: Tensor, number: int) -> Tensor:
    return x.reshape(*x.shape[:2], number, -1).permute(0, 2, 1, 3)


def attend(q: Tensor, k: Tensor, v: Tensor, layer, mask: Tensor | None = None) -> Tensor:
    """Attention of "b l d" each, with the norms of queries and keys over each head."""
    q = rms_norm(heads(q, layer.heads), layer.norm.query.weight)
    k = rms_norm(heads(k, layer.heads), layer.norm.key.weight)
    attended = math_attention(q, k, heads(v, layer.heads), mask)
    return attended.permute(0, 2, 1, 3).reshape(attended.shape[0], attended.shape[2], -1)


def block(
    layer: Block, x: Tensor, positions: Tensor, modulation: Tensor, *, states: Tensor, mask: Tensor
) -> Tensor:
    """A block from its weights: positions, modulated self-attention, cross-attention, modulated SwiGLU."""
    own, cross = layer.attention, layer.cross_attention
    m = (modulation + layer.modulation_bias)[:, :, None]
    x = x + positions
    h = rms_norm(x) * (1 + m[:, 1]) + m[:, 0]
    q, k, v = (h @ weight.T for weight in own.qkv.weight.chunk(3))
    x = x + m[:, 2] * (attend(q, k, v, own) @ own.out.weight.T)
    q = rms_norm(x, layer.cross_norm.weight) @ cross.query.weight.T
    k, v = (states @ weight.T for weight in cross.key_value.weight.chunk(2))
    x = x + attend(q, k, v, cross, mask) @ cross.out.weight.T
    h = rms_norm(x) * (1 + m[:, 4]) + m[:, 3]
    return x + m[:, 5] * swiglu(h, layer.ffn.gate_up.weight, layer.ffn.out.weight)
