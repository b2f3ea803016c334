"""The frozen parts of a release, as small as they get."""

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch

from kinoflow.conditioning.prompt_encoder import PromptEncoder
from kinoflow.tae.model.config import TAEConfig
from kinoflow.tae.model.tae import TAE
from kinoflow.train.tasks.precompute import Encoders
from tests.conditioning.writing import write_encoders

BUCKET = "8x16x16@16"
# A backbone for the latents and the texts of `write_release`.
DIT = (
    "model=dit", "dit.width=32", "dit.depth=1", "dit.heads=2", "dit.ffn=64", "dit.text_widths=[24,24,16]",
    "dit.latent_channels=2",
)  # fmt: skip
# One of two streams, for their pictures.
STREAMS = (
    "mmdit.width=32", "mmdit.depth=1", "mmdit.heads=2", "mmdit.text_widths=[24,24,16]",
    "mmdit.pooled_width=0", "mmdit.latent_channels=2", "mmdit.patch=2", "mmdit.max_tokens=1",
    "mmdit.dual_attention_layers=[]",
)  # fmt: skip


class Text:
    """One state per letter: its code and the rate."""

    widths = (2, 3)
    pooled_widths = (0, 0)

    def __call__(self, prompts, fps):
        return tuple(self.states(prompts, fps, width) for width in self.widths)

    def null(self):
        return tuple(self.states(["~"], Fraction(0), width) for width in self.widths)

    def states(self, prompts, fps, width):
        longest = max(len(prompt) for prompt in prompts)
        hidden, mask = (
            torch.zeros(len(prompts), longest, width),
            torch.zeros(len(prompts), longest, dtype=torch.bool),
        )
        for i, prompt in enumerate(prompts):
            hidden[i, : len(prompt), 0] = torch.tensor([ord(letter) for letter in prompt])
            hidden[i, : len(prompt), 1] = float(fps)
            mask[i, : len(prompt)] = True
        return SimpleNamespace(hidden=hidden, mask=mask, pooled=None)


def tiny_encoders() -> Encoders:
    """An autoencoder of two latent channels, and texts of letters."""
    torch.manual_seed(0)
    config = TAEConfig(channels=4, multipliers=(1, 1, 1, 1), encoder_blocks=(1, 1, 1, 1),
                       decoder_blocks=(1, 1, 1, 1), latent_channels=2, norm="rms", latent_mean=(0.1, 0.2),
                       latent_std=(2.0, 3.0))  # fmt: skip
    tae = TAE(config)
    tae.init_weights()
    return Encoders(tae=tae.eval(), text=cast(PromptEncoder, Text()), device=torch.device("cpu"))


def write_release(folder: Path) -> Path:
    """The frozen parts of a release: an autoencoder and three text encoders; its folder."""
    tiny_encoders().tae.save_pretrained(folder / "tae")
    write_encoders(folder / "text")
    return folder
