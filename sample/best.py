"""Best of several: clips of one prompt from other noise, until a verifier finds nothing wrong with one.

Random search over noise with a verifier (Ma et al. 2025, arXiv:2501.09732), which ends with the first clip
that the verifier passes: where most clips are right, few are made twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kinoflow.configs.errors import UserError, one_line
from kinoflow.configs.files import seeded
from kinoflow.sample.evaluation.verifier import Score, Verifier
from kinoflow.sample.plan import Plan

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float, UInt8
    from torch import Tensor


def seed_of(seed: int, take: int) -> int:
    """Of a clip's takes the first has the clip's own seed, each other one that no neighbouring clip has.

    Below 2^32: PyTorch's generator of the CPU looks at no more of a seed.
    """
    return seed if take == 0 else seeded("take", seed, take) % 2**32


@dataclass(frozen=True, kw_only=True)
class Take:
    """A latent, and its frames where a verifier has looked at them."""

    latent: Float[Tensor, "1 c t h w"]
    frames: UInt8[np.ndarray, "frames height width 3"] | None = None
    number: int = 0
    """Of the takes of a clip, from 0; what `seed_of` asks for."""


class UndecodedError(UserError):
    """A take that could not be looked at: its frames could not be made. Its `latent` took longest."""

    def __init__(self, latent: Float[Tensor, "1 c t h w"], error: Exception) -> None:
        super().__init__(one_line(error))
        self.latent = latent


def best_take(
    plan: Plan,
    verifier: Verifier,
    make: Callable[[Plan], Float[Tensor, "1 c t h w"]],
    decode: Callable[[Float[Tensor, "1 c t h w"]], UInt8[np.ndarray, "frames height width 3"]],
    left_out: Callable[[int], None],
) -> Take:
    """The best of up to `plan.best_of` takes; of a prompt that the verifier doesn't know the first.

    The first has the plan's own seed. `left_out` is told how many were not needed.

    Raises:
        UndecodedError: frames that `decode` cannot make.
    """
    if not verifier.knows(plan.prompt):
        left_out(plan.best_of - 1)
        return Take(latent=make(plan))
    best: tuple[Score, Take] | None = None
    for index in range(plan.best_of):
        latent = make(replace(plan, seed=seed_of(plan.seed, index)))
        try:
            frames = decode(latent)
        except (RuntimeError, MemoryError, UserError) as error:
            raise UndecodedError(latent, error) from error
        score = verifier.score(plan.prompt, frames, plan.bucket.fps)
        if best is None or score > best[0]:
            best = score, Take(latent=latent, frames=frames, number=index)
        if score.passed:
            left_out(plan.best_of - 1 - index)
            break
    assert best is not None, "a plan has at least one take"
    return best[1]
