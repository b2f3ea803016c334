"""The autoencoder: its configuration, layers, and how it is made from others."""
