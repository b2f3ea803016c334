"""One training step of a backbone: flow matching on precomputed latents (Movie Gen, section 3.1.2)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kinoflow.conditioning.labels import Labels
from kinoflow.configs.errors import UserError
from kinoflow.configs.files import folder_fingerprint
from kinoflow.configs.pretrained import Weights, load_config, misfit, part_folder
from kinoflow.data.clips.buckets import check_batches
from kinoflow.dit_video.backbone import BACKBONES, Backbone, BackboneConfig
from kinoflow.dit_video.lora import Adapter, Merged
from kinoflow.dit_video.mmdit import MMDiT, MMDiTConfig
from kinoflow.dit_video.parallel import parallelize
from kinoflow.dit_video.released import Released, read_shape
from kinoflow.dit_video.unet import UNet, UNetConfig
from kinoflow.dit_video.video_dit import DiTConfig, VideoDiT
from kinoflow.sample.stable_diffusion import is_diffusers
from kinoflow.train.plan.flops import dit_flops, mmdit_flops, total
from kinoflow.train.run.averages import AveragedState
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.processes import Processes
from kinoflow.train.run.spread import Spread
from kinoflow.train.run.task import Base, Loss, Parts
from kinoflow.train.tasks import lora
from kinoflow.train.tasks.distill import Distillation
from kinoflow.train.tasks.flow import FlowBatch, by_quarter, flow_loss
from kinoflow.train.tasks.flow_data import FlowData
from kinoflow.train.tasks.flow_preview import Previews
from kinoflow.train.tasks.held_out import HeldOut, held_out_loss


class FlowTask:
    """Mean squared error of the velocity, text or label dropped now and then for classifier-free guidance.

    The backbone is that of `config.model`: a DiT, an MM-DiT or a U-Net.
    """

    discriminator: nn.Module | None = None
    _distillation: Distillation | None = None

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        # `prepare` gives the values, block by block: the whole may fit nowhere.
        with torch.device("meta"):
            self.model: Backbone = _built(config)
        self.data = FlowData(config, self.model.config)
        self.previews = Previews(config, self.data)
        self._earlier: Mapping[str, Tensor] | None = None
        self._adapters: Adapter | None = None
        self._slices = config.deepspeed.accumulation
        if config.init_from is not None:
            self._earlier = _weights_of(config.init_from, config.model, self.model)
            if config.lora.rank:
                lora.inject(self.model, config.lora, config.init_from)
            if config.lora.init_from is not None:
                self._adapters = lora.earlier(config.lora)

    def prepare(self, spread: Spread) -> None:
        """Spread the backbone and give it values; see that previews and held-out clips are there.

        Raises:
            UserError: latents that the backbone cannot take, previews without a release or prompts, held-out
                clips that are none, or processes that the heads, or the clips of a bucket's batch, do not
                divide among.
        """
        self._slices = spread.slices
        if self.config.data.latents is not None:
            check_batches(self.data.buckets, self.config.data.batch_size, spread.slices)
            self._check_sizes()
        if self.config.preview_every:
            self.previews.check()
        if self.config.validation.every:
            _ = self.held_out
        if not isinstance(self.model, UNet):
            gathered = self.config.deepspeed.zero_stage == 3
            parallelize(self.model, self.config.parallel, spread.group, gathered=gathered)
        spread.materialize(self.model, _units(self.model), self._fill)
        if self.config.distill.steps:
            self._distillation = Distillation(self.config, spread)

    def _check_sizes(self) -> None:
        for name, sizes in self.data.sizes().items():
            try:
                self.model.grid(*sizes)
            except ValueError as error:
                raise UserError(f"data.buckets: {name}: {error}") from None

    def _fill(self, name: str, value: Tensor) -> None:
        """Write the starting value of a parameter: the earlier stage's, else a random one."""
        own = lora.base_name(name)
        if own is None:
            lora.init_parameter(name, value, self._adapters)
        elif self._earlier is None or own not in self._earlier:
            self.model.init_parameter(own, value)
        else:
            self.model.continue_parameter(own, value, self._earlier[own])

    @property
    def base(self) -> Base | None:
        """All but the adapters, where there are some: init_from has it."""
        if not self.config.lora.rank:
            return None
        assert self.config.init_from is not None, "the configuration asks for it"
        names = frozenset(name for name, value in self.model.named_parameters() if not value.requires_grad)
        return Base(
            names=names, fingerprint=folder_fingerprint(part_folder(self.config.init_from, self.config.model))
        )

    @property
    def source(self) -> str:
        """Of the latents, wherever their folders lie."""
        return self.data.latents.fingerprint

    def names(self, step: int, index: int, slices: int) -> list[str]:
        """Where the latents of a batch lie."""
        return self.data.names(step, index, slices)

    def batch(self, step: int, index: int, slices: int) -> FlowBatch:
        """The slice, from (seed, step, position) alone."""
        return self.data.batch(step, index, slices)

    def loss(self, model: nn.Module, batch: FlowBatch, step: int) -> Loss:
        """Of the flow, whatever the step, or of a student, of which each step teaches one interval.

        The parts are the loss of each quarter of the flow's times: noise alone is at 0, the clip at 1.
        """
        if self.config.lora.dropout:  # nothing else draws from torch's own generator while a run goes on
            torch.manual_seed(int(batch.dropout))
        if self._distillation is not None:
            loss, time = self._distillation.loss(model, batch, step)
        else:
            loss, time = flow_loss(model, batch, self.config.flow), batch.time
        return Loss(total=loss.mean(), parts=by_quarter(loss.detach(), time))

    def discriminator_loss(
        self, discriminator: nn.Module, batch: FlowBatch, output: Tensor | None, step: int
    ) -> None:
        """There is none."""

    def preview(self, model: nn.Module, folder: Path, step: int, processes: Processes) -> None:
        """A clip of each prompt, or a picture of each class."""
        self.previews.write(model, folder, step, processes)

    @cached_property
    def held_out(self) -> HeldOut:
        """The clips of validation.latents, in batches of the size that a training step has.

        Raises:
            UserError: they are those that it learns from, or were made with other encoders.
        """
        choice, config = self.config.validation, self.config
        assert choice.latents is not None, "the configuration asks for it"
        found = HeldOut(choice.latents, choice.clips, max(config.data.batch_size // self._slices, 1))
        own = self.data.latents
        if own.holds(found.latents):
            raise UserError(f"validation.latents: {choice.latents} holds the clips of data.latents; "
                            "precompute others")  # fmt: skip
        found.require(own.index.made_from, own.index.classes, self.data.place, own.index.upsample)
        return found

    def validate(self, model: nn.Module, processes: Processes) -> Parts:
        """The flow loss of the held-out clips."""
        return held_out_loss(model, self.held_out, self.config.flow, processes)

    def close(self) -> None:
        """Nothing is open."""

    def samples(self, batch: FlowBatch) -> int:
        """Clips of the batch."""
        return len(batch.latent)

    def tokens(self, batch: FlowBatch) -> int:
        """Video tokens of the batch, or cells of its pictures."""
        t, h, w = self.model.grid(*batch.latent.shape[2:])
        return len(batch.latent) * t * h * w

    def flops(self, batch: FlowBatch) -> float:
        """Forward and backward of the batch, as MFU counts them; the adapters' own are left out.

        A frozen weight costs its product once more in the backward pass, and attention twice as ever. Of a
        student all forward passes count, its teacher's and its own. Those of a U-Net are not counted.
        """
        if isinstance(self.model, UNet):
            return 0.0
        t, h, w = self.model.grid(*batch.latent.shape[2:])
        told = batch.condition
        text = [] if isinstance(told, Labels) else [embedding.hidden.shape[1] for embedding in told]
        if isinstance(self.model, MMDiT):
            clip = total(mmdit_flops(self.config.mmdit, t * h * w, text))
        else:
            clip = total(dit_flops(self.config.dit, t * h * w, text))
        step = 2 * clip.forward + clip.attention if self.config.lora.rank else clip.model
        return len(batch.latent) * (step + clip.forward * self.config.distill.passes)

    def export(self, state: AveragedState, folder: Path) -> None:
        """Write the backbone into `folder` in fp16, adapters merged, a few tensors in memory at a time."""
        part = folder / self.config.model
        if not self.config.lora.rank:
            self.model.save_pretrained(part, dtype=torch.float16, read=state.read)
            return
        assert isinstance(self._earlier, Weights), "adapters change what a release of ours has"
        merged = Merged(self._earlier, [lora.trained(self.config.lora, state, self.config.run)])
        with torch.device("meta"):
            model = _built(self.config)
        shapes = {name: value.shape for name, value in model.named_parameters()}

        def read(names: Sequence[str], dtype: torch.dtype | None) -> dict[str, Tensor]:
            found = {name: torch.empty(shapes[name], dtype=dtype) for name in names}
            for name, value in found.items():
                model.continue_parameter(name, value, merged[name].float())
            return found

        model.save_pretrained(part, dtype=torch.float16, read=read)

    def export_adapter(self, state: AveragedState, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the adapters alone into `folder`, as peft does."""
        lora.write(self.model, state, folder, dtype)


def _built(config: RunConfig) -> Backbone:
    if config.model == "unet":
        return UNet(config.unet)
    return MMDiT(config.mmdit) if config.model == "mmdit" else VideoDiT(config.dit)


def _units(model: Backbone) -> Iterator[nn.Module]:
    """Pieces of a model that fit into memory one by one: blocks and levels first, then the rest, then all."""
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    for several in lists:
        yield from several
    yield from (child for child in model.children() if not isinstance(child, nn.ModuleList))
    yield model


def _weights_of(source: str, name: str, model: Backbone) -> Mapping[str, Tensor]:
    """What `model` goes on from: a release of ours, or Stable Diffusion's transformer under our names.

    Raises:
        UserError: another model.
    """
    folder = Path(source) / "transformer"
    if not isinstance(model, MMDiT) or not is_diffusers(folder.parent):
        return _earlier(part_folder(source, name), name, model)
    before, _ = read_shape(folder)
    if replace(before, attention=model.config.attention) != model.config:
        raise UserError(f"{name}: {folder} is another model ({before}); give this run the same {name}.*")
    return Released(folder, before)


def _earlier(folder: Path, name: str, model: Backbone) -> Weights:
    """The weights of an earlier stage, which `model` goes on from with position tables at least as long.

    Raises:
        UserError: it differs in more than that, or its tables are longer.
    """
    before, config = load_config(folder, BACKBONES[name].config_type), model.config
    grown: dict[str, Any] = {} if isinstance(config, UNetConfig) else {"max_tokens": config.max_tokens}
    fresh: set[str] = set()
    if isinstance(config, DiTConfig):
        if before.known and not config.known:
            line = "reads what is known of a clip; give this run dit.known=true"
            raise UserError(f"dit.known: {folder} {line}")
        grown["known"] = config.known  # it begins to read it: with weights of zero
        if config.known and not before.known:
            fresh |= {"known.weight"}
        if config.shown_variance and not before.shown_variance:  # what the head adds: nothing yet
            grown["shown_variance"] = config.shown_variance
            fresh |= {"head.weight", "head.bias"}
    if replace(before, attention=config.attention, **grown) != config:
        raise UserError(f"{name}: {folder} is another model ({before}); give this run the same {name}.*")
    lengths = _tables(before), _tables(config)
    for axis, old in lengths[0].items():
        if lengths[1][axis] < old:
            raise UserError(f"{name}.max_tokens: the {axis} table of {folder} has {old} rows and cannot "
                            f"shrink to {lengths[1][axis]}")  # fmt: skip
    weights = Weights(folder, without=fresh)
    if different := weights.keys() ^ (dict(model.named_parameters()).keys() - fresh):
        raise misfit(min(different), folder)
    return weights


def _tables(config: BackboneConfig) -> dict[str, int]:
    """Rows of its tables of positions, by axis."""
    if isinstance(config, UNetConfig):
        return {}
    if isinstance(config, MMDiTConfig):
        return dict.fromkeys(("height", "width"), config.max_tokens)
    return dict(zip(("time", "height", "width"), config.max_tokens, strict=True))
