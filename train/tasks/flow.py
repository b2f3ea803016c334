"""The flow matching loss of a batch, clip by clip, and by the quarters of the flow's times."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.data.latents.shards import Batch
from kinoflow.dit_video.flow.matching import FlowConfig, perturb
from kinoflow.train.run.log import SHARE
from kinoflow.train.run.task import Parts


@dataclass(frozen=True, kw_only=True)
class FlowBatch:
    """Normalized latents, the noise and times they are mixed at, and their texts, one entry an encoder.

    `dropout` is the seed of what adapters drop.
    """

    latent: Float[Tensor, "b c t h w"]
    noise: Float[Tensor, "b c t h w"]
    time: Float[Tensor, " b"]
    texts: tuple[TextEmbedding, ...]
    dropout: Int[Tensor, ""]


def embeddings(clips: Batch) -> tuple[TextEmbedding, ...]:
    """The text states of stored clips, as the transformer takes them."""
    return tuple(TextEmbedding(hidden=text.hidden, mask=text.mask) for text in clips.texts)


def flow_loss(model: nn.Module, batch: FlowBatch, flow: FlowConfig) -> Float[Tensor, " b"]:
    """The mean squared error of the velocity of each clip, in float32 (Movie Gen, equation 3)."""
    sample = perturb(batch.latent, batch.noise, batch.time, flow.gaussian_path)
    error = model(sample.x_t, batch.time, batch.texts) - sample.velocity
    return error.float().square().flatten(1).mean(1)


def by_quarter(loss: Float[Tensor, " b"], time: Float[Tensor, " b"]) -> Parts:
    """Figures for the log: the mean loss of the clips in each quarter of the times, and the clips' share."""
    parts: Parts = {}
    for quarter in range(4):
        inside = (time >= quarter / 4) & ((time < (quarter + 1) / 4) | (quarter == 3))
        name = f"loss_{25 * quarter}_{25 * (quarter + 1)}"
        parts |= {name: (loss * inside).mean(), name + SHARE: inside.float().mean()}
    return parts
