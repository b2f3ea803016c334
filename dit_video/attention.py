"""Attention kernels. One is chosen when the model is built; one that cannot run is an error, no fallback.

Letters: b batch, n heads, q queries, k keys, d head width.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
KernelName = Literal["math", "sdpa"]


def math_attention(
    query: Float[Tensor, "b n q d"],
    key: Float[Tensor, "b n k d"],
    value: Float[Tensor, "b n k d"],
    mask: Bool[Tensor, "b k"] | None = None,
) -> Float[Tensor, "b n q d"]:
    """softmax(q kᵀ / √d) v written out: the reference of every other kernel. `mask` is true at real keys."""
    logits = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)
    return logits.softmax(dim=-1) @ value


def sdpa_attention(
    query: Float[Tensor, "b n q d"],
    key: Float[Tensor, "b n k d"],
    value: Float[Tensor, "b n k d"],
    mask: Bool[Tensor, "b k"] | None = None,
) -> Float[Tensor, "b n q d"]:
    """The same through torch's fused kernel."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=None if mask is None else mask[:, None, None, :]
    )


KERNELS: dict[KernelName, Kernel] = {"math": math_attention, "sdpa": sdpa_attention}
