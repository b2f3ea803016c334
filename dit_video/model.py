"""VideoDiT, the backbone of Movie Gen (section 3.1.3): embed, trunk, head.

Letters: b batch, c channels, t h w latent sizes, l sequence, d model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from conditioning.embedding import TextEmbedding
from configs.pretrained import load_pretrained, load_state, save_pretrained
from dit_video.attention import KERNELS, KernelName
from dit_video.flow import velocity_from_data
from dit_video.layers import Block, FactorizedPositions, KeysValues, RMSNorm, TimeEmbedding


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of a backbone.

    `text_widths`: widths of the text encoders' states in the order (UL2, ByT5, MetaCLIP). `max_tokens`: sizes
    of the position tables in tokens (time, height, width). `patch_size`: latent cells in a token. `predicts`
    says what the head gives: the velocity, or the data, from which the velocity follows (Li and He 2025,
    arXiv:2511.13720): then a patch of more values than the width has room for need not carry its noise along.
    """

    width: int = 256
    depth: int = 6
    heads: int = 4
    ffn: int = 704
    latent_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_widths: tuple[int, ...] = (128, 96, 128)
    max_tokens: tuple[int, int, int] = (4, 8, 8)
    qk_norm: bool = True
    predicts: Literal["velocity", "data"] = "velocity"
    attention: KernelName = "sdpa"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"dit.heads: {self.heads} heads do not divide the width {self.width}")
        if min(self.width, self.depth, self.heads, self.ffn, *self.patch_size, *self.max_tokens) < 1:
            raise ValueError("dit: width, depth, heads, ffn, patch_size and max_tokens are at least 1")


@dataclass(frozen=True, kw_only=True)
class TextContext:
    """Keys and values of the text in every layer: computed once a prompt, used at each sampling step."""

    keys_values: tuple[KeysValues, ...]
    mask: Bool[Tensor, "b l"]


class VideoDiT(nn.Module):
    """Velocity of the flow at (latent, time) given text. Full attention over space and time."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        d = config.width
        patch = config.latent_channels * config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        kernel = KERNELS[config.attention]
        # A convolution whose stride is its kernel is a linear map of each patch.
        self.embed = nn.Linear(patch, d)
        self.positions = FactorizedPositions(d, config.max_tokens)
        self.time = TimeEmbedding(d)
        self.modulation = nn.Linear(d, 6 * d)
        self.text = nn.ModuleList(nn.Sequential(nn.Linear(w, d), nn.LayerNorm(d)) for w in config.text_widths)
        self.blocks = nn.ModuleList(
            Block(d, config.heads, config.ffn, config.qk_norm, kernel) for _ in range(config.depth)
        )
        self.head_norm = RMSNorm(d, gain=False)
        self.head_modulation = nn.Linear(d, 2 * d)
        self.head = nn.Linear(d, patch)

    def init_weights(self) -> None:
        """Every starting value. Residual branches and the head start at zero, and so does the velocity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm) and module.weight is not None:
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for block in self._blocks:
            nn.init.zeros_(block.modulation_bias)
            nn.init.zeros_(block.cross_attention.out.weight)
        for table in self.positions.parameters():
            nn.init.normal_(table, std=0.02)
        for linear in (self.modulation, self.head_modulation, self.head):
            nn.init.zeros_(linear.weight)

    def encode_text(self, text: Sequence[TextEmbedding]) -> TextContext:
        """Project each encoder's states to the width, join them along the sequence, take keys and values."""
        if len(text) != len(self.text):
            raise ValueError(f"text: {len(text)} embeddings for {len(self.text)} encoders")
        states = torch.cat([project(e.hidden) for project, e in zip(self.text, text, strict=True)], dim=1)
        mask = torch.cat([e.mask for e in text], dim=1)
        return TextContext(
            keys_values=tuple(block.cross_attention.keys_values(states) for block in self._blocks), mask=mask
        )

    def forward(
        self,
        latent: Float[Tensor, "b c t h w"],
        time: Float[Tensor, " b"],
        text: Sequence[TextEmbedding] | TextContext,
    ) -> Float[Tensor, "b c t h w"]:
        """Velocity at flow time `time` in [0, 1] (0 noise, 1 data); `latent` is normalized.

        Raises:
            ValueError: sides that the patch does not divide or that the position tables do not hold.
        """
        context = text if isinstance(text, TextContext) else self.encode_text(text)
        t, h, w = self.grid(*latent.shape[2:])
        condition = nn.functional.silu(self.time(time))
        modulation = rearrange(self.modulation(condition), "b (six d) -> b six d", six=6)
        positions = self.positions(t, h, w)
        x = self.embed(self._patchify(latent))
        for block, keys_values in zip(self.blocks, context.keys_values, strict=True):
            x = block(x, positions, modulation, keys_values, context.mask)
        shift, scale = self.head_modulation(condition)[:, None].chunk(2, dim=-1)
        output = self._unpatchify(self.head(self.head_norm(x) * (1 + scale) + shift), t, h, w)
        return output if self.config.predicts == "velocity" else velocity_from_data(output, latent, time)

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens along time, height and width of a latent of these sizes."""
        sizes = tuple(
            zip(("frames", "height", "width"), (frames, height, width), self.config.patch_size, strict=True)
        )
        for axis, size, patch in sizes:
            if size % patch:
                raise ValueError(f"latent {axis}: {size} does not divide into patches of {patch}")
        t, h, w = (size // patch for _, size, patch in sizes)
        return t, h, w

    def _patchify(self, latent: Tensor) -> Float[Tensor, "b l p"]:
        pt, ph, pw = self.config.patch_size
        return rearrange(latent, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)

    def _unpatchify(self, tokens: Tensor, t: int, h: int, w: int) -> Float[Tensor, "b c t h w"]:
        pt, ph, pw = self.config.patch_size
        return rearrange(
            tokens, "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw
        )

    @property
    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "VideoDiT":
        """Read a model folder or hub id; fp32, in evaluation mode.

        Raises:
            configs.pretrained.PretrainedError: a missing or damaged file.
        """
        config, state = load_pretrained(source, DiTConfig)
        with torch.device("meta"):
            model = cls(config)
        load_state(model, state, source)
        return model.eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and safetensors weights into `folder`."""
        save_pretrained(folder, config=self.config, state=self.state_dict(), dtype=dtype)
