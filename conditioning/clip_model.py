"""A CLIP or SigLIP of transformers, both towers: how well pictures and texts agree."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from kinoflow.configs.errors import UserError, one_line
from kinoflow.configs.files import folder_fingerprint
from kinoflow.configs.pretrained import resolve_folder

if TYPE_CHECKING:
    from PIL.Image import Image

_READ = ["*.json", "*.txt", "*.model", "*.safetensors"]


class ClipModel:
    """A CLIP-like model, on the GPU where there is one; asked by one thread at a time.

    Args:
        source: a folder or hub id.
        called: the key that named it, for messages.

    Raises:
        UserError: no such folder or hub id, or one that holds no such model.
    """

    def __init__(self, source: str, called: str = "clip.model") -> None:
        from safetensors import SafetensorError
        from transformers import AutoModel, AutoProcessor

        from kinoflow.configs.devices import parse_device

        folder = resolve_folder(source, _READ)
        self.name = Path(source).name if Path(source).is_dir() else source
        self.key = folder_fingerprint(folder)
        try:
            self._processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModel.from_pretrained(folder, dtype="auto", local_files_only=True)
            self._tokens = int(model.config.text_config.max_position_embeddings)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError,
                SafetensorError) as error:  # fmt: skip
            said = f"{called}: {source}: holds no CLIP-like model that can be read ({one_line(error)})"
            raise UserError(f"{said}; give its folder or hub id") from error
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise UserError(f"{called}: {source}: is no CLIP-like model; give a CLIP or a SigLIP")
        self._model, self._one_at_a_time = model.to(parse_device("auto")).eval(), threading.Lock()

    def pictures(self, shown: Sequence[Image]) -> Float[np.ndarray, "pictures d"]:
        """Unit embeddings of RGB pictures."""
        return self._unit("get_image_features", self._processor(images=list(shown), return_tensors="pt"))

    def text(self, text: str) -> Float[np.ndarray, " d"]:
        """Unit embedding of a text, of which the model reads no more than it has places for."""
        tokens = self._processor(text=[text], padding="max_length", truncation=True,
                                 max_length=self._tokens, return_tensors="pt")  # fmt: skip
        return self._unit("get_text_features", tokens)[0]

    def _unit(self, what: str, given: Any) -> np.ndarray:
        import torch

        with self._one_at_a_time, torch.no_grad():
            found: torch.Tensor = getattr(self._model, what)(
                **given.to(self._model.device, self._model.dtype)
            )
        found = getattr(found, "pooler_output", found).float()
        return torch.nn.functional.normalize(found, dim=-1).cpu().numpy()
