"""Layers of the backbone (Movie Gen, section 3.1.3): a LLaMa3 block with cross-attention and adaptive norms.

Letters: b batch, l sequence, n heads, d model width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dit_video.attention import Kernel


class Modulation(NamedTuple):
    """Shift, scale and gate of the two modulated branches of a block, each "b 1 d"."""

    attention_shift: Tensor
    attention_scale: Tensor
    attention_gate: Tensor
    ffn_shift: Tensor
    ffn_scale: Tensor
    ffn_gate: Tensor


class KeysValues(NamedTuple):
    """Keys and values of one cross-attention, each "b n l h"."""

    keys: Tensor
    values: Tensor


class RMSNorm(nn.Module):
    """x / rms(x), with a learned gain unless an adaptive scale follows."""

    def __init__(self, width: int, gain: bool = True) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(width)) if gain else None

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return F.rms_norm(x, (self.width,), self.weight, eps=1e-6)


class SwiGLU(nn.Module):
    """W_out(silu(W_gate x) · W_up x), gate and up in one matrix."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class HeadNorm(nn.Module):
    """RMS norm of queries and keys over each head, or nothing."""

    def __init__(self, head_width: int, enabled: bool) -> None:
        super().__init__()
        self.query = RMSNorm(head_width) if enabled else nn.Identity()
        self.key = RMSNorm(head_width) if enabled else nn.Identity()


class SelfAttention(nn.Module):
    """Full bidirectional attention over all tokens of the clip."""

    def __init__(self, width: int, heads: int, qk_norm: bool, kernel: Kernel) -> None:
        super().__init__()
        self.heads = heads
        self.kernel = kernel
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm = HeadNorm(width // heads, qk_norm)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        q, k, v = rearrange(self.qkv(x), "b l (three n d) -> three b n l d", three=3, n=self.heads)
        attended = self.kernel(self.norm.query(q), self.norm.key(k), v, None)
        return self.out(rearrange(attended, "b n l d -> b l (n d)"))


class CrossAttention(nn.Module):
    """Video tokens ask, text tokens answer. Keys and values may be computed once and kept over all steps."""

    def __init__(self, width: int, heads: int, qk_norm: bool, kernel: Kernel) -> None:
        super().__init__()
        self.heads = heads
        self.kernel = kernel
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.norm = HeadNorm(width // heads, qk_norm)
        self.out = nn.Linear(width, width, bias=False)

    def keys_values(self, text: Float[Tensor, "b l d"]) -> KeysValues:
        k, v = rearrange(self.key_value(text), "b l (two n d) -> two b n l d", two=2, n=self.heads)
        return KeysValues(self.norm.key(k), v)

    def forward(
        self, x: Float[Tensor, "b l d"], keys_values: KeysValues, mask: Bool[Tensor, "b k"]
    ) -> Tensor:
        q = self.norm.query(rearrange(self.query(x), "b l (n d) -> b n l d", n=self.heads))
        return self.out(rearrange(self.kernel(q, *keys_values, mask), "b n l d -> b l (n d)"))


class Block(nn.Module):
    """Self-attention, cross-attention (not modulated), feed-forward; adaptive norm from the time alone."""

    def __init__(self, width: int, heads: int, ffn: int, qk_norm: bool, kernel: Kernel) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width, gain=False)
        self.attention = SelfAttention(width, heads, qk_norm, kernel)
        self.cross_norm = RMSNorm(width)
        self.cross_attention = CrossAttention(width, heads, qk_norm, kernel)
        self.ffn_norm = RMSNorm(width, gain=False)
        self.ffn = SwiGLU(width, ffn)
        self.modulation_bias = nn.Parameter(torch.empty(6, width))

    def forward(
        self, x: Tensor, positions: Tensor, modulation: Tensor, keys_values: KeysValues, mask: Tensor
    ) -> Float[Tensor, "b l d"]:
        """`positions` "1 l d" enter at every layer; to the shared `modulation` "b 6 d" it adds its bias."""
        m = Modulation(*(modulation + self.modulation_bias).unsqueeze(2).unbind(dim=1))
        x = x + positions
        h = self.attention_norm(x) * (1 + m.attention_scale) + m.attention_shift
        x = x + m.attention_gate * self.attention(h)
        x = x + self.cross_attention(self.cross_norm(x), keys_values, mask)
        h = self.ffn_norm(x) * (1 + m.ffn_scale) + m.ffn_shift
        return x + m.ffn_gate * self.ffn(h)


class TimeEmbedding(nn.Module):
    """Sinusoids of the flow time and a two-layer MLP."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        half = self.frequencies // 2
        rates = torch.exp(
            -math.log(10_000) * torch.arange(half, device=time.device, dtype=torch.float32) / half
        )
        angles = 1000 * time.float()[:, None] * rates
        sinusoids = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))


class FactorizedPositions(nn.Module):
    """Learned φ_t + φ_h + φ_w: one table an axis, so that any clip up to the tables' sizes has positions."""

    def __init__(self, width: int, sizes: tuple[int, int, int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.time = nn.Parameter(torch.empty(sizes[0], width))
        self.height = nn.Parameter(torch.empty(sizes[1], width))
        self.width = nn.Parameter(torch.empty(sizes[2], width))

    def forward(self, t: int, h: int, w: int) -> Float[Tensor, "1 l d"]:
        """Positions of a grid of t x h x w tokens.

        Raises:
            ValueError: a side longer than its table.
        """
        for axis, size, limit in zip(("frames", "height", "width"), (t, h, w), self.sizes, strict=True):
            if size > limit:
                raise ValueError(
                    f"{axis}: {size} tokens, but the position table ends at {limit} (dit.max_tokens)"
                )
        grid = self.time[:t, None, None] + self.height[None, :h, None] + self.width[None, None, :w]
        return rearrange(grid, "t h w d -> 1 (t h w) d")
