"""U-Net: convolutions that shrink a picture and grow it again, with connections across.

Ronneberger et al. 2015 (arXiv:1505.04597); lecture notes, section 1.2.1 and figure 3. How t and y enter is
their section 1.2.2.

Letters: b batch, c channels, h w sides of the picture or latent, l sequence, d width of the embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kinoflow.conditioning.embedding import Condition, TextEmbedding
from kinoflow.conditioning.labels import LabelEmbedding, Labels
from kinoflow.configs.files import seeded
from kinoflow.dit_video.attention.kernels import Kernel, choose
from kinoflow.dit_video.layers import CrossAttention, SelfAttention, sinusoids
from kinoflow.dit_video.model import Model

# Where a branch joins the stream: zero at the start, so that the branch is not there and the velocity is 0.
_CLOSED = ("conv2.weight", "attention.out.weight", "cross_attention.out.weight", "head.weight")


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of a U-Net. It takes labels, or with classes: 0 text, which attention reads."""

    latent_channels: int = 1
    """Channels of the latent, or of the pixels: 1 grey, 3 RGB."""
    channels: tuple[int, ...] = (32, 64, 128)
    """Channels of each level, finest first; each has half the sides of the one before."""
    layers: int = 2
    """Residual layers of each encoder, of the midcoder and of each decoder."""
    width: int = 128
    """Fourier features of the time, and width of the embedding of y."""
    classes: int = 10
    """Classes of the labels; 0: text."""
    text_widths: tuple[int, ...] = ()
    """Widths of the text encoders' states."""
    attention_levels: tuple[int, ...] = ()
    """Levels with attention, 0 the finest."""
    heads: int = 4
    """Attention heads; they divide the channels of those levels."""
    groups: int = 8
    """Groups of the norms; they divide the channels."""
    attention: Literal["math", "sdpa"] = "sdpa"
    """How attention is computed."""

    def __post_init__(self) -> None:
        if not self.channels or min(*self.channels, self.layers, self.heads, self.groups, 2) < 1:
            raise ValueError("unet: channels, layers, heads and groups are at least 1, and there is a level")
        if self.width < 2 or self.width % 2:
            raise ValueError(f"unet.width: {self.width} is no even number of at least 2")
        odd = [size for size in self.channels if size % self.groups]
        if odd:
            raise ValueError(f"unet.groups: {self.groups} groups do not divide {odd[0]} channels")
        for level in self.attention_levels:
            if not 0 <= level < len(self.channels):
                raise ValueError(f"unet.attention_levels: {level} is no level of 0..{len(self.channels) - 1}")
            if self.channels[level] % self.heads:
                has = f"{self.channels[level]} channels of level {level}"
                raise ValueError(f"unet.heads: {self.heads} heads do not divide the {has}")
        if bool(self.classes) == bool(self.text_widths):
            raise ValueError("unet.classes: a U-Net takes labels or text; give classes, or classes=0 and "
                             "text_widths")  # fmt: skip
        if self.text_widths and not self.attention_levels:
            raise ValueError("unet.attention_levels: attention reads the text; name a level, such as [2]")


@dataclass(frozen=True, kw_only=True)
class UNetContext:
    """What the layers know of y: the vector of a label, or the projected states of a text and their mask."""

    vector: Float[Tensor, "b d"] | None = None
    states: Float[Tensor, "b l d"] | None = None
    mask: Bool[Tensor, "b l"] | None = None


class ResidualLayer(nn.Module):
    """x + f(x), where f is two convolutions with t and y added between them (lecture notes, 1.2.2)."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = _mlp(config.width, channels)
        self.label = _mlp(config.width, channels) if config.classes else None
        self.norm2 = nn.GroupNorm(config.groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "b c h w"], time: Float[Tensor, "b d"], context: UNetContext
    ) -> Float[Tensor, "b c h w"]:
        h = self.conv1(F.silu(self.norm1(x)))
        told = self.time(time)
        if self.label is not None:
            told = told + self.label(context.vector)
        h = h + told[:, :, None, None]  # broadcast_add of the notes
        return x + self.conv2(F.silu(self.norm2(h)))


class AttentionLayer(nn.Module):
    """x + self-attention over all cells and, where there is text, + cross-attention to it."""

    def __init__(self, channels: int, config: UNetConfig, kernel: Kernel) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, channels)
        self.attention = SelfAttention(channels, config.heads, True, kernel)
        self.cross_norm = nn.GroupNorm(config.groups, channels) if config.text_widths else None
        self.cross_attention = (
            CrossAttention(channels, config.heads, True, kernel, text_width=config.width)
            if config.text_widths
            else None
        )

    def forward(self, x: Float[Tensor, "b c h w"], context: UNetContext) -> Float[Tensor, "b c h w"]:
        x = x + _picture(self.attention(_cells(self.norm(x))), x)
        if self.cross_attention is None or self.cross_norm is None:
            return x
        assert context.states is not None, "text goes with cross-attention"
        answers = self.cross_attention.keys_values(context.states.to(x.dtype))
        return x + _picture(self.cross_attention(_cells(self.cross_norm(x)), answers, context.mask), x)


class Level(nn.Module):
    """Residual layers at one size, behind each of them attention where the level has it."""

    def __init__(self, level: int, config: UNetConfig, kernel: Kernel) -> None:
        super().__init__()
        channels, attends = config.channels[level], level in config.attention_levels
        self.layers = nn.ModuleList(ResidualLayer(channels, config) for _ in range(config.layers))
        self.attentions = nn.ModuleList(
            AttentionLayer(channels, config, kernel) for _ in range(config.layers if attends else 0)
        )

    def forward(
        self, x: Float[Tensor, "b c h w"], time: Float[Tensor, "b d"], context: UNetContext
    ) -> Float[Tensor, "b c h w"]:
        for index, layer in enumerate(self.layers):
            x = layer(x, time, context)
            if self.attentions:
                x = self.attentions[index](x, context)
        return x


class UNet(Model):
    """Velocity of the flow at (picture, time) given a label or text (lecture notes, 1.2.1 and figure 3).

    Encoders E_i of residual layers and a convolution of stride 2, a midcoder M, decoders D_i of a
    convolution, upsampling and residual layers. What an encoder has before it shrinks is added to what its
    decoder has grown: the residual connections across.
    """

    config_type = UNetConfig
    config: UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        kernel, sizes = choose(config.attention), config.channels
        last = len(sizes) - 1
        self.label = LabelEmbedding(config.classes, config.width) if config.classes else None
        self.text = nn.ModuleList(
            nn.Sequential(nn.Linear(w, config.width), nn.LayerNorm(config.width)) for w in config.text_widths
        )
        self.input = nn.Conv2d(config.latent_channels, sizes[0], 3, padding=1)
        self.encoders = nn.ModuleList(Level(level, config, kernel) for level in range(last))
        self.down = nn.ModuleList(
            nn.Conv2d(sizes[level], sizes[level + 1], 3, stride=2, padding=1) for level in range(last)
        )
        self.midcoder = Level(last, config, kernel)
        # Before the upsampling, where a convolution has a quarter of the work; finest last.
        self.up = nn.ModuleList(
            nn.Conv2d(sizes[level + 1], sizes[level], 3, padding=1) for level in reversed(range(last))
        )
        self.decoders = nn.ModuleList(Level(level, config, kernel) for level in reversed(range(last)))
        self.head_norm = nn.GroupNorm(config.groups, sizes[0])
        self.head = nn.Conv2d(sizes[0], config.latent_channels, 3, padding=1)

    @torch.no_grad()
    def init_parameter(self, name: str, value: Float[Tensor, "..."]) -> None:
        """Write the starting value of the parameter of this name, whole.

        It follows from torch's seed and the name alone, as all starting values do.
        """
        generator = torch.Generator(value.device).manual_seed(seeded("weight", torch.initial_seed(), name))
        if name.endswith((".bias", *_CLOSED)):
            nn.init.zeros_(value)
        elif value.ndim == 1:  # the gain of a norm
            nn.init.ones_(value)
        elif name == "label.weight":
            nn.init.normal_(value, generator=generator)
        else:
            nn.init.trunc_normal_(value, std=value[0].numel() ** -0.5, generator=generator)

    @torch.no_grad()
    def continue_parameter(
        self,
        name: str,  # noqa: ARG002
        value: Float[Tensor, "..."],
        earlier: Float[Tensor, "..."],
    ) -> None:
        """Write the parameter of this name, whole, from that of the stage before."""
        value.copy_(earlier)

    def encode_condition(self, condition: Condition) -> UNetContext:
        """y for many calls of the model.

        Raises:
            ValueError: labels for a model of text, or the other way round.
        """
        if isinstance(condition, Labels):
            if self.label is None:
                raise ValueError("condition: labels, and this U-Net takes text")
            return UNetContext(vector=self.label(condition))
        return self._project(condition)

    def _project(self, text: Sequence[TextEmbedding]) -> UNetContext:
        """Each encoder's states at one width, joined along the sequence."""
        if not self.text or len(text) != len(self.text):
            raise ValueError(f"text: {len(text)} embeddings for {len(self.text)} encoders")
        states = [project(each.hidden) for project, each in zip(self.text, text, strict=True)]
        return UNetContext(
            states=torch.cat(states, dim=1), mask=torch.cat([each.mask for each in text], dim=1)
        )

    def forward(
        self,
        latent: Float[Tensor, "b c t h w"],
        time: Float[Tensor, " b"],
        condition: Condition | UNetContext,
    ) -> Float[Tensor, "b c t h w"]:
        """Velocity at flow time `time` in [0, 1] (0 noise, 1 data) of single pictures, t = 1.

        Raises:
            ValueError: several frames, or sides that do not halve as often as there are levels below.
        """
        self.grid(*latent.shape[2:])
        context = condition if isinstance(condition, UNetContext) else self.encode_condition(condition)
        features = sinusoids(time, self.config.width).to(latent.dtype)
        # Convolutions take their format from what comes in; channels last is the faster one on a CPU.
        x = self.input(latent[:, :, 0].contiguous(memory_format=torch.channels_last))
        across = []
        for encoder, down in zip(self.encoders, self.down, strict=True):
            x = encoder(x, features, context)
            across.append(x)
            x = down(x)
        x = self.midcoder(x, features, context)
        for decoder, up in zip(self.decoders, self.up, strict=True):
            x = across.pop() + F.interpolate(up(x), scale_factor=2.0)
            x = decoder(x, features, context)
        return self.head(F.silu(self.head_norm(x)))[:, :, None]

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Cells along time, height and width of a latent of these sizes, which are those that it has.

        Raises:
            ValueError: several frames, or sides that do not halve as often as there are levels below.
        """
        if frames != 1:
            raise ValueError(f"latent frames: a U-Net takes pictures, 1 frame, not {frames}; take model: dit")
        factor = 2 ** (len(self.config.channels) - 1)
        for axis, size in (("height", height), ("width", width)):
            if size % factor:
                raise ValueError(f"latent {axis}: {size} is no multiple of {factor}, which the levels of "
                                 "unet.channels halve; pad it")  # fmt: skip
        return frames, height, width


def _mlp(width: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, channels), nn.SiLU(), nn.Linear(channels, channels))


def _cells(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l c"]:
    return rearrange(x, "b c h w -> b (h w) c")


def _picture(cells: Float[Tensor, "b l c"], like: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    return rearrange(cells, "b (h w) c -> b c h w", h=like.shape[2])
