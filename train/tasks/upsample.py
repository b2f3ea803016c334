"""What an upsampler learns from: a clip frame by frame, and its smaller twin, brought back to its size.

Every other twin stands for a clip that a model made: it has been through the autoencoder at its own size. The
rest stand for clips that are given. Of Movie Gen (section 3.1.5) the degradation is ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kinoflow.configs.files import seeded
from kinoflow.tae.model.pixels import from_bytes, to_bytes
from kinoflow.tae.model.stills import encode_stills, resized
from kinoflow.tae.model.tae import TAE

_GENERATED = 2  # every which twin is as a model would give it


@dataclass(frozen=True, kw_only=True)
class Twins:
    """Latents of the frames of clips, and of those of their smaller twins; not normalized."""

    latent: Float[Tensor, "b c frames h w"]
    smaller: Float[Tensor, "b c frames h w"]


def twins(
    encode: Callable[[Tensor], Tensor],
    tae: TAE,
    video: Float[Tensor, "b 3 frames height width"],
    factor: int,
    generated: Bool[Tensor, " b"],
) -> Twins:
    """Latents of clips in [-1, 1], whose sides `factor` divides, and of twins so many times smaller.

    `encode` gives posterior means of the autoencoder, `tae`.
    """
    height, width = video.shape[3:]
    small = resized(video.to(next(tae.parameters()).device), height // factor, width // factor)
    if generated.any():
        small[generated] = reconstructed(tae, small[generated])
    large = resized(from_bytes(to_bytes(small)), height, width)  # bytes are what a clip is given in
    return Twins(latent=encode_stills(encode, video), smaller=encode_stills(encode, large))


def generated(seed: int, bucket: str, clips: Sequence[int]) -> Bool[Tensor, " b"]:
    """Which of these clips of a bucket have a twin that has been through the autoencoder: half of all."""
    return torch.tensor([seeded("twin", seed, bucket, clip) % _GENERATED == 0 for clip in clips])


@torch.inference_mode()
def reconstructed(tae: TAE, video: Float[Tensor, "b 3 frames h w"]) -> Float[Tensor, "b 3 frames h w"]:
    """What the autoencoder makes of clips."""
    return tae.decode(tae.encode(video).mean, video.shape[2]).clamp(-1, 1)
