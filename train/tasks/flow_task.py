"""One training step of the backbone: flow matching on precomputed latents (Movie Gen, section 3.1.2)."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from kinoflow.conditioning.prompt_encoder import PromptEncoder
from kinoflow.configs.errors import UserError, one_line
from kinoflow.configs.files import folder_fingerprint, seeded
from kinoflow.configs.pretrained import Weights, load_config, misfit, part_folder
from kinoflow.data.clips.buckets import Bucket, check_batches, parse
from kinoflow.data.clips.order import Sampler
from kinoflow.data.latents.sets import LatentSets
from kinoflow.data.video import read, write
from kinoflow.data.video.sheet import contact_sheet
from kinoflow.data.world import caption, sample_scene
from kinoflow.dit_video import DiTConfig, VideoDiT
from kinoflow.dit_video.flow.matching import dropped_texts, time_quantile
from kinoflow.dit_video.lora import Merged
from kinoflow.dit_video.parallel import parallelize
from kinoflow.sample.generate import generate
from kinoflow.sample.release import text_config
from kinoflow.tae import TAE, accelerate
from kinoflow.train.plan.flops import dit_flops, total
from kinoflow.train.run.averages import AveragedState
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.processes import Processes, from_first
from kinoflow.train.run.spread import Spread
from kinoflow.train.run.task import Base, Loss, Parts
from kinoflow.train.tasks import lora
from kinoflow.train.tasks.flow import FlowBatch, by_quarter, embeddings, flow_loss
from kinoflow.train.tasks.held_out import HeldOut, held_out_loss

PREVIEW_CLIPS = 6


class FlowTask:
    """Mean squared error of the velocity, text dropped now and then for classifier-free guidance."""

    discriminator: nn.Module | None = None

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        # `prepare` gives the values, block by block: the whole may fit nowhere.
        with torch.device("meta"):
            self.model: VideoDiT = VideoDiT(config.dit)
        self._earlier: Weights | None = None
        self._replicas = 1
        if config.init_from is not None:
            self._earlier = _earlier(part_folder(config.init_from, "dit"), self.model)
            if config.lora.rank:
                lora.inject(self.model, config.lora, config.init_from)

    def prepare(self, spread: Spread) -> None:
        """Spread the backbone and give it values; see that previews and held-out clips are there.

        Raises:
            UserError: previews without a release or prompts, held-out clips that are none, or processes that
                the heads, or the clips of a bucket's batch, do not divide among.
        """
        self._replicas = spread.processes.replicas
        if self.config.preview_every:
            _ = self.release, self.prompts
        if self.config.validation.every:
            _ = self.held_out
        if self.config.data.latents is not None:
            check_batches(self.buckets, self.config.data.batch_size, spread.slices)
        gathered = self.config.deepspeed.zero_stage == 3
        parallelize(self.model, self.config.parallel, spread.group, gathered=gathered)
        blocks = self.model.blocks
        units = [*blocks, *(child for child in self.model.children() if child is not blocks), self.model]
        spread.materialize(self.model, units, self._fill)

    def _fill(self, name: str, value: Tensor) -> None:
        """Write the starting value of a parameter: the earlier stage's, else a random one."""
        own = lora.base_name(name)
        if own is None:
            lora.init_parameter(name, value)
        elif self._earlier is None:
            self.model.init_parameter(own, value)
        else:
            self.model.continue_parameter(own, value, self._earlier[own])

    @cached_property
    def latents(self) -> LatentSets:
        """The precomputed folders; an export does not need them."""
        if self.config.data.latents is None:
            raise UserError("data.latents: name the folder that `kinoflow train precompute` wrote")
        dataset = LatentSets(self.config.data.latents)
        if dataset.index.widths != self.config.dit.text_widths:
            raise UserError(
                f"dit.text_widths: {self.config.dit.text_widths}, but {self._place} holds text "
                f"states of widths {dataset.index.widths}"
            )
        return dataset

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The buckets of the latents, in their order, as data.buckets weighs them where it is given."""
        stored = [parse(name) for name in self.latents.buckets]
        if self.config.data.buckets is None:
            return stored
        wanted = {_shape(bucket): bucket for bucket in map(parse, self.config.data.buckets)}
        missing = wanted.keys() - {_shape(bucket) for bucket in stored}
        if missing:
            raise UserError(
                f"data.buckets: {wanted[min(missing)]} is not in {self._place}, which holds "
                f"{', '.join(self.latents.buckets)}; precompute it or leave it out"
            )
        return [wanted.get(_shape(bucket), replace(bucket, weight=0.0)) for bucket in stored]

    @cached_property
    def sampler(self) -> Sampler:
        """Which clips each step takes."""
        return Sampler(
            [self.latents.lengths(name) for name in self.latents.buckets],
            weights=[bucket.weight for bucket in self.buckets],
            batch_sizes=[bucket.batch_size or self.config.data.batch_size for bucket in self.buckets],
            seed=self.config.seed,
            set_weights=self.latents.weights,
        )

    @property
    def _place(self) -> str:
        """Where the latents are, for messages."""
        return ", ".join(self.config.data.latents or ())

    @property
    def base(self) -> Base | None:
        """All but the adapters, where there are some: init_from has it."""
        if not self.config.lora.rank:
            return None
        assert self.config.init_from is not None, "the configuration asks for it"
        names = frozenset(name for name, value in self.model.named_parameters() if not value.requires_grad)
        return Base(names=names, fingerprint=folder_fingerprint(part_folder(self.config.init_from, "dit")))

    @property
    def source(self) -> str:
        """Of the latents, wherever their folders lie."""
        return self.latents.fingerprint

    def names(self, step: int, index: int, slices: int) -> list[str]:
        """Where the latents of a batch lie."""
        draw = self.sampler.draw(step, index, slices)
        return [self.latents.place(self.latents.buckets[draw.bucket], i) for i in draw.indices.tolist()]

    def batch(self, step: int, index: int, slices: int) -> FlowBatch:
        draw = self.sampler.draw(step, index, slices)
        count = len(draw.indices)
        total, first = count * slices, count * index
        rng = np.random.default_rng(seeded("times", self.config.seed, step))
        shared, level = rng.permutation(total), rng.random(total)
        levels = ((shared + level) / total)[first : first + count]
        choices = self._text_choices(rng, total)[first : first + count]
        clips = self.latents.get(self.latents.buckets[draw.bucket], draw.indices, choices)
        noise = [self._noise(clips.latent[0].shape, step, first + i) for i in range(count)]
        time = time_quantile(torch.from_numpy(levels).clamp(1e-6, 1 - 1e-6), self.config.flow).float()
        dropout = torch.tensor(seeded("dropout", self.config.seed, step, first))
        return FlowBatch(
            latent=clips.latent, noise=torch.stack(noise), time=time, texts=embeddings(clips), dropout=dropout
        )

    def _text_choices(self, rng: np.random.Generator, total: int) -> np.ndarray:
        """A caption for each clip and encoder; -1 drops it: all encoders at once, or each alone."""
        encoders, flow = len(self.latents.index.widths), self.config.flow
        caption = rng.integers(self.latents.index.captions_per_clip, size=(total, 1))
        levels = torch.from_numpy(rng.random((total, 1))), torch.from_numpy(rng.random((total, encoders)))
        return np.where(dropped_texts(*levels, flow).numpy(), -1, caption)

    def _noise(self, shape: Sequence[int], step: int, position: int) -> Tensor:
        generator = torch.Generator().manual_seed(seeded("noise", self.config.seed, step, position))
        return torch.randn(tuple(shape), generator=generator)

    def loss(self, model: nn.Module, batch: FlowBatch, step: int) -> Loss:  # noqa: ARG002
        """The step itself changes nothing here; the autoencoder's adversarial term is what asks for it.

        The parts are the loss of each quarter of the flow's times: noise alone is at 0, the clip at 1.
        """
        if self.config.lora.dropout:  # nothing else draws from torch's own generator while a run goes on
            torch.manual_seed(int(batch.dropout))
        loss = flow_loss(model, batch, self.config.flow)
        return Loss(total=loss.mean(), parts=by_quarter(loss.detach(), batch.time))

    def discriminator_loss(
        self, discriminator: nn.Module, batch: FlowBatch, output: Tensor | None, step: int
    ) -> None:
        """There is none."""

    def preview(self, model: nn.Module, folder: Path, step: int, processes: Processes) -> None:
        """A clip of each prompt, with the same noise at every preview: an mp4 each and one contact sheet.

        The prompts are shared out: with as many replicas as prompts it takes as long as one of them.
        """
        bucket, prompts = max(self.buckets, key=_size), self.prompts
        rounds = -(-len(prompts) // processes.replicas)
        own = [processes.replica + i * processes.replicas for i in range(rounds)]
        if self.config.deepspeed.zero_stage < 3:
            own = [i for i in own if i < len(prompts)]
        for i in own:
            clip = self._generate(model, prompts[i % len(prompts)], i, bucket)
            if i < len(prompts) and processes.rank % processes.sequence == 0:
                metadata = {"prompt": prompts[i], "step": str(step)}
                write(folder / f"{i}.mp4", clip, fps=bucket.fps, metadata=metadata)
        from_first(None, processes)  # all are written
        if processes.rank == 0:
            clips = [read(folder / f"{i}.mp4") for i in range(len(prompts))]
            contact_sheet(folder / "samples.png", clips, columns=6, captions=prompts)

    @cached_property
    def prompts(self) -> list[str]:
        """What previews show: the lines of a file, captions of held-out scenes of the toy world, or of clips.

        Raises:
            UserError: the file cannot be read or is empty.
        """
        source = self.config.preview_prompts
        if source == "world":
            return [caption(sample_scene(i, split="heldout"), i, complete=True) for i in range(PREVIEW_CLIPS)]
        if source is not None:
            return _read_prompts(Path(source))
        largest = self.latents.buckets[self.buckets.index(max(self.buckets, key=_size))]
        count = min(PREVIEW_CLIPS, self.latents.num_clips(largest))
        return [self.latents.captions(largest, clip)[0] for clip in range(count)]

    @property
    def release(self) -> Path:
        """Where previews find the autoencoder and the text encoders.

        Raises:
            UserError: there is no such folder.
        """
        if self.config.release is None or not Path(self.config.release, "tae").is_dir():
            found = "" if self.config.release is None else f"{self.config.release} has no tae/; "
            raise UserError(f"release: {found}name the folder whose tae/ and text/ make the previews, or set "
                            "preview_every=0")  # fmt: skip
        return Path(self.config.release)

    def _generate(self, model: nn.Module, prompt: str, seed: int, bucket: Bucket) -> np.ndarray:
        tae, encoder = self._frozen
        training = model.training
        frames = generate(
            cast(VideoDiT, model.eval()), tae, encoder, [prompt], frames=bucket.frames, height=bucket.height,
            width=bucket.width, fps=Fraction(bucket.fps), num_steps=25, seeds=[seed],
        )  # fmt: skip
        model.train(training)
        return frames[0].numpy()

    @cached_property
    def _frozen(self) -> tuple[TAE, PromptEncoder]:
        device, release = next(self.model.parameters()).device, self.release
        tae = accelerate(TAE.from_pretrained(release / "tae").to(device))
        return tae, PromptEncoder.of_release(release, text_config(release)).to(device)

    @cached_property
    def held_out(self) -> HeldOut:
        """The clips of validation.latents, in batches of the size that a training step has.

        Raises:
            UserError: they are those that it learns from, or were made with other encoders.
        """
        choice, config = self.config.validation, self.config
        assert choice.latents is not None, "the configuration asks for it"
        slices = config.data.batch_size // config.deepspeed.accumulation
        found = HeldOut(choice.latents, choice.clips, max(slices // self._replicas, 1))
        if self.latents.holds(found.latents):
            raise UserError(f"validation.latents: {choice.latents} holds the clips of data.latents; "
                            "precompute others")  # fmt: skip
        found.require(self.latents.index.made_from, self._place)
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
        """Video tokens of the batch."""
        t, h, w = self.model.grid(*batch.latent.shape[2:])
        return len(batch.latent) * t * h * w

    def flops(self, batch: FlowBatch) -> float:
        """Forward and backward of the batch, as MFU counts them; the adapters' own are left out.

        A frozen weight costs its product once more in the backward pass, and attention twice as ever.
        """
        t, h, w = self.model.grid(*batch.latent.shape[2:])
        text = [embedding.hidden.shape[1] for embedding in batch.texts]
        clip = total(dit_flops(self.config.dit, t * h * w, text))
        return len(batch.latent) * (
            2 * clip.forward + clip.attention if self.config.lora.rank else clip.model
        )

    def export(self, state: AveragedState, folder: Path) -> None:
        """Write `folder`/dit in fp16, adapters merged, a few of its tensors in memory at a time."""
        if not self.config.lora.rank:
            self.model.save_pretrained(folder / "dit", dtype=torch.float16, read=state.read)
            return
        assert self._earlier is not None, "adapters have what they change"
        merged = Merged(self._earlier, [lora.trained(self.config.lora, state, self.config.run)])
        with torch.device("meta"):
            model = VideoDiT(self.config.dit)
        shapes = {name: value.shape for name, value in model.named_parameters()}

        def read(names: Sequence[str], dtype: torch.dtype | None) -> dict[str, Tensor]:
            found = {name: torch.empty(shapes[name], dtype=dtype) for name in names}
            for name, value in found.items():
                model.continue_parameter(name, value, merged[name].float())
            return found

        model.save_pretrained(folder / "dit", dtype=torch.float16, read=read)

    def export_adapter(self, state: AveragedState, folder: Path) -> None:
        """Write the adapters alone into `folder`, as peft does."""
        lora.write(self.model, state, folder)


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"preview_prompts: {path} cannot be read ({one_line(error)}); name a text file "
                        "with a prompt on each line, or world") from None  # fmt: skip
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"preview_prompts: {path} is empty; write a prompt on each line")
    return prompts


def _size(bucket: Bucket) -> tuple[int, float]:
    """By which a preview takes the largest bucket."""
    return bucket.frames, bucket.weight


def _shape(bucket: Bucket) -> tuple[int, int, int, Fraction]:
    return bucket.frames, bucket.height, bucket.width, bucket.fps


def _earlier(folder: Path, model: VideoDiT) -> Weights:
    """The weights of an earlier stage, which `model` goes on from with position tables at least as long.

    Raises:
        UserError: it differs in more than that, or its tables are longer.
    """
    before, config = load_config(folder, DiTConfig), model.config
    if replace(before, max_tokens=config.max_tokens, attention=config.attention) != config:
        raise UserError(f"dit: {folder} is another model ({before}); give this run the same dit.*")
    for axis, old, new in zip(("time", "height", "width"), before.max_tokens, config.max_tokens, strict=True):
        if new < old:
            raise UserError(
                f"dit.max_tokens: the {axis} table of {folder} has {old} rows and cannot shrink to {new}"
            )
    weights = Weights(folder)
    if different := weights.keys() ^ dict(model.named_parameters()).keys():
        raise misfit(min(different), folder)
    return weights
