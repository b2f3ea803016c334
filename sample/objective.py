"""What a model gives, made the velocity that solvers ask for: its objective matters here and nowhere else."""

from torch import Tensor

from kinoflow.dit_video.flow.matching import Objective, velocity_from_scaled_score
from kinoflow.dit_video.flow.paths import GaussianPath
from kinoflow.sample.solver import VelocityFn

EARLIEST = 0.05
"""The first time at which a model of the score is asked: at 0 its answer says nothing of the data."""


def as_velocity(output_fn: VelocityFn, objective: Objective, path: GaussianPath) -> VelocityFn:
    """The velocity of a model that was trained for `objective` on `path`; `output_fn` is what it gives.

    Of the score it gives β ∇ log p_t, which Proposition 1 of the lecture notes makes the velocity. Both are
    affine with weights that sum to 1 in x and the output, so guided outputs (1.15) become the guided velocity
    (1.8). Before `EARLIEST` the model is asked there, and its field stands still.
    """
    if objective == "velocity":
        return output_fn

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        time = time.clamp(min=EARLIEST)
        return velocity_from_scaled_score(output_fn(x, time), x, time.expand(x.shape[0]), path)

    return velocity
