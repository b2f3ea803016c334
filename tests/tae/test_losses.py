"""Autoencoder losses against closed forms in float64."""

import math

import pytest
import torch

from kinoflow.tae.model.tae import Posterior
from kinoflow.tae.training.losses import (
    LossConfig,
    discriminator_hinge,
    generator_hinge,
    kl_loss,
    outlier_penalty,
)


def test_kl_equals_torch_distributions() -> None:
    mean, logvar = (
        torch.randn(2, 3, 1, 2, 2, dtype=torch.float64),
        torch.randn(2, 3, 1, 2, 2, dtype=torch.float64),
    )
    posterior = Posterior(mean=mean, logvar=logvar)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, posterior.std), normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_loss(posterior), expected)


def test_outlier_penalty_of_one_spot() -> None:
    """One position of n differs by v: mean v/n, ‖std‖ = ‖v‖ √(n−1)/n, so only the spot can exceed."""
    n, length = 64, 5.0
    latent = torch.zeros(1, 4, 1, 8, 8, dtype=torch.float64)
    latent[0, :, 0, 3, 5] = length / 2
    excess = length * (n - 1) / n - 3 * length * math.sqrt(n - 1) / n
    torch.testing.assert_close(outlier_penalty(latent, 3.0), torch.tensor(excess / n, dtype=torch.float64))


def test_outlier_penalty_takes_norms_of_channel_vectors_not_elements() -> None:
    """Outliers of single channels at different places: large element by element, none as vectors."""
    latent = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latent[0, 0, 0, 0, 0] += 8
    frames = latent[0, :, 0].flatten(1)
    elementwise = ((frames - frames.mean(1, keepdim=True)).abs() - 3 * frames.std(1, keepdim=True)).clamp(
        min=0
    )
    assert elementwise.sum() > 1
    assert outlier_penalty(latent, 3.0) == 0


def test_outlier_penalty_rolls_time_into_the_batch() -> None:
    latent = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64).exp()
    each = [outlier_penalty(latent[b : b + 1, :, t : t + 1], 1.0) for b in range(2) for t in range(3)]
    torch.testing.assert_close(outlier_penalty(latent, 1.0), torch.stack(each).mean())


def test_hinge_losses() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])
    assert float(discriminator_hinge(real, fake)) == pytest.approx(0.5 * (0.25 + 0.625))
    assert float(generator_hinge(fake)) == pytest.approx(1.375)


def test_negative_weight_is_named() -> None:
    with pytest.raises(ValueError, match=r"loss\.kl"):
        LossConfig(kl=-1.0)
