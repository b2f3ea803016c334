"""Clips to latent files and back, with figures of what was lost."""
