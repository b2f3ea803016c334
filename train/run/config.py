"""The configuration of a training run: dataclass defaults < YAML files < key=value."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from kinoflow.configs.errors import UserError
from kinoflow.dit_video.backbone import BACKBONES, BackboneConfig
from kinoflow.dit_video.flow.known import KnownConfig
from kinoflow.dit_video.flow.matching import FlowConfig
from kinoflow.dit_video.lora import LoRAConfig
from kinoflow.dit_video.mmdit import MMDiTConfig
from kinoflow.dit_video.parallel import ParallelConfig
from kinoflow.dit_video.unet import UNetConfig
from kinoflow.dit_video.video_dit import DiTConfig
from kinoflow.tae.model.config import TAEConfig
from kinoflow.tae.model.grow import Growth
from kinoflow.tae.training.discriminator import DiscriminatorConfig
from kinoflow.tae.training.losses import LossConfig
from kinoflow.train.mini.config import TextTrainConfig


def _at_least(section: str, minimum: float, **values: float) -> None:
    """Raise UserError for the first value below the minimum, naming its key."""
    for key, value in values.items():
        if value < minimum:
            raise UserError(f"{section}{key}: {value} is too small, the least is {minimum}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where clips come from, and how many a step takes.

    The autoencoder takes clips of the manifest, of the toy world, or of both; crop makes them pieces of
    frames, at their full resolution. The backbone takes latents.

    Several lists or folders have a share of each bucket's clips by their weights, among those that have the
    bucket; without weights by the number of their clips.
    """

    manifest: tuple[str, ...] | None = None
    """Clip lists of the autoencoder, 'a.jsonl weight=2'."""
    world_share: float = 0.0
    """Share of the steps that draw the toy world, in [0, 1]; the others take the manifest."""
    crop: int | None = None
    """Pixels of the side of a square cut at random from each clip."""
    latents: tuple[str, ...] | None = None
    """Precomputed folders of the backbone, 'a weight=2'."""
    buckets: tuple[str, ...] | None = None
    """Frames x height x width @ fps; null: the latents'."""
    batch_size: int = 8
    """Clips of one optimizer step, over all ranks and micro-batches."""
    workers: int = 1
    """Processes that decode and draw clips (of latents threads); 0 does it in the loop."""
    clip_seconds: float = 60.0
    """A clip that takes a worker longer is set aside."""

    def __post_init__(self) -> None:
        _at_least("data.", 1, batch_size=self.batch_size)
        _at_least("data.", 0, workers=self.workers)
        _at_least("data.", 0.1, clip_seconds=self.clip_seconds)
        if self.crop is not None:
            _at_least("data.", 8, crop=self.crop)
        if not 0 <= self.world_share <= 1:
            raise UserError(f"data.world_share: {self.world_share} must lie in [0, 1]")
        if 0 < self.world_share < 1 and self.manifest is None:
            raise UserError("data.manifest: name the clip list that data.world_share mixes the world with")
        if self.buckets == ():
            raise UserError("data.buckets: give at least one, for example 16x64x64@16")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """The flow loss of the averaged backbone on clips that it does not learn from.

    Their noise and times are the same at every look, and in every run.
    """

    latents: str | None = None
    """Folder of `kinoflow train precompute`, of other clips."""
    every: int = 0
    """Steps between two looks, a multiple of log_every; 0: none."""
    clips: int = 64
    """Clips that are looked at, evenly over the folder, each at eight times."""

    def __post_init__(self) -> None:
        _at_least("validation.", 0, every=self.every)
        _at_least("validation.", 1, clips=self.clips)
        if (self.latents is None) != (self.every == 0):
            raise UserError("validation: give both latents and every, or neither")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning rate schedule."""

    lr: float = 1e-4
    """Learning rate at its highest."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decays of AdamW's averages, in [0, 1)."""
    eps: float = 1e-8
    """Added to the divisor of AdamW's steps."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    grad_clip: float = 1.0
    """Bound of the global gradient norm; 0 leaves it alone."""
    adaptive_clip: float = 0.0
    """Bound as a multiple of the norm's running mean, where that is less; 0: none."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly to lr."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """The rate after that: it stays or falls."""
    final_fraction: float = 0.0
    """Share of lr that is left at the last step (cosine, linear)."""

    def __post_init__(self) -> None:
        values = {"lr": self.lr, "eps": self.eps, "weight_decay": self.weight_decay,
                  "grad_clip": self.grad_clip, "adaptive_clip": self.adaptive_clip,
                  "warmup_steps": self.warmup_steps, "final_fraction": self.final_fraction}  # fmt: skip
        _at_least("optimizer.", 0, **values)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas: {list(self.betas)} must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """How weights, gradients and optimizer states are spread over ranks (ZeRO).

    bf16 computes in bfloat16: stages 1 to 3 keep the weights in it beside fp32 masters, stage 0 casts fp32
    weights (autocast). fp16 is for GPUs without bf16: its losses are scaled, as far as no gradient overflows.
    Gradients are summed in fp32. With offload: parameters (stage 3) host memory holds the optimizer states as
    well.
    """

    zero_stage: int = 0
    """Shards optimizer states (1), gradients too (2; 1 in bf16), weights too (3)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What is computed in."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What lies in host memory."""
    accumulation: int = 1
    """Micro-batches of one step."""
    persistent: int = 100_000
    """Weights of up to so many elements stay whole on each process under ZeRO-3."""

    def __post_init__(self) -> None:
        _at_least("deepspeed.", 1, accumulation=self.accumulation)
        _at_least("deepspeed.", 0, persistent=self.persistent)
        if self.zero_stage not in (0, 1, 2, 3):
            raise UserError(f"deepspeed.zero_stage: {self.zero_stage} is none of 0, 1, 2, 3")
        if self.precision == "fp16" and self.zero_stage == 0:
            raise UserError("deepspeed.precision: fp16 needs deepspeed.zero_stage 1, 2 or 3")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise UserError("deepspeed.offload: optimizer needs deepspeed.zero_stage 1, 2 or 3")
        if self.offload == "parameters" and self.zero_stage != 3:
            raise UserError("deepspeed.offload: parameters needs deepspeed.zero_stage=3")

    @property
    def low(self) -> torch.dtype:
        """What is computed in."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    @property
    def weights(self) -> torch.dtype:
        """What the weights are in that are computed with: without ZeRO they are their own masters."""
        return self.low if self.zero_stage > 0 else torch.float32


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A student that crosses in one pass, without guidance, what its teacher crosses in several with it."""

    steps: int = 0
    """Steps of the student from noise to a clip; 0: there is none."""
    teacher: str | None = None
    """Folder or hub id of the teacher's release; null: init_from."""
    adapters: tuple[str, ...] = ()
    """LoRA folders that the teacher has."""
    guidance_scale: float = 4.0
    """Of the teacher; 1 for one that needs none."""
    substeps: int = 3
    """Steps of the teacher in each of the student's, on the same schedule."""
    shift: float = 5.0
    """Of the student's steps: above 1 more of them lie near the noise."""
    rollout: float = 0.5
    """Share of the training steps that begin where the student has come to by itself."""

    def __post_init__(self) -> None:
        _at_least("distill.", 0, steps=self.steps, guidance_scale=self.guidance_scale)
        _at_least("distill.", 1, substeps=self.substeps)
        if not 0 <= self.rollout <= 1:
            raise UserError(f"distill.rollout: {self.rollout} must lie in [0, 1]")
        if not 0 < self.shift <= 100:
            raise UserError(f"distill.shift: {self.shift} is not above 0 and up to 100")

    @property
    def passes(self) -> float:
        """Forward passes of a training step beside its own, on average."""
        if not self.steps:
            return 0.0
        guided = 1 if self.guidance_scale == 1 else 2
        return guided * self.substeps + self.rollout * (self.steps - 1) / 2


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run: the same command with the same folder resumes it."""

    model: Literal["tae", "dit", "unet", "mmdit", "text", "judge", "strict", "verifier"] = "tae"
    """What is trained."""
    run: str = ""
    """Folder of the run."""
    steps: int = 1000
    """Optimizer steps."""
    seed: int = 0
    """Another seed, other weights, clips and noise."""
    release: str | None = None
    """Folder of a release that supplies the frozen parts."""
    init_from: str | None = None
    """Folder or hub id of a release to start from."""
    freeze_encoder: bool = False
    """Train only the autoencoder's decoder: latents of before stay valid."""
    grow: Growth = field(default_factory=Growth)
    """Layers added to the autoencoder of init_from."""
    threads: int | None = None
    """CPU threads; null leaves it to torch."""
    tae: TAEConfig = field(default_factory=TAEConfig)
    """The autoencoder."""
    dit: DiTConfig = field(default_factory=DiTConfig)
    """The transformer."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    """The U-Net."""
    mmdit: MMDiTConfig = field(default_factory=MMDiTConfig)
    """The two-stream transformer for pictures."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters of the transformer of init_from."""
    text: TextTrainConfig = field(default_factory=TextTrainConfig)
    """The mini text encoders."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The autoencoder's opponent."""
    data: DataConfig = field(default_factory=DataConfig)
    """The clips."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The autoencoder's loss."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """The backbone's loss."""
    known: KnownConfig = field(default_factory=KnownConfig)
    """What a dit.known is told of its clips."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """A student of few steps."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """ZeRO and precision."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How a transformer is spread, recomputed and compiled."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Held-out clips."""
    ema_decay: float = 0.9999
    """Decay of the average of the weights that is exported, in [0, 1)."""
    log_every: int = 10
    """Steps between two lines of the log."""
    wandb: str | None = None
    """Weights & Biases project that gets the figures as well."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of so many steps are kept for good; 0 keeps none of them."""
    patience: float = 1800.0
    """Seconds after which a run that stands still ends, and says which process is behind."""
    preview_every: int = 0
    """Steps between two previews; 0 makes none."""
    preview_prompts: str | None = None
    """File, a prompt a line, or `world`; null: what the latents hold."""

    def __post_init__(self) -> None:
        _at_least("", 1, steps=self.steps, log_every=self.log_every, checkpoint_every=self.checkpoint_every,
                  keep_checkpoints=self.keep_checkpoints)  # fmt: skip
        _at_least("", 0, preview_every=self.preview_every, keep_every=self.keep_every, seed=self.seed)
        _at_least("", 1, patience=self.patience)
        if self.threads is not None:
            _at_least("", 1, threads=self.threads)
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay: {self.ema_decay} must lie in [0, 1)")
        goes_on = self.model == "tae" and self.init_from is not None
        if self.freeze_encoder and not goes_on:
            raise UserError("freeze_encoder: needs model: tae and an init_from whose encoder is to stay")
        if self.freeze_encoder and self.grow.encoder_blocks:
            raise UserError("grow.encoder_blocks: a frozen encoder stays as it is; leave out freeze_encoder")
        if self.grow != Growth() and not goes_on:
            raise UserError("grow: needs model: tae and an init_from that is to grow")
        if self.lora.rank and (self.model != "dit" or self.init_from is None):
            raise UserError("lora.rank: needs model: dit and an init_from whose weights are to stay")
        if self.model == "dit" and (self.flow.objective, self.dit.predicts) == ("score", "data"):
            raise UserError("flow.objective: a model that predicts data turns them into a velocity, not a "
                            "score; use dit.predicts=velocity, which turns nothing")  # fmt: skip
        if self.known.any and not (self.model == "dit" and self.dit.known):
            raise UserError("known: only model: dit with dit.known=true reads it; set that, or leave it out")
        if self.model == "dit" and self.dit.shown_variance and self.flow.path != "cond_ot":
            raise UserError("dit.shown_variance: a straight path is taken for it; use flow.path=cond_ot")
        self._require_a_teacher()
        if self.validation.every and self.backbone is None:
            line = f"only model: {', '.join(BACKBONES)} are validated, and this run has model:"
            raise UserError(f"validation: {line} {self.model}")
        if self.validation.every % self.log_every:
            raise UserError(f"validation.every: {self.validation.every} is no multiple of "
                            f"log_every={self.log_every}")  # fmt: skip
        self._require_spreadable()
        if self.data.batch_size % self.deepspeed.accumulation:
            raise UserError(f"data.batch_size: {self.data.batch_size} is no multiple of "
                              f"deepspeed.accumulation={self.deepspeed.accumulation}")  # fmt: skip

    def _require_a_teacher(self) -> None:
        if not self.distill.steps:
            return
        if self.backbone is None or self.init_from is None:
            raise UserError("distill.steps: needs a backbone (model: dit) and an init_from to begin as")
        if self.flow.objective != "velocity":
            raise UserError("distill.steps: a student learns velocities; set flow.objective=velocity")
        if self.validation.every:
            raise UserError("validation: the flow loss says nothing of a student of few steps; leave it out")

    @property
    def backbone(self) -> BackboneConfig | None:
        """The shape of the backbone that is trained; None where something else is."""
        return getattr(self, self.model) if self.model in BACKBONES else None

    def _require_spreadable(self) -> None:
        asked, model = self.parallel, self.model
        takes = {
            "sequence": ("dit",),
            "checkpoint_every": ("dit", "mmdit"),
            "compile": ("dit", "mmdit", "tae"),
        }
        for key, models in takes.items():
            if getattr(asked, key) != getattr(ParallelConfig(), key) and model not in models:
                *others, last = models
                only = f"{', '.join(others)} and {last} are" if others else f"{last} is"
                raise UserError(
                    f"parallel.{key}: only model: {only} spread like this, and this run has model: {model}"
                )
