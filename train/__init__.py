"""Training: one loop for the autoencoder and the diffusion transformer, on DeepSpeed."""
