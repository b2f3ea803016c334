"""Temporal autoencoder: video to latents, eight times smaller in time, height and width, and back."""

from tae.config import LatentShape, TAEConfig
from tae.model import TAE, Posterior

__all__ = ["TAE", "LatentShape", "Posterior", "TAEConfig"]
