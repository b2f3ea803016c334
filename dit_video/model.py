"""What every backbone is beside its layers: starting values by name, and a model folder."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kinoflow.configs.pretrained import Read, load_pretrained, load_state, save_pretrained
from kinoflow.dit_video.attention.kernels import KernelName
from kinoflow.dit_video.lora import Adapter, Merged

M = TypeVar("M", bound="Model")


class Model(nn.Module):
    """A module that is built from its `config`, a `config_type`, and from nothing else."""

    config_type: ClassVar[type[Any]]
    config: Any

    @abstractmethod
    def init_parameter(self, name: str, value: Float[Tensor, "..."]) -> None:
        """Write the starting value of the parameter of this name, whole.

        It follows from torch's seed and the name alone, whatever else was drawn: a model made in pieces on
        many processes starts as one made in one place.
        """

    def init_weights(self) -> None:
        """Every starting value. Residual branches and the head start at zero, and so does the velocity."""
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter)

    @classmethod
    def from_pretrained(
        cls: type[M],
        source: str | Path,
        attention: KernelName | None = None,
        adapters: Sequence[Adapter] = (),
    ) -> M:
        """Read a model folder or hub id; fp32, in evaluation mode, with its own kernel unless one is given.

        The weights have `adapters` added.

        Raises:
            UserError: a missing or damaged file, or an adapter of another model.
            UserError: a kernel that cannot run here.
        """
        config, state = load_pretrained(source, cls.config_type)
        with torch.device("meta"):
            model = cls(replace(config, attention=attention or config.attention))
        load_state(model, Merged(state, adapters), source)
        return model.eval()

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, read: Read | None = None
    ) -> None:
        """Write config.json and safetensors weights into `folder`.

        A model on the meta device stands for the values that `read` gives, some at a time.
        """
        save_pretrained(folder, config=self.config, state=self.state_dict(), read=read, dtype=dtype)
