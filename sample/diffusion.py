"""A release as a pipeline of diffusers: what the folders of `kinoflow sample export-diffusers` run.

Their `pipeline.py` and the files beside their parts import this module and no more, so that the frames are
those of `kinoflow sample` of the kinoflow that is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor, nn

from kinoflow.conditioning.checkpoints import TextConfig
from kinoflow.conditioning.prompt_encoder import PromptEncoder
from kinoflow.configs.errors import UserError
from kinoflow.configs.pretrained import load_config
from kinoflow.configs.schema import from_dict
from kinoflow.dit_video.video_dit import VideoDiT
from kinoflow.sample.best import Take
from kinoflow.sample.card import ReleaseConfig
from kinoflow.sample.generate import SolverName
from kinoflow.sample.pipeline import Pipeline, Plan
from kinoflow.sample.release import Release
from kinoflow.sample.request import ClipRequest
from kinoflow.tae.cpu.accelerate import accelerate
from kinoflow.tae.model.config import TAEConfig
from kinoflow.tae.model.tae import TAE

_KINDS = ("pil", "np", "pt", "latent")
# Called after each step with the pipeline, the step, its flow time and what it may look at: nothing.
StepCallback = Callable[[DiffusionPipeline, int, Tensor, dict[str, Any]], object]


class _Part(nn.Module):
    """What diffusers asks of a component beside its weights."""

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.parameters()).dtype


class _KeepsItsNumbers(_Part):
    """Moves to any device; `pipeline.to(torch.bfloat16)` means the transformer, as --dtype does."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _KeepsItsNumbers:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class Dit(_Part, VideoDiT):
    """The video transformer: dit/ of a release."""

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        folder: str | Path,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **_: object,
    ) -> Dit:
        """Read the folder, in fp32 without a dtype. Raises UserError for a damaged file."""
        return super().from_pretrained(folder).to(dtype=dtype or torch_dtype)


class Tae(_KeepsItsNumbers, TAE):
    """The temporal autoencoder: tae/ of a release, always in fp32."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: object) -> Tae:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Read the folder, whatever dtype is asked for. Raises UserError for a damaged file."""
        return accelerate(super().from_pretrained(folder))  # pyright: ignore[reportReturnType]


class Text(_KeepsItsNumbers, PromptEncoder):
    """The three text encoders: text/ of a release, in the number type that its config.json names."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: object) -> Text:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Read the encoders that lie in the folder, or that its config.json names.

        Raises:
            UserError: a damaged file, or a hub that can't be reached.
        """
        config = load_config(Path(folder), TextConfig)
        sources = config.sources(Path(folder).parent)
        return super().from_pretrained(sources, dtype=config.torch_dtype, offload=config.offload)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class _Loaded(Release):
    """A release whose models are in memory already."""

    models: tuple[VideoDiT, TAE, PromptEncoder] = field(kw_only=True)

    @property
    def reads_known(self) -> bool:
        """See Release."""
        return self.models[0].config.known

    @property
    def tae_config(self) -> TAEConfig:
        """See Release."""
        return self.models[1].config

    def backbone(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> VideoDiT:
        """It is where diffusers has put it."""
        del device, dtype
        return self.models[0]

    def decoder(self, device: torch.device | str = "cpu") -> TAE:
        """It is where diffusers has put it."""
        del device
        return self.models[1]

    def encoder(self, text_cache: Path | None = None, device: torch.device | str = "cpu") -> PromptEncoder:
        """They are where diffusers has put them."""
        del text_cache, device
        return self.models[2]


@dataclass
class KinoflowOutput(BaseOutput):
    """Videos that were made."""

    frames: list[list[Image.Image]] | np.ndarray | Tensor
    """"pil": a list of pictures a video. "np": (videos, frames, height, width, 3), 0..1. "pt": (videos,
    frames, 3, height, width), 0..1. "latent": (videos, channels, frames, height, width), normalized."""


class KinoflowPipeline(DiffusionPipeline):
    """Makes videos of prompts, frame for frame those of `kinoflow sample` with the same seed.

    Args:
        dit, tae, text: the parts.
        release: what its kinoflow.yaml says; diffusers takes for a part what has no default.
    """

    _callback_tensor_inputs: Sequence[str] = ()

    def __init__(self, dit: Dit, tae: Tae, text: Text, release: dict | None = None) -> None:
        super().__init__()
        self.register_modules(dit=dit, tae=tae, text=text)
        self.register_to_config(release=release or {})

    def __call__(
        self,
        prompt: str | list[str],
        *,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: str | Fraction | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        seed: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = (),
        solver: SolverName | None = None,
        threads: int = 1,
    ) -> KinoflowOutput | tuple[Any]:
        """Videos of all prompts, one after the other; settings that are None are the release's.

        `seed` is the command's, or of several videos the first one's; a new `manual_seed(seed)` generator
        means the same. What a callback raises ends the work.

        Raises:
            UserError: what the release cannot make, in one line.
        """
        if callback_on_step_end_tensor_inputs:
            raise UserError("callback_on_step_end_tensor_inputs: a callback gets no tensors; leave it out")
        if output_type not in _KINDS:
            raise UserError(f"output_type: {output_type!r}; use one of {', '.join(_KINDS)}")
        common = ClipRequest(
            prompt="", negative=negative_prompt, frames=num_frames, width=width, height=height, solver=solver,
            fps=None if fps is None else Fraction(fps), steps=num_inference_steps, guidance=guidance_scale,
        )  # fmt: skip
        prompts = [prompt] if isinstance(prompt, str) else prompt
        prompts = [one for one in prompts for _ in range(num_videos_per_prompt)]
        pipeline, seeds = self._pipeline(threads), _seeds(len(prompts), seed, generator)
        pairs = zip(prompts, seeds, strict=True)
        plans = [pipeline.plan(replace(common, prompt=one, seed=own)) for one, own in pairs]
        steps = sum(plan.sampling.num_steps for plan in plans)
        with self.progress_bar(total=steps) as bar:  # pyright: ignore[reportCallIssue]
            told = [_Steps(self, plan, bar.update, callback_on_step_end) for plan in plans]
            latents = [pipeline.latent(*one) for one in zip(plans, told, strict=True)]
        frames = _output(pipeline, plans, latents, output_type)
        return KinoflowOutput(frames=frames) if return_dict else (frames,)

    def save_pretrained(self, *_: object, **__: object) -> None:
        """Refused: the folder it was read from is what can be copied.

        Raises:
            UserError: always.
        """
        raise UserError("save_pretrained: copy the folder, or write another with export-diffusers")

    def _pipeline(self, threads: int) -> Pipeline:
        card = from_dict(ReleaseConfig, self.config["release"])
        release = _Loaded(Path(), card, models=(self.dit, self.tae, self.text))
        return Pipeline(release, device=self.dit.device, dtype=self.dit.dtype, threads=threads)


class _Steps:
    """Progress of one flow: counts its velocities, and tells of its steps."""

    def __init__(
        self,
        owner: KinoflowPipeline,
        plan: Plan,
        advance: Callable[[], object],
        callback: StepCallback | None,
    ) -> None:
        self._owner, self._advance, self._callback = owner, advance, callback
        self._times, self._velocities = plan.sampling.times(), 0
        self._each = plan.sampling.num_evaluations // plan.sampling.num_steps

    def __call__(self, count: int) -> None:
        self._velocities += count
        step, rest = divmod(self._velocities, self._each)
        if rest:
            return
        self._advance()
        if self._callback is not None:
            self._callback(self._owner, step - 1, self._times[step - 1], {})


def _seeds(
    count: int, seed: int | None, generator: torch.Generator | list[torch.Generator] | None
) -> list[int]:
    """One for each video.

    Raises:
        UserError: a seed and generators, or not one generator for each video.
    """
    if seed is not None:
        if generator is not None:
            raise UserError("seed: given beside a generator; give one of the two")
        return [seed + number for number in range(count)]
    if isinstance(generator, list):
        if len(generator) != count:
            raise UserError(f"generator: {len(generator)} for {count} videos; give one for each, or one")
        return [_drawn(one) for one in generator]
    return [_drawn(torch.default_generator if generator is None else generator) for _ in range(count)]


def _drawn(generator: torch.Generator) -> int:
    """The generator's own seed while nothing was drawn from it, else one that is drawn; it moves on."""
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed()).get_state()
    own = generator.initial_seed() if torch.equal(fresh, generator.get_state()) else None
    drawn = torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device).item()
    return int(drawn) if own is None else own % 2**63


def _output(
    pipeline: Pipeline, plans: Sequence[Plan], latents: Sequence[Tensor], kind: str
) -> list[list[Image.Image]] | np.ndarray | Tensor:
    if kind == "latent":
        return torch.cat(list(latents))
    videos = [
        np.concatenate(list(pipeline.decode(plan, Take(latent=latent))))
        for plan, latent in zip(plans, latents, strict=True)
    ]
    if kind == "pil":
        return [[Image.fromarray(frame) for frame in video] for video in videos]
    floats = np.stack(videos).astype(np.float32) / 255
    return floats if kind == "np" else torch.from_numpy(floats).permute(0, 1, 4, 2, 3)
