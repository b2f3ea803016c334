"""The three encoders of a prompt: UL2 and MetaCLIP read all of it, ByT5 what it quotes."""

from collections.abc import Collection, Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from kinoflow.conditioning.cache import CachedEncoder
from kinoflow.conditioning.checkpoints import Source, TextConfig, find, fingerprint
from kinoflow.conditioning.embedding import TextEmbedding, TextEncoder
from kinoflow.conditioning.prompt import PromptTexts, prepare

if TYPE_CHECKING:
    from kinoflow.conditioning.encoders import PretrainedEncoder


class PromptEncoder(nn.Module):
    """The three encoders of a prompt (lecture notes, 1.2.2 and 1.3.2).

    Moves with ``.to(device, dtype)`` like every module.

    Args:
        ul2, byt5, metaclip: the encoders of the whole prompt, of the quoted text, of the whole prompt.
    """

    def __init__(self, *, ul2: TextEncoder, byt5: TextEncoder, metaclip: TextEncoder) -> None:
        super().__init__()
        self.ul2, self.byt5, self.metaclip = ul2, byt5, metaclip

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Mapping[str, str | Path],
        *,
        dtype: torch.dtype = torch.float32,
        offload: Collection[str] = (),
        cache: str | Path | None = None,
    ) -> "PromptEncoder":
        """Load the encoders.

        Args:
            source: a folder (or hub id) with ul2/, byt5/ and metaclip/ in it, or a mapping of these three
                names to a folder or hub id each, such as {"ul2": "google/ul2", "byt5": "google/byt5-large",
                "metaclip": "facebook/metaclip-h14-fullcc2.5b"}.
            dtype: of the weights and of the states.
            offload: names of the encoders (ul2, byt5) whose weights stay in main memory.
            cache: a folder that keeps the states of every text. With one, an encoder is loaded when it meets
                the first text that the folder does not know, and not at all when it meets none.

        Raises:
            UserError: a folder that is missing, damaged or another model's; one line that names it.
        """
        sources = find(source)
        if cache is None:
            return cls(**{s.name: _load(s, s.folder(), dtype, s.name in offload) for s in sources})
        cached = {}
        for one in sources:
            folder = one.folder()
            load = partial(_load, one, folder, dtype, one.name in offload)
            cached[one.name] = CachedEncoder(
                name=one.name, identity=fingerprint(folder), dtype=dtype, load=load, cache=Path(cache)
            )
        return cls(**cached)

    @classmethod
    def of_release(
        cls, folder: Path, config: TextConfig, *, cache: str | Path | None = None
    ) -> "PromptEncoder":
        """The encoders that a release names in its kinoflow.yaml, or has in its text/ folder."""
        return cls.from_pretrained(
            config.sources(folder), dtype=config.torch_dtype, offload=config.offload, cache=cache
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the states in the order (ul2, byt5, metaclip)."""
        return tuple(encoder.width for encoder in (self.ul2, self.byt5, self.metaclip))

    @property
    def pooled_widths(self) -> tuple[int, ...]:
        """None of them gives pooled text."""
        return (0, 0, 0)

    def forward(self, prompts: list[str], fps: Fraction) -> tuple[TextEmbedding, ...]:
        """Encode prompts at a frame rate; an empty prompt is the null prompt.

        Returns:
            States in the order (ul2, byt5, metaclip), each ``(b, l, d)`` with its own l and d.

        Raises:
            UserError: a prompt that is not valid text, or a frame rate that is not positive.
            ValueError: no prompts at all.
        """
        if not prompts:
            raise ValueError("prompts: at least one is needed; the null prompt is an empty string")
        return self._encode([prepare(prompt, fps) for prompt in prompts])

    def null(self) -> tuple[TextEmbedding, ...]:
        """The states of the null prompt, a batch of one: what guidance steers away from."""
        return self._encode([PromptTexts(ul2="", byt5="", metaclip="")])

    def _encode(self, texts: list[PromptTexts]) -> tuple[TextEmbedding, ...]:
        return (
            self.ul2([text.ul2 for text in texts]),
            self.byt5([text.byt5 for text in texts]),
            self.metaclip([text.metaclip for text in texts]),
        )


def _load(source: Source, folder: Path, dtype: torch.dtype, offload: bool) -> "PretrainedEncoder":
    # Seconds of imports, which a run that finds every text in its cache does without.
    from kinoflow.conditioning.encoders import load_encoder

    return load_encoder(source, folder, dtype, offload=offload)
