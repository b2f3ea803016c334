"""The flow matching loss of a batch, clip by clip, and by the quarters of the flow's times."""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.conditioning.labels import Labels
from kinoflow.data.latents.shards import Batch
from kinoflow.dit_video.flow.known import Known
from kinoflow.dit_video.flow.matching import FlowConfig, perturb
from kinoflow.train.run.log import SHARE
from kinoflow.train.run.task import Parts


@dataclass(frozen=True, kw_only=True)
class FlowBatch:
    """Normalized latents, the noise and times they are mixed at, and their texts or labels.

    `dropout` is the seed of what adapters drop; `known` what a backbone that reads it knows of the clips;
    `null` what stands for no text or label, a row for each clip, where a teacher's guidance asks for it.
    """

    latent: Float[Tensor, "b c t h w"]
    noise: Float[Tensor, "b c t h w"]
    time: Float[Tensor, " b"]
    condition: tuple[TextEmbedding, ...] | Labels
    dropout: Int[Tensor, ""]
    known: Known | None = None
    null: tuple[TextEmbedding, ...] | Labels | None = None


def condition_of(
    clips: Batch, classes: int, dropped: Bool[Tensor, " b"] | None = None
) -> tuple[TextEmbedding, ...] | Labels:
    """What stored clips tell a backbone: their text states or, of so many classes, their labels.

    Labels that are `dropped` become ∅; texts were chosen when they were read.
    """
    if clips.labels is None:
        return tuple(TextEmbedding(hidden=t.hidden, mask=t.mask, pooled=t.pooled) for t in clips.texts)
    labels = Labels(index=clips.labels, classes=classes)
    return labels if dropped is None else labels.without(dropped)


def flow_loss(model: nn.Module, batch: FlowBatch, flow: FlowConfig) -> Float[Tensor, " b"]:
    """The mean squared error of each clip, in float32: of the velocity or of the score (`flow.objective`).

    Movie Gen, equation 3; lecture notes, (1.9) and (1.16), with the conditions dropped in the batch. Of clips
    of which something is kept it is the mean over the other places.
    """
    sample = perturb(batch.latent, batch.noise, batch.time, flow.gaussian_path)
    error = velocity_of(model, sample.x_t, batch.time, batch) - sample.target(flow.objective)
    return counted_mean(error.float().square(), batch.known)


def velocity_of(model: nn.Module, x: Tensor, time: Float[Tensor, " b"], batch: FlowBatch) -> Tensor:
    """What the model gives at (x, time), told all that the batch tells."""
    told = (batch.condition,) if batch.known is None else (batch.condition, batch.known)
    return model(x, time, *told)


def counted_mean(square: Float[Tensor, "b c t h w"], known: Known | None) -> Float[Tensor, " b"]:
    """The mean of each clip, over the places that are not kept."""
    if known is None:
        return square.flatten(1).mean(1)
    counted = (1 - known.kept).expand_as(square)
    return (square * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)


def by_quarter(loss: Float[Tensor, " b"], time: Float[Tensor, " b"]) -> Parts:
    """Figures for the log: the mean loss of the clips in each quarter of the times, and the clips' share."""
    parts: Parts = {}
    for quarter in range(4):
        inside = (time >= quarter / 4) & ((time < (quarter + 1) / 4) | (quarter == 3))
        name = f"loss_{25 * quarter}_{25 * (quarter + 1)}"
        parts |= {name: (loss * inside).mean(), name + SHARE: inside.float().mean()}
    return parts
