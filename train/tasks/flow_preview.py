"""Samples of a backbone while it trains: a clip of each prompt, or a picture of each class."""

from dataclasses import fields
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from kinoflow.conditioning.labels import LabelEncoder
from kinoflow.conditioning.prompt_encoder import PromptEncoder
from kinoflow.configs.errors import UserError, one_line
from kinoflow.data.latents.index import PIXELS
from kinoflow.data.video import read
from kinoflow.data.video.sheet import contact_sheet
from kinoflow.data.world import caption, sample_scene
from kinoflow.dit_video.backbone import Backbone
from kinoflow.sample.card import text_config
from kinoflow.sample.generate import Sampling, generate
from kinoflow.sample.output import Output
from kinoflow.tae import TAE, accelerate
from kinoflow.tae.model.pixels import Pixels
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.processes import Processes, from_first
from kinoflow.train.tasks.distill import sampling_of
from kinoflow.train.tasks.flow_data import FlowData

PREVIEW_CLIPS = 6
PREVIEW_CLASSES = 20
_CRF = 18.0


class Previews:
    """What a run shows of its model, with the same noise at every preview."""

    def __init__(self, config: RunConfig, data: FlowData) -> None:
        self.config = config
        self.data = data
        self._frozen: tuple[TAE | Pixels, PromptEncoder | LabelEncoder] | None = None

    def check(self) -> None:
        """Raise UserError where there is no release, nothing to show, prompts for labels, or an upsampler."""
        if self.config.known.upsample:
            raise UserError("preview_every: previews are made of text, an upsampler makes none; set it to 0")
        _ = self.release, self.prompts

    def write(self, model: nn.Module, folder: Path, step: int, processes: Processes) -> None:
        """A clip of each prompt or class: a file each and one contact sheet.

        They are shared out: with as many replicas as prompts it takes as long as one of them.
        """
        prompts, suffix = self.prompts, ".png" if self.data.largest.frames == 1 else ".mp4"
        rounds = -(-len(prompts) // processes.replicas)
        own = [processes.replica + i * processes.replicas for i in range(rounds)]
        if self.config.deepspeed.zero_stage < 3:
            own = [i for i in own if i < len(prompts)]
        for i in own:
            clip = self._generate(model, prompts[i % len(prompts)], i, processes.device)
            if i < len(prompts) and processes.rank % processes.sequence == 0:
                bucket, metadata = self.data.largest, {"prompt": prompts[i], "step": str(step)}
                size = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width}
                out = Output(folder / f"{i}{suffix}", **size, fps=bucket.fps, crf=_CRF, metadata=metadata)
                out.write([clip])
        from_first(None, processes)  # all are written
        if processes.rank == 0:
            clips = [read(folder / f"{i}{suffix}") for i in range(len(prompts))]
            contact_sheet(folder / "samples.png", clips, columns=6, captions=prompts)

    @cached_property
    def prompts(self) -> list[str]:
        """What previews show: the lines of a file, captions of held-out scenes of the toy world, or of clips.

        Of clips with labels the names of the classes, up to `PREVIEW_CLASSES` of them.

        Raises:
            UserError: the file cannot be read or is empty, or the clips have labels.
        """
        source = self.config.preview_prompts
        if self.data.backbone.classes:
            if source is not None:
                raise UserError("preview_prompts: a run that learns classes shows each of them; leave it out")
            return list(self.data.latents.index.classes[:PREVIEW_CLASSES])
        if source == "world":
            return [caption(sample_scene(i, split="heldout"), i, complete=True) for i in range(PREVIEW_CLIPS)]
        if source is not None:
            return _read_prompts(Path(source))
        latents = self.data.latents
        largest = latents.buckets[self.data.buckets.index(self.data.largest)]
        count = min(PREVIEW_CLIPS, latents.num_clips(largest))
        return [latents.captions(largest, clip)[0] for clip in range(count)]

    @property
    def release(self) -> Path | None:
        """Where previews find the autoencoder and the text encoders; None where they need neither.

        Raises:
            UserError: there is no such folder.
        """
        if self._pixels:
            return None
        if self.config.release is None or not Path(self.config.release, "tae").is_dir():
            found = "" if self.config.release is None else f"{self.config.release} has no tae/; "
            raise UserError(f"release: {found}name the folder whose tae/ and text/ make the previews, or set "
                            "preview_every=0")  # fmt: skip
        return Path(self.config.release)

    @property
    def _pixels(self) -> bool:
        """Whether the latents are pixels; only those of labelled pictures are."""
        return bool(self.data.backbone.classes) and self.data.latents.index.made_from["tae"] == PIXELS

    def _generate(self, model: nn.Module, prompt: str, seed: int, device: torch.device) -> np.ndarray:
        if self._frozen is None:
            self._frozen = self._load(device)
        training, bucket, flow = model.training, self.data.largest, self.config.flow
        chosen = Sampling(num_steps=25, path=flow.path, objective=flow.objective)
        if self.config.distill.steps:
            chosen = sampling_of(self.config)
        frames = generate(
            cast(Backbone, model.eval()), *self._frozen, [prompt], frames=bucket.frames,
            height=bucket.height, width=bucket.width, fps=Fraction(bucket.fps), seeds=[seed],
            **{each.name: getattr(chosen, each.name) for each in fields(chosen)},
        )  # fmt: skip
        model.train(training)
        return frames[0].numpy()

    def _load(self, device: torch.device) -> tuple[TAE | Pixels, PromptEncoder | LabelEncoder]:
        """What makes frames of latents, and conditions of prompts."""
        release, index = self.release, self.data.latents.index
        if release is None:
            return Pixels(len(index.latent_mean)), LabelEncoder(index.classes)
        tae = accelerate(TAE.from_pretrained(release / "tae").to(device))
        if index.classes:
            return tae, LabelEncoder(index.classes)
        return tae, PromptEncoder.of_release(release, text_config(release)).to(device)


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
