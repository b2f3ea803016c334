"""Exact attention in blocks of scores that stay in a processor's cache: for bf16 on a CPU.

Letters: b batch, n heads, q queries, k keys, d head width.

Torch's fused kernel reaches a fifth of the speed of a matrix product there. Here all arithmetic is torch's
matrix products and softmaxes, of some heads of some clips at a time. Like the fused kernel's, the memory is
linear in the tokens: the backward computes the scores again (FlashAttention, section 3.1). Scores are rounded
to bf16.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

BLOCK_SCORES = 1 << 21


class Block(NamedTuple):
    """Clips, heads and queries whose scores are computed at once."""

    clips: slice
    heads: slice
    queries: slice


def blocks(query: Tensor, key: Tensor) -> Iterator[Block]:
    """All scores, at most `BLOCK_SCORES` at a time, but never less than one query's."""
    b, n, q, _ = query.shape
    k = key.shape[2]
    clips, heads, queries = (max(BLOCK_SCORES // max(scores, 1), 1) for scores in (n * q * k, q * k, k))
    for clip in range(0, b, clips):
        for head in range(0, n, heads):
            for first in range(0, q, queries):
                yield Block(
                    slice(clip, clip + clips), slice(head, head + heads), slice(first, first + queries)
                )


def blockwise_attention(
    query: Float[Tensor, "b n q d"],
    key: Float[Tensor, "b n k d"],
    value: Float[Tensor, "b n k d"],
    seen: Bool[Tensor, "b 1 1 k"] | None = None,
) -> Float[Tensor, "b n q d"]:
    """softmax(q kᵀ / √d) v; `seen`, as torch's mask, is true for the keys that may be seen."""
    return _forward(query, key, value, seen)


# To the compiler the two are operations as torch's own: it neither looks inside nor breaks its graph there.
@torch.library.custom_op("kinoflow::blockwise_attention", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
    attended = _tokens_first(query)
    softmax = _Softmax(query, seen)
    for block in blocks(query, key):
        clips, heads, _ = block
        weights = softmax(_scaled(_rows(query[block])), _rows(key[clips, heads]), clips)
        _put(attended[block], torch.bmm(weights, _rows(value[clips, heads])))
    return attended


@torch.library.custom_op("kinoflow::blockwise_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    several = query.shape[2] * key.shape[2] > BLOCK_SCORES  # blocks of queries for the same keys
    exact = torch.promote_types(key.dtype, torch.float32) if several else key.dtype
    grad_query = _tokens_first(query)
    grad_key, grad_value = (_tokens_first(x, exact).zero_() for x in (key, value))
    softmax, grad_weights = _Softmax(query, seen), _Buffer(query)
    for block in blocks(query, key):
        clips, heads, queries = block
        q, k, v = _scaled(_rows(query[block])), _rows(key[clips, heads]), _rows(value[clips, heads])
        g, w = _rows(grad[block]), softmax(q, k, clips)
        grad_w, s = torch.bmm(g, v.mT, out=grad_weights.of(w.shape)), softmax.scores.of(w.shape)
        torch._softmax_backward_data(grad_w, w, -1, w.dtype, grad_input=s)
        later = queries.start > 0
        _put(grad_query[block], _scaled(torch.bmm(s, k)))
        _put(grad_key[clips, heads], torch.bmm(s.mT, q), add=later)
        _put(grad_value[clips, heads], torch.bmm(w.mT, g), add=later)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


class _Buffer:
    """Memory for one block after another: new pages for each would take as long as what is written there."""

    def __init__(self, like: Tensor) -> None:
        self._memory = like.new_empty(0)

    def of(self, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if self._memory.numel() < size:
            self._memory = self._memory.new_empty(size)
        return self._memory[:size].view(shape)


class _Softmax:
    """The weights "r q k" of one block after another; `scores` is free again when they are there."""

    def __init__(self, like: Tensor, seen: Tensor | None) -> None:
        self.scores, self._weights = _Buffer(like), _Buffer(like)
        self._hidden = None if seen is None or seen.all() else ~seen

    def __call__(self, q: Tensor, k: Tensor, clips: slice) -> Tensor:
        shape = (len(q), q.shape[1], k.shape[1])
        scores = torch.bmm(q, k.mT, out=self.scores.of(shape))
        if self._hidden is not None:
            hidden = self._hidden[clips]
            scores.unflatten(0, (len(hidden), -1)).masked_fill_(hidden, -torch.inf)
        return torch.softmax(scores, dim=-1, out=self._weights.of(shape))


def _scaled(x: Tensor) -> Tensor:
    return x * x.shape[-1] ** -0.5


def _rows(x: Float[Tensor, "b n l d"]) -> Float[Tensor, "r l d"]:
    """Heads first in memory too: the products copy what is not."""
    return x.flatten(0, 1).contiguous()


def _put(where: Float[Tensor, "b n l d"], rows: Float[Tensor, "r l d"], add: bool = False) -> None:
    rows = rows.view(where.shape)
    where.add_(rows) if add else where.copy_(rows)


def _tokens_first(x: Float[Tensor, "b n l d"], dtype: torch.dtype | None = None) -> Float[Tensor, "b n l d"]:
    """Empty, of the same shape; in memory "b l n d", as the next linear map wants it."""
    b, n, length, d = x.shape
    return x.new_empty((b, length, n, d), dtype=dtype).transpose(1, 2)


@_forward.register_fake
def _(query: Tensor, *_others: Tensor | None) -> Tensor:
    return _tokens_first(query)


@_backward.register_fake
def _(_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, _seen: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(_tokens_first(x) for x in (query, key, value))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors), None


_forward.register_autograd(_differentiate, setup_context=_keep)
_forward.register_autocast("cpu", torch.bfloat16)


@register_flop_formula(torch.ops.kinoflow.blockwise_attention)
def _flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


@register_flop_formula(torch.ops.kinoflow.blockwise_attention_backward)
def _backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)
