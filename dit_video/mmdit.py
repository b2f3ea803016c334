"""MMDiT, the backbone of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206; notes, figure 5).

Letters: b batch, c channels, t h w latent sizes, l sequence, d model width.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kinoflow.conditioning.embedding import Condition
from kinoflow.conditioning.labels import Labels
from kinoflow.configs.errors import UserError
from kinoflow.configs.files import seeded
from kinoflow.dit_video.attention.kernels import KernelName, choose, packs
from kinoflow.dit_video.joint import JointBlock, Packing, Seen, SineTables, middle, modulated, write_sines
from kinoflow.dit_video.layers import TimeEmbedding
from kinoflow.dit_video.model import Model


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """Shape of a two-stream backbone for pictures."""

    width: int = 256
    """Width of the tokens of both streams."""
    depth: int = 6
    """Blocks."""
    heads: int = 4
    """Attention heads; they divide the width."""
    latent_channels: int = 16
    """Channels of the latent."""
    patch: int = 2
    """Latent cells along a side of a token."""
    text_widths: tuple[int, ...] = (128, 96, 128)
    """Widths of the text states; Stable Diffusion 3 has one, 4096."""
    pooled_width: int = 0
    """Width of the pooled text, 2048 of Stable Diffusion 3; 0: there is none."""
    max_tokens: int = 16
    """Side of the square of positions; a picture takes its middle."""
    qk_norm: bool = True
    """Normalize queries and keys."""
    dual_attention_layers: tuple[int, ...] = ()
    """Blocks with a second attention, of the image alone."""
    attention: KernelName = "sdpa"
    """How attention is computed."""

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads, self.patch, self.max_tokens) < 1:
            raise ValueError("mmdit: width, depth, heads, patch and max_tokens are at least 1")
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"mmdit.width: {self.width} must divide by 4 and by mmdit.heads={self.heads}")
        if not set(self.dual_attention_layers) <= set(range(self.depth)):
            raise ValueError(
                f"mmdit.dual_attention_layers: {list(self.dual_attention_layers)} are not blocks of 0.."
                f"{self.depth - 1}"
            )

    @property
    def classes(self) -> int:
        """None: it takes text."""
        return 0


@dataclass(frozen=True, kw_only=True)
class JointContext:
    """What a model knows of some prompts, for many calls: the text at its width, and pooled.

    `mask` is None where every token is real.
    """

    states: Float[Tensor, "b l d"]
    pooled: Float[Tensor, "b d"] | None
    mask: Bool[Tensor, "b l"] | None


class MMDiT(Model):
    """Velocity of the flow at (latent, time) given text (lecture notes, figure 5).

    Image and text are two streams with weights of their own, which attend together.
    """

    config_type = MMDiTConfig
    config: MMDiTConfig

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        d, patch = config.width, config.latent_channels * config.patch**2
        kernel = choose(config.attention)
        self.embed = nn.Linear(patch, d)
        self.positions = SineTables(d, config.max_tokens)
        self.time = TimeEmbedding(d)
        self.pooled = (
            nn.Sequential(nn.Linear(config.pooled_width, d), nn.SiLU(), nn.Linear(d, d))
            if config.pooled_width
            else None
        )
        self.text = nn.ModuleList(nn.Linear(width, d) for width in config.text_widths)
        self.blocks = nn.ModuleList(
            JointBlock(
                d,
                config.heads,
                qk_norm=config.qk_norm,
                second=index in config.dual_attention_layers,
                last=index == config.depth - 1,
                kernel=kernel,
            )
            for index in range(config.depth)
        )
        self.head_modulation = nn.Linear(d, 2 * d)
        self.head = nn.Linear(d, patch)

    @torch.no_grad()
    def init_parameter(self, name: str, value: Float[Tensor, "..."]) -> None:
        """Write the starting value of the parameter of this name, whole; from torch's seed and the name."""
        generator = torch.Generator(value.device).manual_seed(seeded("weight", torch.initial_seed(), name))
        if name.startswith("positions."):
            write_sines(value)
        elif name.endswith(("modulation.weight", ".bias")) or name == "head.weight":
            nn.init.zeros_(value)
        elif value.ndim == 1:  # the gain of a norm
            nn.init.ones_(value)
        else:
            nn.init.trunc_normal_(value, std=value.shape[1] ** -0.5, generator=generator)

    @torch.no_grad()
    def continue_parameter(
        self, name: str, value: Float[Tensor, "..."], earlier: Float[Tensor, "..."]
    ) -> None:
        """Write the parameter of this name, whole, from that of the stage before.

        Longer tables of positions keep the earlier ones in their middle.
        """
        if name.startswith("positions."):
            write_sines(value)
            middle(value, len(earlier)).copy_(earlier)
        else:
            value.copy_(earlier)

    def encode_condition(self, condition: Condition) -> JointContext:
        """The text of some prompts for many calls of the model.

        Raises:
            ValueError: labels, not an embedding for each encoder, or other pooled text than it takes.
        """
        if isinstance(condition, Labels):
            raise ValueError("condition: labels, and an MMDiT takes text")
        text = condition
        if len(text) != len(self.text):
            raise ValueError(f"text: {len(text)} embeddings for {len(self.text)} encoders")
        states = torch.cat([project(e.hidden) for project, e in zip(self.text, text, strict=True)], dim=1)
        mask = torch.cat([e.mask for e in text], dim=1)
        found = [e.pooled for e in text if e.pooled is not None]
        if sum(each.shape[1] for each in found) != self.config.pooled_width:
            raise ValueError(
                f"text: {sum(each.shape[1] for each in found)} values of pooled text, mmdit.pooled_width "
                f"is {self.config.pooled_width}"
            )
        pooled = None if self.pooled is None else self.pooled(torch.cat(found, dim=1))
        return JointContext(states=states, pooled=pooled, mask=None if bool(mask.all()) else mask)

    def forward(
        self,
        latent: Float[Tensor, "b c t h w"],
        time: Float[Tensor, " b"],
        condition: Condition | JointContext,
    ) -> Float[Tensor, "b c t h w"]:
        """Velocity at flow time `time` in [0, 1] (0 noise, 1 data); `latent` is normalized, of one frame.

        Raises:
            UserError: more frames than one.
            ValueError: sides that the patch does not divide or that the position tables do not hold.
        """
        context = condition if isinstance(condition, JointContext) else self.encode_condition(condition)
        _, h, w = self.grid(*latent.shape[2:])
        # Stable Diffusion's time is 1 at the noise, and its velocity leads there. It is turned round here,
        # and nowhere else: the weights know nothing of our convention.
        told = self.time(1 - time)
        told = told if context.pooled is None else told + context.pooled
        x = self.embed(self._patchify(latent)) + self.positions(h, w)
        x = self._trunk(x, context, nn.functional.silu(told))
        return -self._unpatchify(x, h, w)

    def _trunk(self, x: Tensor, context: JointContext, condition: Tensor) -> Float[Tensor, "b l p"]:
        seen, states = self._seen(context.mask, x.shape[1]), context.states.to(x.dtype)
        for block in self.blocks:
            x, states = block(x, states, condition, seen)
        shift, scale = self.head_modulation(condition)[:, None].chunk(2, dim=2)
        return self.head(modulated(x, shift, scale))

    def _seen(self, mask: Bool[Tensor, "b l"] | None, tokens: int) -> Seen:
        """Who is seen where `tokens` of the image stand before text of this mask."""
        if mask is None:
            return None
        mask = nn.functional.pad(mask, (tokens, 0), value=True)
        if not packs(self.config.attention):
            return mask
        return Packing(mask.flatten().nonzero()[:, 0], tuple(mask.sum(dim=1).tolist()))

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens along time, height and width of a latent of these sizes."""
        if frames != 1:
            raise UserError(f"frames: {frames} latent frames, and an mmdit makes pictures; give one frame")
        for axis, size in (("height", height), ("width", width)):
            if size % self.config.patch:
                raise ValueError(f"latent {axis}: {size} does not divide into patches of {self.config.patch}")
        return 1, height // self.config.patch, width // self.config.patch

    def _patchify(self, latent: Tensor) -> Float[Tensor, "b l p"]:
        p = self.config.patch
        return rearrange(latent, "b c 1 (h ph) (w pw) -> b (h w) (c ph pw)", ph=p, pw=p)

    def _unpatchify(self, tokens: Tensor, h: int, w: int) -> Float[Tensor, "b c 1 _ _"]:
        p = self.config.patch
        return rearrange(tokens, "b (h w) (c ph pw) -> b c 1 (h ph) (w pw)", h=h, w=w, ph=p, pw=p)
