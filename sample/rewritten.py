"""Prompts as a language model words them, of `--rewrite MODEL` and of a Pipeline's `rewrite`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from threading import Lock
from typing import TYPE_CHECKING

from kinoflow.configs.errors import UserError

if TYPE_CHECKING:
    import torch

    from kinoflow.sample.release import Release

KEYS = ("typed", "rewriter")
"""In the metadata of a clip whose prompt was rewritten: what was typed, and the model."""


class RewriteWarning(UserWarning):
    """A prompt stays as it was typed."""


class Prompts:
    """Rewrites prompts for a release; without a model they stay as they are.

    Raises:
        UserError: a release that reads no prompts, or no such model or server.
    """

    def __init__(self, source: str | None, release: Release, device: torch.device | str = "cpu") -> None:
        self._rewriter, self._lock = None, Lock()
        if source is None:
            return
        if release.config.classes:
            raise UserError(f"rewrite: {release.name} reads no prompts; leave it out")
        from kinoflow.conditioning.rewriting import Rewriter, open_model

        model = open_model(source, device=device, key=os.environ.get("OPENAI_API_KEY"))
        known = release.vocabulary
        self._rewriter = Rewriter(model, None if known is None else known.words)

    def __call__(self, prompt: str) -> tuple[str, Mapping[str, str]]:
        """The prompt to be sampled, and what the clip's metadata says of it under `KEYS`.

        Raises:
            UserError: the model gives no prompt.
        """
        if self._rewriter is None or not prompt.strip():
            return prompt, {}
        with self._lock:  # clips are made in threads
            caption, advice = self._rewriter(prompt)
        if advice is not None:
            warnings.warn(advice, RewriteWarning, stacklevel=2)
            return prompt, {}
        return caption, {"typed": prompt, "rewriter": self._rewriter.name}
