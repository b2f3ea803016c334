"""The keys of `kinoflow train plan`: those of a training run, and the cluster that it is meant for."""

from dataclasses import dataclass, field

from kinoflow.configs.errors import UserError
from kinoflow.train.plan.memory import GIB, Offload, Precision, Sharding
from kinoflow.train.run.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The cluster, of H100 SXM by default, and what is assumed about a run on it."""

    gpus: int = 8
    """GPUs of the whole cluster."""
    gpus_per_node: int = 8
    """GPUs that share a node's fast links."""
    memory_gib: float = 79.6
    """What one GPU has, in GiB."""
    reserve_gib: float = 6.0
    """What the plan leaves free of it, in GiB: CUDA, NCCL, fragments."""
    peak_tflops: float = 989.0
    """Dense peak of one GPU in the run's precision, in TFLOP/s."""
    mfu: float = 0.4
    """Share of the peak that the model's own FLOPs reach, in (0, 1]."""

    def __post_init__(self) -> None:
        for key in ("gpus", "gpus_per_node", "memory_gib", "peak_tflops"):
            if not getattr(self, key) > 0:
                raise UserError(f"cluster.{key}: {getattr(self, key)} must be positive")
        if not 0 <= self.reserve_gib < self.memory_gib:
            raise UserError(f"cluster.reserve_gib: {self.reserve_gib} must lie in [0, memory_gib)")
        if not 0 < self.mfu <= 1:
            raise UserError(f"cluster.mfu: {self.mfu} must lie in (0, 1]; 40 % is 0.4")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(RunConfig):
    """A training run and the cluster it is meant for."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The cluster."""


@dataclass(frozen=True, kw_only=True)
class PlanInputs:
    """All that the figures follow from, beside the model and its clips. Bytes, FLOP/s."""

    gpus: int
    gpus_per_node: int
    memory: float
    reserve: float
    peak_flops: float
    mfu: float
    zero_stage: int
    precision: Precision
    offload: Offload
    accumulation: int
    sequence: int
    checkpoint_every: int
    steps: int

    @property
    def budget(self) -> float:
        """Bytes of a GPU that the run may use."""
        return self.memory - self.reserve

    @property
    def slices(self) -> int:
        """Pieces that a global batch is cut into: groups of ranks that share a clip, times micro-batches."""
        return max(self.gpus // self.sequence, 1) * self.accumulation

    @property
    def sharding(self) -> Sharding:
        """States are spread over all GPUs, for those that share a clip see different tokens of it."""
        return Sharding(
            zero_stage=self.zero_stage, precision=self.precision, offload=self.offload, ranks=self.gpus
        )

    def micro_batch(self, batch_size: int) -> int:
        """Clips that one group of ranks has in flight."""
        return -(-batch_size // self.slices)


def read_inputs(config: PlanConfig) -> PlanInputs:
    """What a run and its cluster say, in the planner's units."""
    cluster, choice = config.cluster, config.deepspeed
    return PlanInputs(
        gpus=cluster.gpus,
        gpus_per_node=cluster.gpus_per_node,
        memory=cluster.memory_gib * GIB,
        reserve=cluster.reserve_gib * GIB,
        peak_flops=cluster.peak_tflops * 1e12,
        mfu=cluster.mfu,
        zero_stage=choice.zero_stage,
        precision=choice.precision,
        offload=choice.offload,
        accumulation=choice.accumulation,
        sequence=config.parallel.sequence,
        checkpoint_every=config.parallel.checkpoint_every,
        steps=config.steps,
    )
