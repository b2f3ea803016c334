"""A student of few steps: one pass of it crosses what its teacher crosses in several, with guidance.

Progressive distillation (Salimans and Ho 2022, arXiv:2202.00512) in one stage, of guided models (Meng et al.
2023, arXiv:2210.03142): the student's velocity at the beginning of an interval of its grid is regressed onto
the mean velocity of the teacher's way to the interval's end. Where the interval begins lies on the path of a
clip or, in a share of the steps, where the student itself has come to from noise: there it learns to correct
what it does.

Letters: b clips, c channels, t h w latent sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import seeded
from kinoflow.configs.pretrained import part_folder
from kinoflow.dit_video.backbone import BACKBONES, Backbone
from kinoflow.dit_video.flow.known import Known
from kinoflow.dit_video.flow.matching import perturb
from kinoflow.dit_video.lora import read_adapter
from kinoflow.dit_video.parallel import parallelize
from kinoflow.dit_video.unet import UNet
from kinoflow.sample.generate import Sampling
from kinoflow.sample.guidance import guided_velocity
from kinoflow.sample.known import Reader
from kinoflow.sample.schedule import shifted
from kinoflow.sample.solver import VelocityFn, euler
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.spread import Spread
from kinoflow.train.tasks.flow import FlowBatch, counted_mean, velocity_of


@dataclass(frozen=True, kw_only=True)
class Interval:
    """What a step is about: an interval of the student's grid, how it is reached, and the teacher's way."""

    before: tuple[float, ...]
    """Times of the student's grid up to where it begins."""
    within: tuple[float, ...]
    """Times of the teacher's steps, from there to where it ends."""
    rolled: bool
    """Whether the student itself goes there from noise."""

    @property
    def begin(self) -> float:
        """Where it begins."""
        return self.within[0]

    @property
    def end(self) -> float:
        """Where it ends."""
        return self.within[-1]


def sampling_of(config: RunConfig) -> Sampling:
    """How the student of a run is sampled."""
    choice = config.distill
    return Sampling(guidance_scale=1.0, num_steps=choice.steps, schedule="shifted", shift=choice.shift,
                    path=config.flow.path)  # fmt: skip


class Distillation:
    """The loss of a student beside its teacher, which every process holds whole and frozen."""

    def __init__(self, config: RunConfig, spread: Spread) -> None:
        self._config, choice = config, config.distill
        source = choice.teacher or config.init_from
        assert source is not None, "the configuration asks for it"
        # The teacher's steps lie as the student's do: of as many on the same schedule.
        self._fine: list[float] = shifted(choice.steps * choice.substeps, choice.shift).tolist()
        adapters = [read_adapter(words) for words in choice.adapters]
        kind, kernel = BACKBONES[config.model], getattr(config.backbone, "attention", None)
        teacher: Backbone = kind.from_pretrained(part_folder(source, config.model), kernel, adapters)
        if getattr(config.backbone, "known", False) and not getattr(teacher.config, "known", False):
            line = f"{source} reads nothing that is known of a clip, and its student does"
            raise UserError(f"distill.teacher: {line}; give one that does, or set dit.known=false")
        self.teacher = teacher.to(spread.processes.device, config.deepspeed.low).requires_grad_(False)
        if not isinstance(self.teacher, UNet):
            parallelize(self.teacher, replace(config.parallel, checkpoint_every=0), spread.group)

    def interval(self, step: int) -> Interval:
        """One for the whole batch, from (seed, step) alone: each comes once in as many steps as there are."""
        choice = self._config.distill
        count, each = choice.steps, choice.substeps
        shuffled = np.random.default_rng(seeded("intervals", self._config.seed, step // count))
        at = int(shuffled.permutation(count)[step % count])
        rolled = np.random.default_rng(seeded("rollout", self._config.seed, step)).random() < choice.rollout
        before, within = self._fine[: at * each + 1 : each], self._fine[at * each : (at + 1) * each + 1]
        return Interval(before=tuple(before), within=tuple(within), rolled=bool(rolled) and at > 0)

    def loss(self, student: nn.Module, batch: FlowBatch, step: int) -> tuple[Float[Tensor, " b"], Tensor]:
        """The mean squared error of each clip's velocity, in float32, and the flow time of each.

        Of clips of which something is kept it is the mean over the other places.
        """
        interval = self.interval(step)
        time = batch.time.new_full(batch.time.shape, interval.begin)
        with torch.no_grad():
            x = self._start(student, batch, interval, time)
            target = self.way(x, batch, interval.within)
        error = velocity_of(student, x, time, batch) - target
        return counted_mean(error.float().square(), batch.known), time

    def way(self, x: Tensor, batch: FlowBatch, times: Sequence[float]) -> Float[Tensor, "b c t h w"]:
        """The teacher's mean velocity from the first to the last of the times, by Euler steps, guided."""
        assert batch.null is not None, "the batches of a distillation have it"
        choice, path = self._config.distill, self._config.flow.gaussian_path
        like = next(self.teacher.parameters())
        guided = guided_velocity(
            Reader(self.teacher, batch.known), batch.condition, batch.null, choice.guidance_scale, path=path
        )
        velocity = _keeping(lambda x, t: guided(x.to(like.dtype), t).float(), batch, self._config)
        grid = torch.tensor(times, dtype=torch.float64)
        return (euler(velocity, x, grid) - x) / (times[-1] - times[0])

    def _start(self, student: nn.Module, batch: FlowBatch, interval: Interval, time: Tensor) -> Tensor:
        """x where the interval begins."""
        if not interval.rolled:
            return perturb(batch.latent, batch.noise, time, self._config.flow.gaussian_path).x_t

        def own(x: Tensor, t: Tensor) -> Tensor:
            return velocity_of(student, x, t.expand(len(x)), batch).float()

        grid = torch.tensor(interval.before, dtype=torch.float64)
        return euler(_keeping(own, batch, self._config), batch.noise, grid)


def _keeping(velocity_fn: VelocityFn, batch: FlowBatch, config: RunConfig) -> VelocityFn:
    """The same, with the kept places on the path of the clip."""
    known, path = batch.known, config.flow.gaussian_path
    if not isinstance(known, Known):
        return velocity_fn
    return lambda x, t: known.velocity(velocity_fn(x, t), batch.noise, t.expand(len(x)), path)
