"""VideoDiT, the backbone of Movie Gen (section 3.1.3): embed, trunk, head.

Letters: b batch, c channels, t h w latent sizes, l sequence, d model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kinoflow.conditioning.embedding import Condition, TextEmbedding
from kinoflow.conditioning.labels import LabelEmbedding, Labels
from kinoflow.configs.files import seeded
from kinoflow.dit_video.attention.kernels import KernelName, Segments, Who, choose, packs
from kinoflow.dit_video.flow.known import MASKS, Known, velocity_near
from kinoflow.dit_video.flow.matching import velocity_from_data
from kinoflow.dit_video.flow.paths import cond_ot
from kinoflow.dit_video.layers import (
    Block,
    FactorizedPositions,
    KeysValues,
    Layout,
    RMSNorm,
    TimeEmbedding,
    stretch,
)
from kinoflow.dit_video.model import Model

# Matrices that start at zero beside the blocks' own.
CLOSED = ("modulation.weight", "head_modulation.weight", "head.weight", "known.weight")


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of a backbone.

    A head that gives the data (Li and He 2025, arXiv:2511.13720) need not carry the noise of a patch that has
    more values than the width has room for; the velocity follows from it.
    """

    width: int = 256
    """Width of the tokens."""
    depth: int = 6
    """Blocks."""
    heads: int = 4
    """Attention heads; they divide the width."""
    ffn: int = 704
    """Hidden width of the feed-forward layers."""
    latent_channels: int = 16
    """Channels of the latent."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent cells in a token: time, height, width."""
    text_widths: tuple[int, ...] = (128, 96, 128)
    """Widths of the text encoders' states: UL2, ByT5, MetaCLIP; [] with classes."""
    classes: int = 0
    """Classes of the labels that are in the place of text; 0: text."""
    max_tokens: tuple[int, int, int] = (4, 8, 8)
    """Position tables: tokens along time, height, width."""
    qk_norm: bool = True
    """Normalize queries and keys."""
    predicts: Literal["velocity", "data"] = "velocity"
    """What the head gives; of a model of the score velocity."""
    known: bool = False
    """Read what is known of the clip: pictures, a beginning, all but a region."""
    shown_variance: float = 0.0
    """Of a clip around what is shown, which the head adds to; 0: it gives all."""
    attention: KernelName = "sdpa"
    """How attention is computed."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"dit.heads: {self.heads} heads do not divide the width {self.width}")
        if min(self.width, self.depth, self.heads, self.ffn, *self.patch_size, *self.max_tokens) < 1:
            raise ValueError("dit: width, depth, heads, ffn, patch_size and max_tokens are at least 1")
        if self.classes < 0 or bool(self.classes) == bool(self.text_widths):
            raise ValueError("dit.classes: a DiT takes labels or text; give classes and text_widths=[], or "
                             "text_widths alone")  # fmt: skip
        if self.shown_variance < 0 or (self.shown_variance and not self.known):
            raise ValueError("dit.shown_variance: a variance above 0, beside dit.known=true; leave it out")
        if self.shown_variance and self.predicts != "velocity":
            raise ValueError("dit.shown_variance: the head adds to a velocity; use dit.predicts=velocity")


@dataclass(frozen=True, kw_only=True)
class TextContext:
    """What each layer knows of the text: keys and values, or the states that it computes them from itself.

    Of a label it is the vector that joins the embedding of the time; the layers then know nothing.

    Keys and values are for sampling, where they are computed once a prompt and used at each step. States are
    for training, where they serve once: recomputed blocks then need not keep theirs.

    Padded, keys and values are "b n l h" and states "b l d" beside a mask; packed (`lengths` of the real
    text), they are "1 n Σl h" and "1 Σl d" without one.
    """

    layers: tuple[KeysValues | Float[Tensor, "_ _ _"] | None, ...]
    mask: Bool[Tensor, "b l"] | None
    lengths: tuple[int, ...] | None = None
    label: Float[Tensor, "b d"] | None = None

    def seen(self, tokens: int) -> Who:
        """Who sees the text when each clip asks with so many tokens."""
        return self.mask if self.lengths is None else Segments((tokens,) * len(self.lengths), self.lengths)


class VideoDiT(Model):
    """Velocity of the flow at (latent, time) given text or a label. Full attention over space and time.

    The diffusion transformer of the lecture notes (1.2.1, 1.3.2, figure 4 on the left).
    """

    config_type = DiTConfig
    config: DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        # Whether a block's weights can be used outside of its call: not where they are gathered for it.
        self.separate_text = True
        d = config.width
        patch = config.latent_channels * config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        kernel = choose(config.attention)
        # A convolution whose stride is its kernel is a linear map of each patch.
        self.embed = nn.Linear(patch, d)
        cells = patch // config.latent_channels
        self.known = nn.Linear(patch + MASKS * cells, d, bias=False) if config.known else None
        self.positions = FactorizedPositions(d, config.max_tokens)
        self.time = TimeEmbedding(d)
        self.modulation = nn.Linear(d, 6 * d)
        self.text = nn.ModuleList(nn.Sequential(nn.Linear(w, d), nn.LayerNorm(d)) for w in config.text_widths)
        self.label = LabelEmbedding(config.classes, d) if config.classes else None
        text = bool(config.text_widths)
        self.blocks = nn.ModuleList(
            Block(d, config.heads, config.ffn, config.qk_norm, kernel, text=text) for _ in range(config.depth)
        )
        self.head_norm = RMSNorm(d, gain=False)
        self.head_modulation = nn.Linear(d, 2 * d)
        self.head = nn.Linear(d, patch)

    @torch.no_grad()
    def init_parameter(self, name: str, value: Float[Tensor, "..."]) -> None:
        """Write the starting value of the parameter of this name, whole.

        It follows from torch's seed and the name alone, whatever else was drawn: a model made in pieces on
        many processes starts as one made in one place.
        """
        generator = torch.Generator(value.device).manual_seed(seeded("weight", torch.initial_seed(), name))
        if name in CLOSED or name.endswith((".bias", "modulation_bias", "cross_attention.out.weight")):
            nn.init.zeros_(value)
        elif name.startswith("positions."):
            nn.init.normal_(value, std=0.02, generator=generator)
        elif value.ndim == 1:  # the gain of a norm
            nn.init.ones_(value)
        else:
            nn.init.trunc_normal_(value, std=value.shape[1] ** -0.5, generator=generator)

    @torch.no_grad()
    def continue_parameter(
        self, name: str, value: Float[Tensor, "..."], earlier: Float[Tensor, "..."]
    ) -> None:
        """Write the parameter of this name, whole, from that of the stage before.

        Position tables are stretched: more pixels or frames between the ends that are known.
        """
        value.copy_(stretch(earlier, len(value)) if name.startswith("positions.") else earlier)

    def encode_condition(self, condition: Condition) -> TextContext:
        """Texts or labels for many calls of the model: keys and values of every layer, or a vector.

        Raises:
            ValueError: as `forward`.
        """
        context = self._context(condition)
        states = context.layers[0]
        if not self.separate_text or not isinstance(states, Tensor):
            return context
        crosses = (block.cross_attention for block in self._blocks)
        return replace(context, layers=tuple(cross.keys_values(states) for cross in crosses if cross))

    def _context(self, condition: Condition) -> TextContext:
        if not isinstance(condition, Labels):
            return self._project(condition)
        if self.label is None:
            raise ValueError("condition: labels, and this DiT takes text")
        return TextContext(layers=(None,) * self.config.depth, mask=None, label=self.label(condition))

    def _project(self, text: Sequence[TextEmbedding]) -> TextContext:
        """Each encoder's states at the width of the model, joined along the sequence; the same in all layers.

        For a kernel that wants it so, the padding is dropped.
        """
        if not self.text or len(text) != len(self.text):
            raise ValueError(f"text: {len(text)} embeddings for {len(self.text)} encoders")
        states = torch.cat([project(e.hidden) for project, e in zip(self.text, text, strict=True)], dim=1)
        mask = torch.cat([e.mask for e in text], dim=1)
        lengths = None
        if packs(self.config.attention):
            states, lengths = states[mask][None], tuple(mask.sum(dim=1).tolist())
        return TextContext(layers=(states,) * self.config.depth, mask=mask, lengths=lengths)

    def forward(
        self,
        latent: Float[Tensor, "b c t h w"],
        time: Float[Tensor, " b"],
        condition: Condition | TextContext,
        known: Known | None = None,
    ) -> Float[Tensor, "b c t h w"]:
        """Velocity at flow time `time` in [0, 1] (0 noise, 1 data); `latent` is normalized.

        `known` is what is known of the clip; None is nothing, and costs nothing. With `shown_variance` the
        head starts from what it says already (on the straight path): an upsampler need not learn to copy.

        Raises:
            ValueError: sides that the patch does not divide or that the position tables do not hold; labels
                for a model of text, or the other way round; something known for a model that reads none.
        """
        context = condition if isinstance(condition, TextContext) else self._context(condition)
        t, h, w = self.grid(*latent.shape[2:])
        layout = Layout(clips=None, text=context.seen(t * h * w))
        patches = self._patchify(latent)
        x = self.embed(patches)
        if known is not None:
            x = x + self._read(known.channels.to(patches.dtype))
        seen = {"positions": self.positions(t, h, w), "context": context, "layout": layout}
        velocity = self._unpatchify(self._velocity(x, patches, time, **seen), t, h, w)
        if known is None or not self.config.shown_variance:
            return velocity
        near = velocity_near(known.latent, latent, time, cond_ot, self.config.shown_variance)
        return velocity + known.shown * near

    def _read(self, channels: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b l d"]:
        if self.known is None:
            raise ValueError("known: this DiT reads the noise alone (dit.known)")
        return self.known(self._patchify(channels))

    def _velocity(
        self,
        x: Tensor,
        patches: Tensor,
        time: Tensor,
        *,
        positions: Tensor,
        context: TextContext,
        layout: Layout,
    ) -> Float[Tensor, "b l p"]:
        told = self.time(time) if context.label is None else self.time(time) + context.label
        condition = nn.functional.silu(told)
        modulation = rearrange(self.modulation(condition), "b (six d) -> b six d", six=6)
        x = self.trunk(x, positions, modulation=modulation, context=context, layout=layout)
        head = rearrange(self.head_modulation(condition), "b (two d) -> b two d", two=2)
        shift, scale = head[:, None].unbind(dim=2)
        output = self.head(torch.addcmul(shift, self.head_norm(x), 1 + scale))
        if self.config.predicts == "velocity":
            return output
        return velocity_from_data(output, patches, time[:, None, None])

    def trunk(
        self, x: Tensor, positions: Tensor, *, modulation: Tensor, context: TextContext, layout: Layout
    ) -> Float[Tensor, "b l d"]:
        """All blocks; the seam at which `dit_video.parallel` spreads the sequence over processes."""
        layers = context.layers
        if isinstance(layers[0], Tensor):  # under autocast to what the blocks want, once and not in each
            layers = (layers[0].to(x.dtype),) * len(layers)
        for block, text in zip(self.blocks, layers, strict=True):
            x = block(x, positions, modulation, text, layout)
        return x

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
