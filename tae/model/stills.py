"""A clip frame by frame (Movie Gen, section 3.1.5): each frame has a latent of its own, as a picture has.

It takes eight times the latent frames, and the latents say more: nothing of a frame has to share a cell with
its neighbours. The autoencoder is the one of clips, which is an image autoencoder as well (section 3.1.1).
"""

from collections.abc import Callable

from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

Encode = Callable[[Float[Tensor, "n 3 1 height width"]], Float[Tensor, "n c 1 h w"]]


def encode_stills(
    encode: Encode, video: Float[Tensor, "b 3 frames height width"]
) -> Float[Tensor, "b c frames h w"]:
    """Latents of the frames, all of which go through `encode` at once."""
    latent = encode(rearrange(video, "b c f h w -> (b f) c 1 h w"))
    return rearrange(latent, "(b f) c 1 h w -> b c f h w", b=len(video))


def resized(
    video: Float[Tensor, "b 3 frames _ _"], height: int, width: int
) -> Float[Tensor, "b 3 frames height width"]:
    """Bilinear, frame by frame, antialiased where it becomes smaller; values stay in their range."""
    frames = rearrange(video, "b c f h w -> (b f) c h w")
    found = interpolate(frames, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return rearrange(found, "(b f) c h w -> b c f h w", b=len(video))
