"""The models of a release in memory: all of them, or where that is short one after the other.

A clip needs its text encoders, then the backbone, then the autoencoder. Where they do not fit together, each
is read when it is needed, and what does not fit beside it is let go. A backbone that a GPU cannot hold stays
in main memory, and its blocks visit the GPU.
"""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from kinoflow.conditioning.offload import stream
from kinoflow.configs.errors import UserError
from kinoflow.dit_video.backbone import BACKBONES, Backbone
from kinoflow.dit_video.quantized import hold
from kinoflow.sample.generate import Encoder
from kinoflow.sample.processes import Shared, Team
from kinoflow.sample.release import Release
from kinoflow.tae.model.pixels import Pixels
from kinoflow.tae.model.tae import TAE
from kinoflow.tae.tiles.memory import format_bytes

Part = Literal["text", "backbone", "decoder"]
_NAMES = {"text": "text encoders", "backbone": "backbone", "decoder": "autoencoder"}


class Models:
    """The models of a release, read when they are asked for, by any thread.

    Args:
        device: of the models, and `dtype` of the backbone's weights.
        text_cache: folder that keeps the text states of prompts.
        team: other processes that hold the backbone as well.
        limit: bytes that all weights may take on the device at once; None sets no limit.

    Raises:
        UserError: a backbone for which the limit is too low, and which cannot be streamed.
    """

    def __init__(
        self,
        release: Release,
        *,
        device: torch.device,
        dtype: torch.dtype,
        text_cache: Path | None = None,
        team: Team | None = None,
        limit: int | None = None,
    ) -> None:
        self._release, self._device, self._dtype = release, device, dtype
        self._text_cache, self._team, self._limit = text_cache, team, limit
        self._lock = threading.RLock()
        self._held: dict[Part, Any] = {}
        self._sizes: dict[Part, int] = {}  # of all weights, wherever they are
        self._text = 0  # bytes of the text encoders on the device: some may be offloaded
        self.is_streamed = False
        if limit is not None:
            self._expect(limit)

    def _expect(self, limit: int) -> None:
        """Bytes of the weights by their shapes; of text encoders they are known when those are read."""
        release = self._release
        kind: Any = BACKBONES[release.part]
        with torch.device("meta"):
            backbone = hold(kind(release.backbone_config()), "meta", self._dtype)
            decoder = None if release.config.pixels else TAE(release.tae_config)
        self._sizes = {"text": 0, "backbone": _bytes(backbone), "decoder": _bytes(decoder)}
        self.is_streamed = self._sizes["backbone"] > limit
        if self.is_streamed:
            self._refuse_unstreamed(limit, getattr(backbone, "blocks", None))

    def _refuse_unstreamed(self, limit: int, blocks: nn.ModuleList | None) -> None:
        size = self._sizes["backbone"]
        what = f"{format_bytes(limit)} do not hold the backbone of {format_bytes(size)}"
        if self._team is not None:
            raise UserError(f"memory: {what}, and each process holds it; give more, or start one process")
        if self._device.type == "cpu":
            raise UserError(f"memory: {what}; give more, or use --dtype bf16 or int8")
        if blocks is None:
            raise UserError(f"memory: {what}, a U-Net, which has no blocks to stream; give more")
        of_blocks = [_bytes(block) for block in blocks]
        least = size - sum(of_blocks) + 2 * max(of_blocks)
        if least > limit:
            raise UserError(
                f"memory: {what}, nor two blocks of it at a time, {format_bytes(least)}; give more"
            )

    @property
    def is_short(self) -> bool:
        """Whether the models take turns, as far as is known."""
        return self._limit is not None and sum(self._resident(part) for part in self._sizes) > self._limit

    def _resident(self, part: Part) -> int:
        """Bytes on the device. A streamed backbone counts as all that it may have."""
        assert self._limit is not None
        if part == "text":
            return self._text
        return min(self._sizes[part], self._limit) if part == "backbone" else self._sizes[part]

    def load(self) -> None:
        """Read all that fits together.

        Raises:
            UserError: a damaged file.
        """
        for part in get_args(Part):
            if part == "text" or not self.is_short:
                self._get(part)

    def text(self) -> Encoder:
        """The text encoders, or what knows the names of classes."""
        return self._get("text")

    def backbone(self) -> Backbone | Shared:
        """What gives velocities."""
        return self._get("backbone")

    def decoder(self) -> TAE | Pixels:
        """What makes frames of latents."""
        return self._get("decoder")

    def bytes(self) -> dict[str, int]:
        """Of the weights of each part, whether it is there now or not."""
        self.load()
        return {part: self._sizes[part] for part in ("backbone", "decoder", "text")}

    def _get(self, part: Part) -> Any:
        with self._lock:
            if part not in self._held:
                self._make_room(part)
                self._held[part] = self._read(part)
                self._sizes[part] = _bytes(self._held[part])
                if part == "text":
                    self._text = _bytes(self._held[part], self._device)
                    self._make_room(part)  # which was not known before
            return self._held[part]

    def _make_room(self, part: Part) -> None:
        """Let go of others until a part fits.

        Raises:
            UserError: it does not fit alone.
        """
        if self._limit is None:
            return
        if self._resident(part) > self._limit:
            self._held.pop(part, None)
            what = f"the {_NAMES[part]} of {format_bytes(self._resident(part))}"
            raise UserError(f"memory: {format_bytes(self._limit)} do not hold {what}; give more")
        for other in list(self._held):
            there: set[Part] = {part, *self._held}
            if other != part and sum(map(self._resident, there)) > self._limit:
                del self._held[other]
                gc.collect()  # hooks and their blocks hold each other
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()

    def _read(self, part: Part) -> Any:
        release = self._release
        if part == "text":
            return release.encoder(self._text_cache, self._device)
        if part == "decoder":
            return release.decoder(self._device)
        if self._team is not None:
            return self._team.share(release, self._device, self._dtype)
        if self.is_streamed:
            return streamed(release.backbone("cpu", self._dtype), self._device)
        return release.backbone(self._device, self._dtype)


def streamed(backbone: Backbone, device: torch.device) -> Backbone:
    """The backbone, whose blocks visit the device one by one; the rest of it is there."""
    blocks = backbone.blocks
    assert isinstance(blocks, nn.ModuleList), "a transformer"
    for name, child in backbone.named_children():
        if name != "blocks":
            child.to(device)
    for name, own in list(backbone.named_parameters(recurse=False)):
        setattr(backbone, name, nn.Parameter(own.detach().to(device), requires_grad=False))
    for name, own in list(backbone.named_buffers(recurse=False)):
        setattr(backbone, name, own.to(device))
    if device.type == "cuda":  # from other memory a copy waits for the kernels
        for tensor in (*blocks.parameters(), *blocks.buffers()):
            tensor.data = tensor.data.pin_memory()
    stream(blocks, lambda: device, ahead=True, alone=_keys_values)
    return backbone


def _keys_values(block: nn.Module) -> tuple[nn.Module, ...]:
    """What `VideoDiT.encode_condition` calls of a block."""
    cross = getattr(block, "cross_attention", None)
    return () if cross is None else (cross.key_value, cross.norm.key)


def _bytes(model: object, device: torch.device | None = None) -> int:
    """Of all weights, or of those on a device."""
    tensors = (*model.parameters(), *model.buffers()) if isinstance(model, nn.Module) else ()
    return sum(each.nbytes for each in tensors if device is None or each.device.type == device.type)
