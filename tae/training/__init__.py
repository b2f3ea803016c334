"""What the autoencoder is trained with: losses, perceptual distance, discriminator."""
