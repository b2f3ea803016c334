"""Blocks of the MM-DiT (Esser et al. 2024, arXiv:2403.03206, figure 2): two streams that attend together.

Letters: b batch, l sequence, n heads, d model width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kinoflow.dit_video.attention.kernels import Kernel, Segments
from kinoflow.dit_video.layers import EPSILON, RMSNorm


class Packing(NamedTuple):
    """Which tokens of padded rows are real, for a kernel without masks."""

    real: Int[Tensor, " tokens"]
    """Their places in "b l", read row by row."""
    lengths: tuple[int, ...]
    """How many each row has."""


Seen = Tensor | Packing | None
"""Who is seen by all: everyone, the keys of a mask "b k", or the real tokens."""


class SineTables(nn.Module):
    """Fixed positions: half of the width says the column, half the row, in sines and cosines.

    A grid takes the middle of the tables, and positions count from there: longer tables hold shorter ones.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.columns = nn.Parameter(torch.empty(size, width // 2), requires_grad=False)
        self.rows = nn.Parameter(torch.empty(size, width // 2), requires_grad=False)

    def forward(self, h: int, w: int) -> Float[Tensor, "1 l d"]:
        """Positions of h x w tokens.

        Raises:
            ValueError: a side longer than the tables.
        """
        size = len(self.rows)
        for axis, length in (("height", h), ("width", w)):
            if length > size:
                raise ValueError(
                    f"{axis}: {length} tokens, but the position tables end at {size} (mmdit.max_tokens)"
                )
        rows, columns = (middle(table, length) for table, length in ((self.rows, h), (self.columns, w)))
        grid = torch.cat((columns[None].expand(h, -1, -1), rows[:, None].expand(-1, w, -1)), dim=2)
        return grid.flatten(0, 1)[None]


def middle(table: Float[Tensor, "size d"], length: int) -> Float[Tensor, "length d"]:
    """So many rows around the middle of the table, a view."""
    start = (len(table) - length) // 2
    return table[start : start + length]


@torch.no_grad()
def write_sines(table: Float[Tensor, "size d"]) -> None:
    """Sines, then cosines of the place times 10000^(-2 i / d), i < d / 2, counted from the middle."""
    size, half = len(table), table.shape[1] // 2
    place = torch.arange(size, device=table.device, dtype=torch.float64) - size // 2
    rates = 10_000.0 ** (-torch.arange(half, device=table.device, dtype=torch.float64) / half)
    angles = place[:, None] * rates
    table.copy_(torch.cat((angles.sin(), angles.cos()), dim=1))


def modulated(
    x: Float[Tensor, "b l d"], shift: Float[Tensor, "b 1 d"], scale: Float[Tensor, "b 1 d"]
) -> Float[Tensor, "b l d"]:
    """(1 + scale) x̂ + shift, where x̂ is x behind a layer norm without gain and bias.

    Of a single row they are torch's own gain and bias: one pass over x each way, where there would be ten.
    """
    if len(x) == 1:
        return F.layer_norm(x, x.shape[2:], 1 + scale[0, 0], shift[0, 0], EPSILON).to(x.dtype)
    normalized = F.layer_norm(x, x.shape[2:], eps=EPSILON).to(x.dtype)  # autocast may have made it fp32
    return torch.addcmul(shift, normalized, 1 + scale)


class Queries(NamedTuple):
    """Of one stream, each "b l n h"; no queries where nobody takes its answers."""

    queries: Tensor | None
    keys: Tensor
    values: Tensor


class Projections(nn.Module):
    """Queries, keys and values in one matrix, with RMS norms over each head; without `asks` no queries."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool, asks: bool = True) -> None:
        super().__init__()
        self.heads, self.asks = heads, asks
        self.linear = nn.Linear(width, (3 if asks else 2) * width)
        self.query_norm = RMSNorm(width // heads) if qk_norm and asks else nn.Identity()
        self.key_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x: Float[Tensor, "b l d"]) -> Queries:
        *queries, keys, values = (
            self.linear(x).unflatten(2, (-1, self.heads, x.shape[2] // self.heads)).unbind(2)
        )
        return Queries(self.query_norm(queries[0]) if queries else None, self.key_norm(keys), values)


class FeedForward(nn.Module):
    """W_out gelu(W_in x), four times as wide inside, the gelu by its tanh formula."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into = nn.Linear(width, 4 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.into(x), approximate="tanh"))


class Stream(nn.Module):
    """A block's weights for one of the two streams.

    The text of the last block `ends` there: it is only looked at. `modulation` gives shift, scale and gate of
    the attention and of the feed-forward, of an attention of the image alone as well where there is a second.
    """

    def __init__(
        self, width: int, heads: int, *, qk_norm: bool, second: bool = False, ends: bool = False
    ) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, (2 if ends else 9 if second else 6) * width)
        self.projections = Projections(width, heads, qk_norm=qk_norm, asks=not ends)
        self.out = None if ends else nn.Linear(width, width)
        self.ffn = None if ends else FeedForward(width)

    def modulations(self, condition: Float[Tensor, "b d"]) -> tuple[Tensor, ...]:
        """Each "b 1 d"."""
        return self.modulation(condition)[:, None].split(condition.shape[1], dim=2)

    def after(
        self, x: Tensor, attended: Tensor, m: tuple[Tensor, ...], update: Tensor | None = None
    ) -> Tensor:
        """The residual stream behind its attentions; `update` is what a second one adds, gated."""
        assert self.out is not None and self.ffn is not None, "it has not ended"
        _, _, gate, ffn_shift, ffn_scale, ffn_gate, *_ = m
        x = torch.addcmul(x, gate, self.out(attended))
        x = x if update is None else x + update
        return torch.addcmul(x, ffn_gate, self.ffn(modulated(x, ffn_shift, ffn_scale)))


class OwnAttention(nn.Module):
    """The second attention of Stable Diffusion 3.5 medium: image tokens see image tokens alone."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.projections = Projections(width, heads, qk_norm=qk_norm)
        self.out = nn.Linear(width, width)


class JointBlock(nn.Module):
    """Both streams ask and answer in one attention; norms, matrices and feed-forwards are each one's own."""

    def __init__(
        self, width: int, heads: int, *, qk_norm: bool, second: bool, last: bool, kernel: Kernel
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.image = Stream(width, heads, qk_norm=qk_norm, second=second)
        self.text = Stream(width, heads, qk_norm=qk_norm, ends=last)
        self.own_attention = OwnAttention(width, heads, qk_norm=qk_norm) if second else None

    def forward(
        self,
        image: Float[Tensor, "b i d"],
        text: Float[Tensor, "b l d"],
        condition: Float[Tensor, "b d"],
        seen: Seen,
    ) -> tuple[Float[Tensor, "b i d"], Float[Tensor, "b l d"]]:
        """Both streams behind this block, text that ends here as it is; `condition` is activated."""
        m, c = self.image.modulations(condition), self.text.modulations(condition)
        own = self.image.projections(modulated(image, m[0], m[1]))
        other = self.text.projections(modulated(text, c[0], c[1]))
        answers = self._joint(own, other, seen)
        update = None if self.own_attention is None else self._own(image, m)
        after = self.image.after(image, answers[0], m, update)
        return after, text if other.queries is None else self.text.after(text, answers[1], c)

    def _joint(self, image: Queries, text: Queries, seen: Seen) -> tuple[Tensor, ...]:
        """Of each stream that asks the answers, "b l d"."""
        assert image.queries is not None
        asking = (image.queries,) if text.queries is None else (image.queries, text.queries)
        joined = (asking, (image.keys, text.keys), (image.values, text.values))
        q, k, v = (torch.cat(each, dim=1).transpose(1, 2) for each in joined)
        attended = attend(self.kernel, q, k, v, seen).transpose(1, 2).flatten(2)
        return attended.split([queries.shape[1] for queries in asking], dim=1)

    def _own(self, image: Tensor, m: tuple[Tensor, ...]) -> Float[Tensor, "b i d"]:
        assert self.own_attention is not None
        *_, shift, scale, gate = m
        own = self.own_attention.projections(modulated(image, shift, scale))
        assert own.queries is not None
        q, k, v = (each.transpose(1, 2) for each in (own.queries, own.keys, own.values))
        attended = self.kernel(q, k, v, None).transpose(1, 2).flatten(2)
        return gate * self.own_attention.out(attended)


def attend(
    kernel: Kernel,
    query: Float[Tensor, "b n q d"],
    key: Float[Tensor, "b n k d"],
    value: Float[Tensor, "b n k d"],
    seen: Seen,
) -> Float[Tensor, "b n q d"]:
    """The kernel on padded rows; where it has no masks, on their real tokens, and padding gets zeros.

    Fewer queries than keys are those of the image, which has no padding.
    """
    if not isinstance(seen, Packing):
        return kernel(query, key, value, seen)
    rows, _, asked, _ = query.shape
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    padded, lengths = asked == key.shape[2], (asked,) * rows
    if padded:
        flat[0], lengths = flat[0][seen.real], seen.lengths
    q, k, v = (x.transpose(0, 1)[None] for x in (flat[0], flat[1][seen.real], flat[2][seen.real]))
    answers = kernel(q, k, v, Segments(lengths, seen.lengths))[0].transpose(0, 1)
    if padded:
        empty = answers.new_zeros(rows * asked, *answers.shape[1:])
        answers = empty.index_copy(0, seen.real, answers)
    return answers.unflatten(0, (rows, asked)).transpose(1, 2)
