"""Attention kernels. One is chosen when the model is built; one that cannot run is an error, no fallback.

Letters: b batch, n heads, q queries, k keys, d head width.

A kernel takes (query, key, value, who). `who` says who may be seen: None, everyone; a mask "b k", the keys
where it is true; `Segments`, a packed sequence of batch 1 whose runs see only their own keys.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kinoflow.configs.errors import UserError
from kinoflow.dit_video.attention.blockwise import blockwise_attention

KernelName = Literal["math", "sdpa", "xformers", "flex", "varlen"]


class Segments(NamedTuple):
    """Lengths of the runs of a packed sequence: queries of run i see the keys of run i and no others."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]

    def mask(self, device: torch.device) -> Bool[Tensor, "1 1 q k"]:
        """The same as a dense mask."""
        q, k = (_runs(lengths, device) for lengths in self)
        return (q[:, None] == k)[None, None]


class Shard(NamedTuple):
    """What self-attention is told where a process holds a part of the sequence: the length of all.

    No kernel takes it; the exchange of `dit_video.parallel` around the kernel does.
    """

    length: int


Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Compiled code calls the function as it is, between two graphs."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


Who = Tensor | Segments | Shard | None
Kernel = Callable[[Tensor, Tensor, Tensor, Who], Tensor]


def math_attention(
    query: Float[Tensor, "b n q d"],
    key: Float[Tensor, "b n k d"],
    value: Float[Tensor, "b n k d"],
    who: Who = None,
) -> Float[Tensor, "b n q d"]:
    """softmax(q kᵀ / √d) v written out: the reference of every other kernel."""
    logits = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if isinstance(who, Segments):
        logits = logits.masked_fill(~who.mask(query.device), -torch.inf)
    elif who is not None:
        logits = logits.masked_fill(~_keys(who), -torch.inf)
    return logits.softmax(dim=-1) @ value


def sdpa_attention(
    query: Float[Tensor, "b n q d"],
    key: Float[Tensor, "b n k d"],
    value: Float[Tensor, "b n k d"],
    who: Who = None,
) -> Float[Tensor, "b n q d"]:
    """The same fused: torch's kernel, or for bf16 on a CPU ours. Packed, one call a run without any mask."""
    if isinstance(who, Segments):
        runs = zip(query.split(who.queries, 2), key.split(who.keys, 2), value.split(who.keys, 2), strict=True)
        return torch.cat([sdpa_attention(*run) for run in runs], dim=2)
    mask = None if who is None else _keys(who)
    if query.device.type == "cpu" and _is_bf16(query):
        return blockwise_attention(query, key, value, mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def xformers_attention(
    query: Float[Tensor, "b n q d"],
    key: Float[Tensor, "b n k d"],
    value: Float[Tensor, "b n k d"],
    who: Who = None,
) -> Float[Tensor, "b n q d"]:
    """xFormers' memory-efficient attention, block-diagonal where the sequence is packed."""
    from xformers.ops import memory_efficient_attention

    bias = None if who is None else block_diagonal(_packed(who, "xformers"), str(query.device))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)


@uncompiled
@lru_cache(maxsize=64)
def block_diagonal(segments: Segments, device: str) -> Any:
    """xFormers' mask of these runs; kept, for every layer and step asks for the same."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(list(segments.queries), list(segments.keys)).to(
        torch.device(device)
    )


def flex_attention(
    query: Float[Tensor, "b n q d"],
    key: Float[Tensor, "b n k d"],
    value: Float[Tensor, "b n k d"],
    who: Who = None,
) -> Float[Tensor, "b n q d"]:
    """torch's flex attention, compiled when it is first called; blocks between different runs are skipped."""
    mask = None if who is None else _flex_mask(_packed(who, "flex"), str(query.device))
    return _compiled_flex()(query, key, value, block_mask=mask)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention as flex

    return torch.compile(flex)


@uncompiled
@lru_cache(maxsize=64)
def _flex_mask(segments: Segments, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    q, k = (_runs(lengths, torch.device(device)) for lengths in segments)

    # Not compiled, it is dense before it is blocks: 5.4 GB at 73,728 tokens.
    make = torch.compile(create_block_mask) if device.startswith("cuda") else create_block_mask
    return make(lambda _b, _n, row, column: q[row] == k[column], None, None, len(q), len(k), device=device)


def varlen_attention(
    query: Float[Tensor, "b n q d"],
    key: Float[Tensor, "b n k d"],
    value: Float[Tensor, "b n k d"],
    who: Who = None,
) -> Float[Tensor, "b n q d"]:
    """torch's variable-length flash attention; a batch is a packed sequence of equal runs to it."""
    from torch.nn.attention.varlen import varlen_attn

    rows = query.shape[0]
    equal = Segments((query.shape[2],) * rows, (key.shape[2],) * rows)
    segments = equal if who is None else _packed(who, "varlen")
    starts_q, starts_k = (_starts(lengths, str(query.device)) for lengths in segments)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    attended = varlen_attn(q, k, v, starts_q, starts_k, max(segments.queries), max(segments.keys))
    assert isinstance(attended, Tensor)
    return attended.unflatten(0, (rows, -1)).transpose(1, 2)


@uncompiled
@lru_cache(maxsize=64)
def _starts(lengths: tuple[int, ...], device: str) -> Int[Tensor, " starts"]:
    """Where each run begins, and the end."""
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)


def _runs(lengths: tuple[int, ...], device: torch.device) -> Int[Tensor, " l"]:
    """The run of each token."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)


def _keys(who: Who) -> Bool[Tensor, "b 1 1 k"]:
    assert isinstance(who, Tensor), "a shard of a sequence reached the kernel itself"
    return who[:, None, None, :]


def _is_bf16(x: Tensor) -> bool:
    """Itself, or by autocast."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type) == torch.bfloat16
    return x.dtype == torch.bfloat16


def _packed(who: Who, name: str) -> Segments:
    if isinstance(who, Segments):
        return who
    raise UserError(f"dit.attention: {name} takes packed sequences, not masks; pack the keys or use sdpa")


_KERNELS: dict[KernelName, Kernel] = {
    "math": math_attention,
    "sdpa": sdpa_attention,
    "xformers": xformers_attention,
    "flex": flex_attention,
    "varlen": varlen_attention,
}


def choose(name: KernelName) -> Kernel:
    """The kernel of this name.

    Raises:
        UserError: it cannot run here.
    """
    missing = _missing(name)
    if missing:
        raise UserError(f"dit.attention: {name} cannot run here: {missing}, or use sdpa")
    return _KERNELS[name]


def packs(name: KernelName) -> bool:
    """Whether the kernel wants text without padding: it has no masks of single keys, and needs none."""
    return name not in ("math", "sdpa")


def _missing(name: KernelName) -> str | None:
    """What the kernel lacks here, None if nothing."""
    try:
        if name == "xformers":
            import xformers.ops  # noqa: F401
        elif name == "varlen":
            import torch.nn.attention.varlen
        elif name == "flex":
            import torch.nn.attention.flex_attention
    except ImportError as error:
        remedy = "pip install 'kinoflow[gpu]'" if name == "xformers" else "install torch 2.10 or newer"
        return f"{error}; {remedy}"
    if name in ("xformers", "varlen") and not torch.cuda.is_available():
        return "it needs a CUDA device, and torch sees none; install torch for CUDA"
    return None
