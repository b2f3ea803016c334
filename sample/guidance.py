"""Classifier-free guidance: velocities with and without the prompt, combined."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.sample.solver import VelocityFn


@runtime_checkable
class VelocityModel(Protocol):
    """What sampling asks of a VideoDiT."""

    def __call__(self, latent: Tensor, time: Tensor, text: Any) -> Tensor: ...

    def encode_condition(self, text: Sequence[TextEmbedding]) -> Any: ...


def guide(
    unconditional: Float[Tensor, "b c t h w"], conditional: Float[Tensor, "b c t h w"], guidance_scale: float
) -> Float[Tensor, "b c t h w"]:
    """(1 - w) u(x|∅) + w u(x|y): classifier-free guidance, eq. 1.8 of the lecture notes."""
    return (1 - guidance_scale) * unconditional + guidance_scale * conditional


def guided_velocity(
    dit: VelocityModel,
    text: Sequence[TextEmbedding],
    null_text: Sequence[TextEmbedding],
    guidance_scale: float,
) -> VelocityFn:
    """The guided velocity as a function of (latent, time), ready for a solver.

    `null_text` stands for ∅: the null prompt, or the negative prompt in its place, one row or as many as
    `text`. Text goes through the model once, here; both halves of the guidance then run as one batch of
    2b. With `guidance_scale` 1 the unconditional half has no weight and is left out.
    """
    if guidance_scale == 1:
        context = dit.encode_condition(text)
        return lambda x, time: dit(x, time.expand(x.shape[0]), context)
    context = dit.encode_condition(stack(null_text, text))

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        both = dit(torch.cat((x, x)), time.expand(2 * x.shape[0]), context)
        unconditional, conditional = both.chunk(2)
        return guide(unconditional, conditional, guidance_scale)

    return velocity


def stack(null_text: Sequence[TextEmbedding], text: Sequence[TextEmbedding]) -> tuple[TextEmbedding, ...]:
    """Rows of `null_text` above rows of `text`, encoder by encoder, padded to a common length."""
    return tuple(_stack_one(null, own) for null, own in zip(null_text, text, strict=True))


def _stack_one(null: TextEmbedding, own: TextEmbedding) -> TextEmbedding:
    rows = own.mask.shape[0]
    length = max(null.mask.shape[1], own.mask.shape[1])
    null, own = _pad(null, length), _pad(own, length)
    return TextEmbedding(
        hidden=torch.cat((null.hidden.expand(rows, -1, -1), own.hidden)),
        mask=torch.cat((null.mask.expand(rows, -1), own.mask)),
    )


def _pad(embedding: TextEmbedding, length: int) -> TextEmbedding:
    missing = length - embedding.mask.shape[1]
    return TextEmbedding(
        hidden=torch.nn.functional.pad(embedding.hidden, (0, 0, 0, missing)),
        mask=torch.nn.functional.pad(embedding.mask, (0, missing), value=False),
    )
