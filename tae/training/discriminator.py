"""A patch discriminator over space and time (after Isola et al. 2017, in 3D)."""

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Shape of the patch discriminator."""

    channels: int = 64
    """Width of the first layer."""
    depth: int = 3
    """Layers; each halves height and width and doubles the channels."""

    def __post_init__(self) -> None:
        if self.channels < 1 or self.depth < 1:
            raise ValueError("discriminator: channels and depth are at least 1")


class PatchDiscriminator(nn.Module):
    """A score for every space-time patch; no statistics are shared between clips of a batch."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        widths = [3, *(config.channels * 2**i for i in range(config.depth))]
        self.layers = nn.ModuleList(
            nn.Conv3d(a, b, (3, 4, 4), stride=(1, 2, 2), padding=1) for a, b in pairwise(widths)
        )
        self.norms = nn.ModuleList(
            nn.Identity() if i == 0 else nn.GroupNorm(1, width) for i, width in enumerate(widths[1:])
        )
        self.head = nn.Conv3d(widths[-1], 1, 3, padding=1)

    def init_weights(self) -> None:
        """Give every parameter its starting value."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.GroupNorm):
                module.reset_parameters()

    def forward(self, video: Float[Tensor, "b 3 frames height width"]) -> Float[Tensor, "b 1 frames h w"]:
        """Scores, high for real; `video` in [-1, 1]."""
        x = video
        for conv, norm in zip(self.layers, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return self.head(x)
