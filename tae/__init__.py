"""Temporal autoencoder: video to latents, eight times smaller in time, height and width, and back."""

from tae.model import TAE, LatentShape, Posterior, TAEConfig

__all__ = ["TAE", "LatentShape", "Posterior", "TAEConfig"]
