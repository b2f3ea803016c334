"""Class labels: the condition y where it is one of a few classes (lecture notes, section 1.2.2)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kinoflow.configs.errors import UserError

_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The class of each row of a batch: 0 to classes - 1, and `classes` itself for ∅, no class.

    Raises:
        UserError: a label that is none of these.
    """

    index: Int[Tensor, " b"]
    classes: int

    def __post_init__(self) -> None:
        # A GPU would have to be waited for, and what lies there was here before.
        if self.index.device.type == "cpu":
            outside = self.index[(self.index < 0) | (self.index > self.classes)]
            if len(outside):
                first = int(outside[0])
                raise UserError(f"label: {first} is no class of 0..{self.classes - 1}; take one of these")

    def without(self, dropped: Bool[Tensor, " b"]) -> "Labels":
        """∅ in the rows that are dropped: y ← ∅ (lecture notes, 1.7 and 1.10)."""
        return replace(self, index=torch.where(dropped, self.classes, self.index))


class LabelEmbedding(nn.Module):
    """A learned vector for each class, and one more for ∅ (lecture notes, section 1.2.2)."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.weight = nn.Parameter(torch.empty(classes + 1, width))

    def forward(self, labels: Labels) -> Float[Tensor, "b d"]:
        """The rows of the table.

        Raises:
            ValueError: labels of another number of classes, whose ∅ would be a class here.
        """
        if labels.classes != self.classes:
            raise ValueError(f"labels: of {labels.classes} classes, and the model has {self.classes}")
        return nn.functional.embedding(labels.index, self.weight)


class LabelEncoder:
    """Names of classes to labels, as a PromptEncoder makes states of prompts. `names` are in their order."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def __call__(self, prompts: list[str], fps: Fraction | None = None) -> Labels:  # noqa: ARG002
        """The labels of classes, each by its name or by its number; a name goes first. Of any frame rate.

        Raises:
            UserError: no such class.
        """
        return Labels(index=torch.tensor([self._index(label) for label in prompts]), classes=len(self.names))

    def null(self) -> Labels:
        """∅, a batch of one: what guidance steers away from."""
        return Labels(index=torch.tensor([len(self.names)]), classes=len(self.names))

    def name(self, label: str) -> str:
        """What a class is called that its name or its number stands for.

        Raises:
            UserError: no such class.
        """
        return self.names[self._index(label)]

    def known(self) -> str:
        """The names, for messages; of many the first."""
        return ", ".join(self.names[:_SHOWN]) + (", …" if len(self.names) > _SHOWN else "")

    def _index(self, label: str) -> int:
        label = label.strip()
        if label in self.names:
            return self.names.index(label)
        if label.isascii() and label.isdigit() and int(label) < len(self.names):
            return int(label)
        raise UserError(f"label: {label!r} is no class; name one of {self.known()}, or give its number, "
                        f"0 to {len(self.names) - 1}")  # fmt: skip
