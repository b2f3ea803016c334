"""The temporal autoencoder (Movie Gen, section 3.1.1): a variational autoencoder, 8x8x8 smaller, 16 channels.

Letters: b batch, c channels, t latent frames, h w latent height and width; frames, height, width in pixels.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from kinoflow.configs.pretrained import load_pretrained, load_state, save_pretrained
from kinoflow.tae.model.chunks import crop, gather, regroup, streams
from kinoflow.tae.model.config import Stride, TAEConfig, require_batch
from kinoflow.tae.model.convolution import Conv, PointwiseConv
from kinoflow.tae.model.layers import (
    Attention,
    Detail,
    Downsample,
    ResBlock,
    Upsample,
    activate,
    fold,
    make_norm,
    pad_time,
    unfold,
)
from kinoflow.tae.model.pixels import from_bytes

INITIAL_LOGVAR = -4.0
_Run = Callable[[Iterable[Tensor]], Iterator[Tensor]]
_Reads = Callable[[int, int], tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """Diagonal Gaussian over latents; `mean` and `logvar` are "b c t h w"."""

    mean: Float[Tensor, "b c t h w"]
    logvar: Float[Tensor, "b c t h w"]

    @property
    def std(self) -> Float[Tensor, "b c t h w"]:
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "b c t h w"]:
        """mean + std · ε; the noise is drawn where the generator lives."""
        device = generator.device if generator is not None else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def kl(self) -> Float[Tensor, "b c t h w"]:
        """KL(q ‖ N(0, 1)) of each latent value, in nats (Kingma and Welling 2013, appendix B)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar)


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What one pass gives: the posterior, the latent that was decoded, and the decoded video."""

    posterior: Posterior
    latent: Float[Tensor, "b c t h w"]
    video: Float[Tensor, "b 3 frames height width"]


class Encoder(nn.Module):
    """Patches, levels of residual blocks with strides between them, and 2 x latent_channels out."""

    def __init__(self, config: TAEConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = Conv(3 * math.prod(config.patch_size), widths[0])
        layers: list[nn.Module] = []
        width = widths[0]
        for level, out in enumerate(widths):
            for _ in range(config.encoder_blocks[level]):
                layers.append(ResBlock(width, out, config.norm))
                width = out
            if level < len(config.strides):
                wider = widths[level + 1] if config.shortcuts else width
                layers.append(Downsample(width, wider, config.strides[level], config.shortcuts))
                width = wider
        self.layers = nn.Sequential(*layers, *_middle(width, config))
        self.norm_out = make_norm(config.norm, width)
        self.conv_out = Conv(width, 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(activate(self.norm_out(self.layers(self.conv_in(x)))))

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same in chunks of frames, without gradients."""
        growth = self.conv_in.spatial.out_channels / self.conv_in.spatial.in_channels
        chunks = self.conv_in.stream(regroup(chunks, growth=growth))
        for layer in self.layers:
            assert isinstance(layer, ResBlock | Attention | Downsample)
            chunks = layer.stream(chunks)
        return self.conv_out.stream(map(activate, map(self.norm_out, chunks)))


class Decoder(nn.Module):
    """The encoder mirrored."""

    def __init__(self, config: TAEConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        width = widths[-1]
        channels = config.latent_channels
        self.post_quant = PointwiseConv(channels, channels) if config.post_quant else None
        self.conv_in = Conv(channels, width)
        layers = _middle(width, config)
        for level in reversed(range(len(widths))):
            for _ in range(config.decoder_blocks[level]):
                layers.append(ResBlock(width, widths[level], config.norm))
                width = widths[level]
            if level > 0:
                out = widths[level - 1] if config.shortcuts else width
                layers.append(Upsample(width, out, config.strides[level - 1], config.shortcuts))
                width = out
        self.layers = nn.Sequential(*layers)
        self.norm_out = make_norm(config.norm, width)
        out = config.detail_channels or 3 * math.prod(config.patch_size)
        self.conv_out = Conv(width, out * math.prod(config.detail_stride))
        self.detail = None
        if config.detail_channels:
            blocks = [ResBlock(out, out, config.norm) for _ in range(config.detail_blocks)]
            self.detail = Detail(blocks, out, config.detail_stride, 3 * math.prod(config.decoded_patch))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_out(activate(self.norm_out(self.layers(self.conv_in(self._dequantized(x))))))
        return x if self.detail is None else self.detail(x)

    def stream(self, x: Tensor, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Frames start..stop-1 of the same in chunks, without gradients.

        Each layer computes only the frames that those are made of: of a few frames of a long clip the fine
        levels, where the work is, cost what a few frames cost.
        """
        stages, times = self._stages(), [x.shape[2]]
        for _, _, more in stages:
            times.append(times[-1] * more)
        spans = [(start, times[-1] if stop is None else stop)]  # of what comes out, then of what goes in
        for (_, reads, _), time in zip(reversed(stages), reversed(times[:-1]), strict=True):
            low, high = reads(*spans[-1])
            spans.append((max(low, 0), min(high, time)))
        spans.reverse()
        growth = self.conv_in.spatial.out_channels / x.shape[1]
        low, high = spans[0]
        chunks = regroup([self._dequantized(x[:, :, low:high])], growth=growth)
        for (run, _, more), (first, last) in zip(stages, spans[1:], strict=True):
            chunks = run(chunks)
            if (first, last) != (low * more, high * more):
                chunks = crop(chunks, first - low * more, last - low * more)
            low, high = first, last
        return chunks

    def _stages(self) -> list[tuple[_Run, _Reads, int]]:
        """Of each layer its stream, what it reads for some of its frames, and how many it makes of one."""
        stages: list[tuple[_Run, _Reads, int]] = [(self.conv_in.stream, self.conv_in.reads, 1)]
        for layer in self.layers:
            assert isinstance(layer, ResBlock | Attention | Upsample)
            stages.append((layer.stream, layer.reads, layer.stride[0] if isinstance(layer, Upsample) else 1))
        stages.append((self._out, self.conv_out.reads, 1))
        if self.detail is not None:
            stages.append((self.detail.stream, self.detail.reads, self.detail.stride[0]))
        return stages

    def _out(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        return self.conv_out.stream(map(activate, map(self.norm_out, chunks)))

    def _dequantized(self, x: Tensor) -> Tensor:
        return x if self.post_quant is None else self.post_quant(x)


def _middle(width: int, config: TAEConfig) -> list[nn.Module]:
    if not config.attention:
        return []
    return [
        ResBlock(width, width, config.norm),
        Attention(width, config.norm),
        ResBlock(width, width, config.norm),
    ]


class TAE(nn.Module):
    """Temporal autoencoder. Any number of frames from one up; an image is a one-frame clip."""

    def __init__(self, config: TAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        block = 3 * math.prod(config.factors)
        self.to_latent = PointwiseConv(block, 2 * config.latent_channels) if config.shortcuts else None
        self.to_pixels = PointwiseConv(config.latent_channels, block) if config.shortcuts else None

    def init_weights(self) -> None:
        """Give every parameter its starting value; temporal layers start as the identity."""
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # pyright: ignore[reportCallIssue]
        for module in self.modules():  # after the loop above, which reaches the layers inside it later
            if isinstance(module, Attention):
                module.init_temporal_identity()
        if self.to_latent is not None and self.to_pixels is not None:
            nn.init.normal_(self.to_latent.weight, std=self.to_latent.in_channels**-0.5)
            nn.init.normal_(self.to_pixels.weight, std=0.02)
            detail = self.decoder.detail
            last = self.decoder.conv_out.spatial if detail is None else detail.to_patch
            for conv in (self.encoder.conv_out.spatial, last):
                nn.init.zeros_(conv.weight)
            for conv in (self.to_latent, self.to_pixels, self.encoder.conv_out.spatial, last):
                assert conv.bias is not None
                nn.init.zeros_(conv.bias)
        # A posterior that starts as wide as the prior drowns what the encoder says for hundreds of steps.
        bias = self.encoder.conv_out.temporal.bias
        assert bias is not None
        nn.init.constant_(bias[self.config.latent_channels :], INITIAL_LOGVAR)

    def forward(
        self, video: Float[Tensor, "b 3 frames height width"], noise: Float[Tensor, "b c t h w"] | None = None
    ) -> Reconstruction:
        """Encode, draw mean + std · `noise` (the mean without it), decode: one training pass."""
        posterior = self.encode(video)
        latent = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return Reconstruction(posterior=posterior, latent=latent, video=self.decode(latent, video.shape[2]))

    def encode(self, video: Shaped[Tensor, "b 3 frames height width"]) -> Posterior:
        """Posterior over the latent of `video`, RGB in [-1, 1], or in bytes; sides are multiples of 8.

        Raises:
            ValueError: another shape, or a side that is not a multiple of the spatial factor.
        """
        require_batch("video", video.shape, 3, "frames, height, width")
        self.config.latent_shape(*video.shape[2:])
        if streams():
            moments = self._encode_stream(video)
        else:
            video = self._values(video)
            moments = self.encoder(_channels_last(_blocks(video, self.config.patch_size)))
            if self.to_latent is not None:
                moments = moments + self.to_latent(_blocks(video, self.config.factors))
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean=mean, logvar=logvar.clamp(-30.0, 20.0))

    def decode(
        self, latent: Float[Tensor, "b c t h w"], frames: int, wanted: slice | None = None
    ) -> Float[Tensor, "b 3 _ height width"]:
        """RGB in about [-1, 1] (not clamped); spurious frames beyond `frames` are discarded.

        Of the `wanted` ones alone where they are given, for less work: the frames stay those of the whole.

        Raises:
            ValueError: another shape, or more or fewer frames than a latent of that length stands for.
        """
        require_batch("latent", latent.shape, self.config.latent_channels, "t, h, w")
        time = self.config.factors[0]
        if not time * (latent.shape[2] - 1) < frames <= time * latent.shape[2]:
            raise ValueError(f"frames: {latent.shape[2]} latent frames do not decode to {frames} frames")
        latent = _channels_last(latent)
        if streams():
            return self._decode_stream(latent, *_bounds(wanted, frames))
        video = unfold(self.decoder(latent), self.config.decoded_patch)[:, :, :frames]
        if self.to_pixels is not None:
            video = video + unfold(self.to_pixels(latent), self.config.factors)[:, :, :frames]
        return video if wanted is None else video[:, :, wanted]

    def _encode_stream(self, video: Tensor) -> Tensor:
        clips = video.split(self.config.factors[0], dim=2)
        blocks = (_channels_last(_blocks(self._values(clip), self.config.patch_size)) for clip in clips)
        moments = gather(self.encoder.stream(blocks), len(clips))
        if self.to_latent is not None:
            for clip, moment in zip(clips, moments.split(1, dim=2), strict=True):
                moment.add_(self.to_latent(_blocks(self._values(clip), self.config.factors)))
        return moments

    def _values(self, video: Tensor) -> Tensor:
        """Bytes become values of the model's precision."""
        if video.is_floating_point():
            return video
        return from_bytes(video.movedim(1, -1)).to(self.encoder.conv_in.spatial.weight.dtype)

    def _decode_stream(self, latent: Tensor, start: int, stop: int) -> Tensor:
        return gather(self._pieces(latent, start, stop), stop - start)

    @torch.no_grad()
    def decode_pieces(
        self, latent: Float[Tensor, "b c t h w"], frames: int
    ) -> Iterator[Float[Tensor, "b 3 _ height width"]]:
        """The frames of `decode`, the same numbers, as they are made; without gradients.

        Without attention, which waits for all frames, what is alive does not grow with the clip, but for the
        latent.
        """
        yield from self._pieces(_channels_last(latent), 0, frames)

    def _pieces(self, latent: Tensor, start: int, stop: int) -> Iterator[Tensor]:
        """Frames start..stop-1; the patch in which the first lies is computed whole."""
        patch = self.config.decoded_patch
        low, high = start // patch[0], -(-stop // patch[0])
        chunks = (unfold(chunk, patch) for chunk in self.decoder.stream(latent, low, high))
        shortcut, position = _Shortcut(self.to_pixels, latent, self.config.factors), start
        for chunk in crop(chunks, start - low * patch[0], stop - low * patch[0]):
            shortcut.add_to(chunk, position)
            position += chunk.shape[2]
            yield chunk
            del chunk  # not held while the next one is made

    def normalize(self, latent: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        """Zero mean and unit variance for each channel: what the DiT sees."""
        mean, std = self._statistics(latent)
        return (latent - mean) / std

    def denormalize(self, latent: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        """Inverse of `normalize`."""
        mean, std = self._statistics(latent)
        return latent * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if not self.config.latent_mean:
            raise ValueError(
                "tae.latent_mean: not measured; export the autoencoder from its training run first"
            )
        mean = like.new_tensor(self.config.latent_mean).view(1, -1, 1, 1, 1)
        return mean, like.new_tensor(self.config.latent_std).view(1, -1, 1, 1, 1)

    def with_statistics(self, mean: Tensor, std: Tensor) -> "TAE":
        """This model (weights shared) with measured per-channel statistics in its config."""
        self.config = replace(self.config, latent_mean=tuple(mean.tolist()), latent_std=tuple(std.tolist()))
        return self

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "TAE":
        """Read a model folder or hub id; fp32, in evaluation mode.

        Raises:
            UserError: a missing or damaged file.
        """
        config, state = load_pretrained(source, TAEConfig)
        with torch.device("meta"):
            model = cls(config)
        load_state(model, state, source)
        return model.to(memory_format=torch.channels_last_3d).eval()  # pyright: ignore[reportCallIssue]

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and safetensors weights into `folder`."""
        save_pretrained(folder, config=self.config, state=self.state_dict(), dtype=dtype)


class _Shortcut:
    """The linear path from latents to pixels, where a model has one; each latent frame goes it once."""

    def __init__(self, to_pixels: PointwiseConv | None, latent: Tensor, factors: Stride) -> None:
        self._to_pixels, self._latent, self._factors = to_pixels, latent, factors
        self._cell, self._pixels = -1, latent

    def add_to(self, frames: Tensor, start: int) -> None:
        """Add it, in place, to frames of which the first has the number `start`."""
        if self._to_pixels is None:
            return
        time = self._factors[0]
        for cell in range(start // time, -(-(start + frames.shape[2]) // time)):
            if cell != self._cell:
                path = self._to_pixels(self._latent[:, :, cell : cell + 1])
                self._cell, self._pixels = cell, unfold(path, self._factors)
            at = cell * time - start
            clip = frames[:, :, max(at, 0) : at + time]
            clip.add_(self._pixels[:, :, max(-at, 0) :][:, :, : clip.shape[2]])


def _bounds(wanted: slice | None, frames: int) -> tuple[int, int]:
    start, stop, _ = (wanted or slice(None)).indices(frames)
    return start, stop


def _blocks(video: Tensor, patch: Stride) -> Tensor:
    return fold(pad_time(video, patch[0]), patch)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)
