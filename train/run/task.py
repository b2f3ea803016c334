"""What the shared loop asks of a thing that can be trained."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from kinoflow.train.run.averages import AveragedState
    from kinoflow.train.run.processes import Processes
    from kinoflow.train.run.spread import Spread

Parts = dict[str, float | Tensor]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What a loss gives: the scalar to minimize (a mean over the slice) and the figures to log.

    output is what the discriminator is to judge, cut from the graph; None where there is none.
    """

    total: Float[Tensor, ""]
    parts: Parts = field(default_factory=dict)
    output: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Base:
    """Frozen parameters that `Task.prepare` gives the same values at every start.

    A checkpoint leaves them out, and goes on only where `fingerprint` is what it was.
    """

    names: frozenset[str]
    fingerprint: str


class Task(Protocol):
    """One kind of training. All randomness follows from (seed, step, position): no global state.

    A batch is a Tensor, or a dataclass of Tensors, tuples and such dataclasses. The loop calls `batch` from
    background threads.
    """

    @property
    def model(self) -> nn.Module:
        """What the loop trains."""
        ...

    @property
    def discriminator(self) -> nn.Module | None:
        """Trained by its own optimizer; None without an adversarial term."""
        ...

    def prepare(self, spread: "Spread") -> None:
        """Get the model ready: spread over processes, compiled, with its values; and refuse what cannot run.

        Every process calls it once, before DeepSpeed wraps the model. An export does without.
        """
        ...

    @property
    def base(self) -> Base | None:
        """What checkpoints need not hold; None where they hold all."""
        ...

    @property
    def source(self) -> str:
        """A name for the clips it learns from, equal only while they are: a resumed run needs the same."""
        ...

    def names(self, step: int, index: int, slices: int) -> list[str]:
        """The clips of `batch`, in words that let a person find them."""
        ...

    def batch(self, step: int, index: int, slices: int) -> Any:
        """Slice `index` of the `slices` equal slices of the global batch of this step."""
        ...

    def loss(self, model: nn.Module, batch: Any, step: int) -> Loss:
        """The loss of a slice, with what a discriminator is to judge.

        The discriminator's parameters are frozen while this runs, so an adversarial term may call it.
        """
        ...

    def discriminator_loss(
        self, discriminator: nn.Module, batch: Any, output: Tensor | None, step: int
    ) -> Loss | None:
        """The discriminator's own loss on the output of `loss` of the same batch; None while it rests.

        Whether it rests may depend on the step alone. Never called when `discriminator` is None.
        """
        ...

    def preview(self, model: nn.Module, folder: Path, step: int, processes: "Processes") -> None:
        """Write samples into the folder, which is there. The model carries the averaged weights.

        Every process calls it; under ZeRO-3 all must compute as often.
        """
        ...

    def validate(self, model: nn.Module, processes: "Processes") -> Parts:
        """Figures of held-out clips, equal on every process; none where a task has none.

        As `preview` in all else; called every `validation.every` steps.
        """
        ...

    def close(self) -> None:
        """Let go of what makes batches; the run is over."""
        ...

    def samples(self, batch: Any) -> int:
        """The number of clips in this batch; buckets may differ in it."""
        ...

    def tokens(self, batch: Any) -> int:
        """The number of tokens (or latent positions) the model sees in this batch."""
        ...

    def flops(self, batch: Any) -> float:
        """Forward and backward of the batch, which the log turns into MFU; 0 where nobody counts them."""
        ...

    def export(self, state: "AveragedState", folder: Path) -> None:
        """Write this model's part of a release folder from the averages of a checkpoint."""
        ...
