"""Velocities of places where a picture is shown, leant on the picture.

Letters: b clips, c channels, t h w latent sizes, d model width.
"""

from jaxtyping import Float
from torch import Tensor, nn

from kinoflow.dit_video.flow.known import Known

LOG_SPREAD = -2.0  # log s² to begin with: pictures of clips explain most of their latents' unit variance
HALF = 0.5  # the gate to begin with


class ShownGate(nn.Module):
    """Mixes a network's velocity with the one that follows from the picture alone.

    The latent z of frames that begin or end with a picture is near the picture's latent k: z ~ N(k, s²). On
    CondOT's path the velocity E[z − ε | x] is then known (`picture_velocity`). A network learns only slowly
    to copy a picture from its input; so it gives the motion, and the picture the rest. The share g of the
    picture and s² are linear in the embedding of the time, one each a channel.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, 2 * channels)

    def forward(
        self,
        velocity: Float[Tensor, "b c t h w"],
        latent: Float[Tensor, "b c t h w"],
        known: Known,
        *,
        time: Float[Tensor, " b"],
        embedded: Float[Tensor, "b d"],
    ) -> Float[Tensor, "b c t h w"]:
        """v + g (v_picture − v) in the shown places; `embedded` is what the modulations read of the time."""
        at = self.map(embedded).float()[:, :, None, None, None]
        gate, spread = at.chunk(2, dim=1)
        guess = picture_velocity(
            latent.float(), known.latent.float(), time.view(-1, 1, 1, 1, 1), (LOG_SPREAD + spread).exp()
        )
        lean = known.shown * (HALF + gate) * (guess - velocity.float())
        return velocity + lean.to(velocity.dtype)


def picture_velocity(
    x: Float[Tensor, "..."], picture: Float[Tensor, "..."], time: Float[Tensor, "..."], variance: Tensor
) -> Float[Tensor, "..."]:
    """E[z − ε | x] of x = t z + β ε, β = 1 − t, for z ~ N(picture, variance) and ε ~ N(0, 1).

    Gaussian conditioning: the mean k of z − ε, and its covariance with x, t s² − β, over the variance of x,
    t² s² + β², times what x is off its mean t k. It is finite at every time in [0, 1].
    """
    beta = 1 - time
    slope = (time * variance - beta) / (time.square() * variance + beta.square())
    return picture + slope * (x - time * picture)
