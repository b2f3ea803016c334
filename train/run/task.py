"""What the shared loop asks of a thing that can be trained."""

from pathlib import Path
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor, nn

Parts = dict[str, float | Tensor]


class Task(Protocol):
    """One kind of training. All randomness follows from (seed, step, position): no global state.

    A batch is a Tensor or an object with `.to(device)`. The loop calls `batch` from background threads. A
    task may also have `flops(batch) -> float`, forward and backward, which the log turns into MFU, and
    `samples(batch) -> int` where buckets differ in their batch size.
    """

    @property
    def model(self) -> nn.Module:
        """What the loop trains."""
        ...

    @property
    def discriminator(self) -> nn.Module | None:
        """Trained by its own optimizer; None without an adversarial term."""
        ...

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        """Slice `rank` of `world_size` equal slices of the global batch of this step."""
        ...

    def loss(self, model: nn.Module, batch: Any, step: int) -> tuple[Float[Tensor, ""], Parts]:
        """The scalar to minimize (a mean over the slice) and the figures to log.

        The discriminator's parameters are frozen while this runs, so an adversarial term may call it.
        """
        ...

    def discriminator_loss(
        self, discriminator: nn.Module, batch: Any, step: int
    ) -> tuple[Float[Tensor, ""], Parts] | None:
        """The discriminator's own loss right after `loss` of the same step; None while it rests.

        Whether it rests may depend on the step alone. Never called when `discriminator` is None.
        """
        ...

    def preview(self, model: nn.Module, folder: Path, step: int) -> None:
        """Write samples into the folder. The model carries the averaged weights."""
        ...

    def tokens(self, batch: Any) -> int:
        """The number of tokens (or latent positions) the model sees in this batch."""
        ...

    def export(self, state: dict[str, Tensor], folder: Path) -> None:
        """Write this model's part of a release folder from an averaged fp32 state dict."""
        ...
