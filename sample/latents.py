"""The latent of a plan: from its noise, and from what it is made from beside the prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from kinoflow.conditioning.embedding import Condition
from kinoflow.dit_video.flow.known import Known
from kinoflow.sample.cache import Passes
from kinoflow.sample.generate import sample_latent
from kinoflow.sample.given import extended, known_of, last_alone
from kinoflow.sample.models import Models
from kinoflow.sample.plan import Plan
from kinoflow.sample.release import Release
from kinoflow.sample.upsample import shown_small
from kinoflow.tae.model.tae import TAE


def solved(
    plan: Plan,
    release: Release,
    models: Models,
    conditions: tuple[Condition, Condition],
    *,
    told: Callable[[], None],
    passes: Passes | None = None,
    seen: Callable[[Float[Tensor, "1 c t h w"]], None] | None = None,
) -> Float[Tensor, "1 c t h w"]:
    """The normalized latent that the flow leads to from the noise of the plan's seed.

    `conditions` are the prompt and what guidance steers away from; `told` is called after each velocity; of
    `passes` and `seen` see `sample_latent`.
    """
    bucket, size = plan.bucket, release.latent_shape
    shape = size(bucket.frames, bucket.height, bucket.width)
    if plan.stills:
        shape = replace(size(1, bucket.height, bucket.width), frames=bucket.frames)

    def make(known: Known | None, turn: int = 0) -> Float[Tensor, "1 c t h w"]:
        return sample_latent(
            models.backbone(), *conditions, shape, seed=(plan.seed + turn) % 2**63, sampling=plan.sampling,
            progress=told, passes=passes, known=known, windows=plan.windows, lean=not plan.stills, seen=seen,
        )  # fmt: skip

    if plan.source is None:
        return make(None)
    if plan.stills and plan.source.clip is not None:
        return make(shown_small(plan.source.clip, autoencoder(models), bucket.height, bucket.width))
    known = known_of(plan.source, autoencoder(models), shape.frames)
    if not plan.added:
        return make(known)
    kept, all_of_it = (size(n, bucket.height, bucket.width).frames for n in (plan.kept, plan.decoded))
    return extended(make, known, kept, all_of_it, lambda latent: last_alone(autoencoder(models), latent))


def autoencoder(models: Models) -> TAE:
    """The autoencoder, asked for each time: where memory is short nobody may hold it."""
    decoder = models.decoder()
    assert isinstance(decoder, TAE), "frames are given, or each has a latent"
    return decoder
