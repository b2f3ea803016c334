"""`kinoflow train plan`: memory, FLOPs and days of a run before a cluster is rented.

Movie Gen's sharding was planned analytically as well. What is computed follows from formulas and from the
model built without memory; what is assumed stands in `ClusterConfig`.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any

from kinoflow.configs.errors import UserError
from kinoflow.train.plan.config import PlanConfig, PlanInputs, read_inputs
from kinoflow.train.plan.flops import Flops, total
from kinoflow.train.plan.memory import States, zero_states
from kinoflow.train.plan.mmdit import MMDiTWorkload, released_encoders
from kinoflow.train.plan.text import EncoderSize, encoder_sizes
from kinoflow.train.plan.workload import Clip, DiTWorkload, TAEWorkload, Workload, divisors

DAY = 86_400
LARGEST_CLUSTER = 2**17


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak bytes of one GPU by kind; `host` is what lies in host memory for each of them."""

    kinds: dict[str, float]
    host: float
    clip: str

    @property
    def peak(self) -> float:
        return sum(self.kinds.values())


class Planner:
    """One model on clusters of any size."""

    def __init__(self, config: PlanConfig) -> None:
        """Raises UserError for a model without a plan, and for buckets or text widths that cannot be."""
        self.config = config
        self.inputs = read_inputs(config)
        self.encoders: tuple[EncoderSize, ...] = ()
        self.work: Workload
        if config.model == "dit":
            release = Path(config.release) if config.release else None
            if not config.dit.classes:
                self.encoders = encoder_sizes(config.dit.text_widths, release)
            self.work = DiTWorkload(config, [encoder.tokens for encoder in self.encoders])
        elif config.model == "mmdit":
            self.work = self._mmdit(config)
        elif config.model == "tae":
            self.work = TAEWorkload(config)
        else:
            raise UserError(f"model: {config.model} needs no cluster; the planner takes dit, mmdit and tae")

    def _mmdit(self, config: PlanConfig) -> MMDiTWorkload:
        """Of Stable Diffusion 3's encoders the towers' tokens are one text, and T5's follow in it."""
        self.encoders = released_encoders(config.mmdit)
        if self.encoders:
            _, tower, sentence = (encoder.tokens for encoder in self.encoders)
            return MMDiTWorkload(config, [tower + sentence])
        self.encoders = encoder_sizes(
            config.mmdit.text_widths, Path(config.release) if config.release else None
        )
        return MMDiTWorkload(config, [encoder.tokens for encoder in self.encoders])

    def memory(self, inputs: PlanInputs) -> Memory:
        """The peak of one GPU, for the bucket that needs most."""
        states = [zero_states(sizes, inputs.sharding) for sizes in self.work.sizes]
        return max(
            (self._memory_of(clip, inputs, states) for clip in self.work.clips),
            key=lambda memory: memory.peak,
        )

    def _memory_of(self, clip: Clip, inputs: PlanInputs, states: list[States]) -> Memory:
        def over_modules(kind: str) -> float:
            return sum(getattr(state, kind) for state in states)

        activations = self.work.activations(clip, inputs)
        held = ("parameters", "gradients", "optimizer", "ema", "communication")
        kinds = {kind: over_modules(kind) for kind in held}
        kinds["activations"] = activations.saved
        # The optimizer's own buffer comes when the activations are gone.
        kinds["workspace"] = max(activations.workspace, over_modules("step") - activations.saved)
        return Memory(kinds=kinds, host=over_modules("host"), clip=clip.name)

    def precomputation(self, inputs: PlanInputs) -> dict[str, float]:
        """What the text costs before training, which reads its states; nothing for a model without text.

        Bytes of the bf16 weights on each GPU, and of the fp16 states of the longest prompt on the disk;
        FLOPs of that prompt, and GPU hours of a million at the MFU that is assumed.
        """
        if not self.encoders:
            return {}
        prompt = sum(encoder.flops for encoder in self.encoders)
        return {
            "weights": sum(2 * encoder.parameters for encoder in self.encoders),
            "prompt_flops": prompt,
            "prompt_states": sum(2 * encoder.tokens * encoder.width for encoder in self.encoders),
            "gpu_hours_per_million": 1e6 * prompt / (inputs.peak_flops * inputs.mfu) / 3600,
        }

    def flops(self, inputs: PlanInputs) -> dict[str, Any]:
        """FLOPs by part of one clip of each bucket, and of one step: the mean over the buckets' shares."""
        clips = {clip.name: self.work.flops(clip) for clip in self.work.clips}
        step = Flops(forward=0.0, backward=0.0)
        tokens = 0.0
        for clip in self.work.clips:
            weight = clip.share * clip.batch_size
            step = step + total(clips[clip.name]).times(weight)
            tokens += weight * clip.tokens
        depth, every = self.work.depth, inputs.checkpoint_every
        recomputed = step.recomputed * -(-depth // every) / depth if every else 0.0
        fused = step.fused_attention if self.work.fuses_attention else 0.0
        per_step = {
            "forward": step.forward,
            "backward": step.backward,
            "model": step.model,
            "recomputation": recomputed,
            "fused_attention": fused,
            "hardware": step.model + recomputed + fused,
        }
        per_token = {key: value / tokens for key, value in per_step.items()}
        per_clip = {
            name: {part: asdict(flops) for part, flops in parts.items()} for name, parts in clips.items()
        }
        return {"per_clip": per_clip, "per_step": per_step, "per_token": per_token, "tokens_per_step": tokens}

    def time(self, inputs: PlanInputs, flops: dict[str, Any]) -> dict[str, float]:
        """Seconds of a step from the assumed MFU; what the GPUs really do then is the hardware's share."""
        speed = inputs.gpus * inputs.peak_flops * inputs.mfu
        seconds = flops["per_step"]["model"] / speed
        return {
            "step_seconds": seconds,
            "tokens_per_second": flops["tokens_per_step"] / seconds,
            "days": inputs.steps * seconds / DAY,
            "gpu_hours": inputs.steps * seconds * inputs.gpus / 3600,
            "mfu": inputs.mfu,
            "hardware_utilization": inputs.mfu * flops["per_step"]["hardware"] / flops["per_step"]["model"],
        }

    def smallest(self, settings: list[PlanInputs]) -> dict[str, Any] | None:
        """The fewest GPUs, in whole nodes beyond one, on which one of the settings fits; the first if equal.

        A smaller cluster takes more micro-batches of one clip, so that the batch stays the batch.
        """
        best: PlanInputs | None = None
        for setting in settings:
            most = LARGEST_CLUSTER if best is None else best.gpus - 1
            for candidate in self._clusters(setting, most):
                if self.fits(candidate):
                    best = candidate
                    break
        if best is None:
            return None
        keys = ("gpus", "zero_stage", "sequence", "checkpoint_every", "offload", "accumulation")
        days = self.time(best, self.flops(best))["days"]
        found = {key: getattr(best, key) for key in keys}
        return {**found, "peak": self.memory(best).peak, "days": days}

    def fits(self, inputs: PlanInputs) -> bool:
        return self.memory(inputs).peak <= inputs.budget

    @property
    def common_batch(self) -> int:
        """The largest number of slices that divides the batch of every bucket."""
        return gcd(*(clip.batch_size for clip in self.work.clips))

    def _clusters(self, setting: PlanInputs, most: int) -> Iterator[PlanInputs]:
        """Clusters that divide the batch into single clips, small ones first."""
        batch = self.common_batch
        node, degree = setting.gpus_per_node, setting.sequence
        for groups in divisors(batch):
            gpus = groups * degree
            if gpus <= most and not (gpus % node if gpus > node else node % gpus):
                yield replace(setting, gpus=gpus, accumulation=batch // groups)

    def settings(self) -> list[PlanInputs]:
        """Ways to run the same training: what computes least again, and talks least, first."""
        base = replace(self.inputs, offload="none")
        stages = [stage for stage in range(4) if stage or base.precision == "fp32"]
        return [
            replace(base, checkpoint_every=every, zero_stage=stage, sequence=degree)
            for every in ((0, 4, 2, 1) if self.work.depth else (0,))
            for stage in stages
            for degree in self.work.splits
        ]
