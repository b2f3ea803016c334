"""The configuration of the small text encoders' training. Light to import: no models here."""

from dataclasses import dataclass, field, fields

from kinoflow.configs.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape and training of one encoder; the decoder of a T5 has one layer and is thrown away.

    max_tokens is the longest input, end token included, and is kept in the checkpoint.
    """

    width: int = 128
    layers: int = 3
    heads: int = 4
    feed_forward: int = 192
    max_tokens: int = 128
    steps: int = 1000
    batch_size: int = 64
    lr: float = 2e-3

    def __post_init__(self) -> None:
        for each in fields(self):
            if getattr(self, each.name) <= 0:
                raise UserError(f"text.*.{each.name}: {getattr(self, each.name)} must be positive")
        if self.width % self.heads:
            raise UserError(f"text.*.heads: {self.heads} does not divide the width {self.width}")


@dataclass(frozen=True, kw_only=True)
class TextTrainConfig:
    """The three encoders and what they are trained on.

    clips is the number of rendered thumbnails MetaCLIP learns from, merges the size of its byte-pair
    table, probes the number of captions of each split that the linear probes see.
    """

    ul2: EncoderConfig = field(default_factory=EncoderConfig)
    byt5: EncoderConfig = field(
        default_factory=lambda: EncoderConfig(width=96, layers=2, feed_forward=128, max_tokens=64, lr=3e-3)
    )
    metaclip: EncoderConfig = field(
        default_factory=lambda: EncoderConfig(width=96, feed_forward=256, max_tokens=64, batch_size=192)
    )
    clips: int = 16384
    merges: int = 400
    probes: int = 3000

    def __post_init__(self) -> None:
        if self.clips < self.metaclip.batch_size:
            raise UserError(f"text.clips: {self.clips} is less than text.metaclip.batch_size")
        if self.merges < 0 or self.probes < 1:
            raise UserError(f"text.merges, text.probes: {self.merges}, {self.probes} are too small")
