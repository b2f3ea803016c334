"""The configuration of the small text encoders' training. Light to import: no models here."""

from dataclasses import dataclass, field, fields

from kinoflow.configs.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape and training of one encoder; the decoder of a T5 has one layer and is thrown away."""

    width: int = 128
    """Width of the states."""
    layers: int = 3
    """Layers of the encoder."""
    heads: int = 4
    """Attention heads; they divide the width."""
    feed_forward: int = 192
    """Hidden width of the feed-forward layers."""
    max_tokens: int = 128
    """Longest input, end token included; kept in the checkpoint."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 64
    """Captions of a step."""
    lr: float = 2e-3
    """Learning rate at its highest."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if getattr(self, each.name) <= 0:
                raise UserError(f"{each.name}: {getattr(self, each.name)} must be positive")
        if self.width % self.heads:
            raise UserError(f"heads: {self.heads} does not divide the width {self.width}")


@dataclass(frozen=True, kw_only=True)
class TextTrainConfig:
    """The three mini text encoders and what they are trained on."""

    ul2: EncoderConfig = field(default_factory=EncoderConfig)
    """Words and their order."""
    byt5: EncoderConfig = field(
        default_factory=lambda: EncoderConfig(width=96, layers=2, feed_forward=128, max_tokens=64, lr=3e-3)
    )
    """Letters."""
    metaclip: EncoderConfig = field(
        default_factory=lambda: EncoderConfig(width=96, feed_forward=256, max_tokens=64, batch_size=192)
    )
    """What things look like."""
    clips: int = 16384
    """Rendered thumbnails that MetaCLIP learns from."""
    merges: int = 400
    """Size of MetaCLIP's byte-pair table."""
    probes: int = 3000
    """Captions of each split that the linear probes see."""

    def __post_init__(self) -> None:
        if self.clips < self.metaclip.batch_size:
            raise UserError(f"text.clips: {self.clips} is less than text.metaclip.batch_size")
        if self.merges < 0 or self.probes < 1:
            raise UserError(f"text.merges, text.probes: {self.merges}, {self.probes} are too small")
