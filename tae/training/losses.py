"""Losses of the temporal autoencoder (Movie Gen, section 3.1.1).

Letters: b batch, c channels, t frames, h height, w width.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from kinoflow.tae.model.tae import Posterior


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms; a term of weight zero is not computed."""

    l1: float = 1.0
    """Mean absolute error of the pixels."""
    l2: float = 0.0
    """Mean squared error of the pixels."""
    kl: float = 1e-6
    """KL of the posterior to the standard normal."""
    outlier: float = 1e5
    """Penalty of latents far from their frame's mean; 0: none (shipped weights)."""
    outlier_radius: float = 3.0
    """Standard deviations that are not yet far."""
    perceptual: float = 0.0
    """Distance of features of the frames."""
    perceptual_weights: str = "stlpips"
    """Trunk of those features: a file, or stlpips for that of stlpips-pytorch."""
    perceptual_every: int = 1
    """Compare every n-th frame, one further at each step: it costs much."""
    adversarial: float = 0.0
    """Adversarial term: what the discriminator says."""
    adversarial_start: int = 0
    """Step from which that counts: the decoder reconstructs by then."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float | int) and value < 0:
                raise ValueError(f"loss.{field.name}: a weight is not negative, got {value}")
        if self.perceptual_every < 1:
            raise ValueError("loss.perceptual_every: at least 1, which is every frame, got 0")


def kl_loss(posterior: Posterior) -> Float[Tensor, ""]:
    """KL to the standard normal in nats, averaged over latent values: clips of any length weigh the same."""
    return posterior.kl().mean()


def outlier_penalty(latent: Float[Tensor, "b c t h w"], radius: float) -> Float[Tensor, ""]:
    """Outlier penalty loss (Movie Gen, equation 3), with time rolled into the batch.

    1/(HW) Σ_ij max(‖X_ij − mean‖ − r‖std‖, 0): X_ij is the channel vector at a position, mean and std are
    over the positions of its frame, and the norms are over channels.
    """
    frames = rearrange(latent, "b c t h w -> (b t) c (h w)")
    mean = frames.mean(dim=2, keepdim=True)
    distance = torch.linalg.vector_norm(frames - mean, dim=1)
    spread = torch.linalg.vector_norm(frames.std(dim=2, correction=0), dim=1)
    return F.relu(distance - radius * spread[:, None]).mean()


def discriminator_hinge(real: Tensor, fake: Tensor) -> Float[Tensor, ""]:
    """Hinge loss of the discriminator (Lim and Ye 2017): mean of max(0, 1 − D(x)) and of max(0, 1 + D(x̂))."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_hinge(fake: Tensor) -> Float[Tensor, ""]:
    """What the decoder minimizes against a hinge discriminator: −mean D(x̂)."""
    return -fake.mean()
