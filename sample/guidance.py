"""Classifier-free guidance: velocities with and without the condition (prompt or label), combined."""

from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kinoflow.conditioning.embedding import Condition, TextEmbedding
from kinoflow.conditioning.labels import Labels
from kinoflow.sample.solver import VelocityFn


@runtime_checkable
class VelocityModel(Protocol):
    """What sampling asks of a backbone."""

    def __call__(self, latent: Tensor, time: Tensor, condition: Any) -> Tensor: ...

    def encode_condition(self, condition: Condition) -> Any: ...


def guide(
    unconditional: Float[Tensor, "b ..."], conditional: Float[Tensor, "b ..."], guidance_scale: float
) -> Float[Tensor, "b ..."]:
    """(1 - w) u(x|∅) + w u(x|y): classifier-free guidance, eq. 1.8 of the lecture notes (and their figure 1).

    By (1.3) and (1.5) it is u(x|∅) + w b ∇ log p(y|x), without the classifier of Remark 2; it asks for no
    Gaussian path (Remark 3). Outputs of a score model are combined alike (1.15).
    """
    return (1 - guidance_scale) * unconditional + guidance_scale * conditional


def guided_velocity(
    backbone: VelocityModel,
    condition: Condition,
    null: Condition,
    guidance_scale: float,
) -> VelocityFn:
    """The guided velocity as a function of (latent, time) for a solver (lecture notes, Key Idea 1, figure 2).

    `null` stands for ∅: the null prompt or no class, or what is to be steered away from in its place, one
    row or as many as `condition`. Conditions go through the model once, here; both halves of the guidance,
    which one network gives (Summary 1), then run as one batch of 2b. With `guidance_scale` 1 the
    unconditional half has no weight and is left out.
    """
    if guidance_scale == 1:
        context = backbone.encode_condition(condition)
        return lambda x, time: backbone(x, time.expand(x.shape[0]), context)
    context = backbone.encode_condition(stack(null, condition))

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        both = backbone(torch.cat((x, x)), time.expand(2 * x.shape[0]), context)
        unconditional, conditional = both.chunk(2)
        return guide(unconditional, conditional, guidance_scale)

    return velocity


def stack(null: Condition, condition: Condition) -> Condition:
    """Rows of `null` above rows of `condition`; texts encoder by encoder, padded to a common length.

    Raises:
        TypeError: one holds labels and the other texts.
    """
    if isinstance(null, Labels) and isinstance(condition, Labels):
        rows = null.index.expand(len(condition.index))
        return replace(condition, index=torch.cat((rows, condition.index)))
    if isinstance(null, Labels) or isinstance(condition, Labels):
        raise TypeError("guidance: labels beside texts")
    return tuple(_stack_one(*pair) for pair in zip(null, condition, strict=True))


def _stack_one(null: TextEmbedding, own: TextEmbedding) -> TextEmbedding:
    rows = own.mask.shape[0]
    length = max(null.mask.shape[1], own.mask.shape[1])
    null, own = _pad(null, length), _pad(own, length)
    pooled = None
    if null.pooled is not None and own.pooled is not None:
        pooled = torch.cat((null.pooled.expand(rows, -1), own.pooled))
    return TextEmbedding(
        hidden=torch.cat((null.hidden.expand(rows, -1, -1), own.hidden)),
        mask=torch.cat((null.mask.expand(rows, -1), own.mask)),
        pooled=pooled,
    )


def _pad(embedding: TextEmbedding, length: int) -> TextEmbedding:
    missing = length - embedding.mask.shape[1]
    return TextEmbedding(
        hidden=torch.nn.functional.pad(embedding.hidden, (0, 0, 0, missing)),
        mask=torch.nn.functional.pad(embedding.mask, (0, missing), value=False),
        pooled=embedding.pooled,
    )
