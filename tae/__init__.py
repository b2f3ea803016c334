"""Temporal autoencoder: video to latents, eight times smaller in time, height and width, and back."""

from kinoflow.tae.cpu.accelerate import accelerate
from kinoflow.tae.model.config import LatentShape, TAEConfig
from kinoflow.tae.model.tae import TAE, Posterior

__all__ = ["TAE", "LatentShape", "Posterior", "TAEConfig", "accelerate"]
