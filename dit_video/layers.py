"""Layers of the backbone (Movie Gen, section 3.1.3): a LLaMa3 block with cross-attention and adaptive norms.

Letters: b batch, l sequence, n heads, d model width.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kinoflow.dit_video.attention.kernels import Kernel, Segments, Shard, Who

EPSILON = 1e-6


class Layout(NamedTuple):
    """How the clips and their text lie in the sequences, and so who sees whom.

    clips: None where each row is one clip; or a shard of it.
    text: the mask "b k" of padded text, or the runs of packed text.
    """

    clips: Shard | None
    text: Who


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


class _Normalize(torch.autograd.Function):
    """y = x / √(mean(x²) + ε) over the last axis, and its gradient (g − y · mean(g y)) / √(mean(x²) + ε).

    Torch's own is eight passes over x on a CPU, each with a copy in fp32; this is two, and three back.
    What is shorter than fp32 is computed with in fp32 and rounded once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide, high = _wide(x), torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True, dtype=high)
        inverse = norm.square().div_(x.shape[-1]).add_(EPSILON).rsqrt_()
        y = (wide * inverse).to(x.dtype)
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        y, inverse = ctx.saved_tensors
        (grad,) = grads
        wide, along = _wide(grad), _wide(y)
        mean = torch.linalg.vecdot(wide, along).unsqueeze(-1).to(inverse.dtype).div_(y.shape[-1])
        return torch.addcmul(wide, along, mean, value=-1).mul_(inverse).to(grad.dtype)


def _wide(x: Tensor) -> Tensor:
    """In fp32 at least on a CPU, which casts slowly inside an operation; a GPU casts as it reads."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.device.type == "cpu" else x


class RMSNorm(nn.Module):
    """x / rms(x), with a learned gain unless an adaptive scale follows; in the dtype of x."""

    def __init__(self, width: int, gain: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width)) if gain else None

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        normalized = _Normalize.apply(x)
        # Under autocast the gain is fp32, and queries and keys have to stay what the values are.
        return normalized if self.weight is None else normalized * self.weight.to(normalized.dtype)


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


def _split_heads(x: Float[Tensor, "b l d"], heads: int) -> Float[Tensor, "b n l h"]:
    """A view: the heads stay inside each token, where the kernels read them and write their gradients."""
    return rearrange(x, "b l (n h) -> b n l h", n=heads)


class SelfAttention(nn.Module):
    """Full bidirectional attention over all tokens of the clip."""

    def __init__(self, width: int, heads: int, qk_norm: bool, kernel: Kernel) -> None:
        super().__init__()
        self.heads = heads
        self.kernel = kernel
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm = HeadNorm(width // heads, qk_norm)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Float[Tensor, "b l d"], who: Who = None) -> Float[Tensor, "b l d"]:
        q, k, v = (_split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        attended = self.kernel(self.norm.query(q), self.norm.key(k), v, who)
        return self.out(rearrange(attended, "b n l d -> b l (n d)"))


class CrossAttention(nn.Module):
    """Video tokens ask, text tokens answer: how a sequence is fed in (lecture notes, 1.2.2).

    Keys and values may be computed once and kept over all steps.
    """

    def __init__(
        self, width: int, heads: int, qk_norm: bool, kernel: Kernel, *, text_width: int | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.kernel = kernel
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(text_width or width, 2 * width, bias=False)
        self.norm = HeadNorm(width // heads, qk_norm)
        self.out = nn.Linear(width, width, bias=False)

    def keys_values(self, text: Float[Tensor, "b l d"]) -> KeysValues:
        k, v = (_split_heads(part, self.heads) for part in self.key_value(text).chunk(2, dim=-1))
        return KeysValues(self.norm.key(k), v)

    def forward(self, x: Float[Tensor, "b l d"], keys_values: KeysValues, who: Who) -> Float[Tensor, "b l d"]:
        """Padded text: `who` is its mask "b k". Packed: runs of all rows of x, joined, and of their text."""
        q = self.norm.query(_split_heads(self.query(x), self.heads))
        if isinstance(who, Segments):
            joined = rearrange(q, "b n l h -> 1 n (b l) h")
            attended = rearrange(self.kernel(joined, *keys_values, who), "1 n (b l) h -> b l (n h)", b=len(x))
        else:
            attended = rearrange(self.kernel(q, *keys_values, who), "b n l h -> b l (n h)")
        return self.out(attended)


class Block(nn.Module):
    """Self-attention, cross-attention (not modulated), feed-forward; adaptive norm from time and label.

    Without `text` there is no cross-attention.
    """

    def __init__(
        self, width: int, heads: int, ffn: int, qk_norm: bool, kernel: Kernel, *, text: bool = True
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width, gain=False)
        self.attention = SelfAttention(width, heads, qk_norm, kernel)
        self.cross_norm = RMSNorm(width) if text else None
        self.cross_attention = CrossAttention(width, heads, qk_norm, kernel) if text else None
        self.ffn_norm = RMSNorm(width, gain=False)
        self.ffn = SwiGLU(width, ffn)
        self.modulation_bias = nn.Parameter(torch.empty(6, width))

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        modulation: Tensor,
        text: KeysValues | Tensor | None,
        layout: Layout,
    ) -> Float[Tensor, "b l d"]:
        """`positions` "1 l d" enter at every layer; to the shared `modulation` "b 6 d" it adds its bias.

        `text` is its keys and values in this layer, or the states "b l d" that they are computed from; None
        in a block without cross-attention.
        """
        m = Modulation(*(modulation + self.modulation_bias)[:, None].unbind(dim=2))
        x = x + positions
        h = torch.addcmul(m.attention_shift, self.attention_norm(x), 1 + m.attention_scale)
        x = torch.addcmul(x, m.attention_gate, self.attention(h, layout.clips))
        if self.cross_attention is not None and self.cross_norm is not None:
            keys_values = self.cross_attention.keys_values(text) if isinstance(text, Tensor) else text
            x = x + self.cross_attention(self.cross_norm(x), keys_values, layout.text)
        h = torch.addcmul(m.ffn_shift, self.ffn_norm(x), 1 + m.ffn_scale)
        return torch.addcmul(x, m.ffn_gate, self.ffn(h))


def sinusoids(time: Float[Tensor, " b"], features: int) -> Float[Tensor, "b features"]:
    """Fourier features of the flow time in fp32: cosines, then sines, at `features` / 2 rates."""
    half = features // 2
    rates = torch.exp(-math.log(10_000) * torch.arange(half, device=time.device, dtype=torch.float32) / half)
    angles = 1000 * time.float()[:, None] * rates
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoids of the flow time and a two-layer MLP."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        features = sinusoids(time, self.frequencies)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


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


def stretch(table: Float[Tensor, "old d"], length: int) -> Float[Tensor, "new d"]:
    """The table at `length` places: row i stands at i · length / old, what lies between is linear.

    With a whole factor k every old row is kept, at place k i; a factor of 1 changes nothing. Behind the last
    row the line goes on, so that no two places are the same. A single row is repeated.
    """
    old = len(table)
    if old == 1:
        return table.repeat(length, 1)
    place = torch.arange(length, device=table.device, dtype=torch.float64) * old / length
    below = place.floor().long().clamp(max=old - 2)
    weight = (place - below).to(table.dtype)[:, None]
    return torch.lerp(table[below], table[below + 1], weight)
