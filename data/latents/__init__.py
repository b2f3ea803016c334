"""Latents on disk: one contract, two formats.

What is stored is what the autoencoder's encoder gives: the mean of the posterior, float16, not normalized.
The mean and standard deviation of each channel belong to the autoencoder; whoever wants normalized latents
computes them, (mean - latent_mean) / latent_std in float32, where the latents are read. `stored` makes what
is written, and refuses what float16 cannot hold.

`kino`    a latent file (.kino, .zarr): one clip of any length, with its times and sound, chunk by chunk
`shards`  a latent folder: many clips of a few shapes with their captions and text states, for training
"""

import numpy as np
import torch
from jaxtyping import Float, Float16
from torch import Tensor

from kinoflow.configs.errors import UserError


def stored(mean: Float[Tensor, "*any"], maker: str) -> Float16[np.ndarray, "*any"]:
    """Posterior means as they are written; `maker` names the autoencoder.

    Raises:
        UserError: a value that is not finite in float16.
    """
    rounded = mean.detach().to(torch.float16)
    if not rounded.isfinite().all():
        raise UserError(f"{maker}: gives latents beyond float16; train it further")
    return rounded.cpu().numpy()
