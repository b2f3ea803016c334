"""`Pipeline`: a release with its models in memory, which makes videos of prompts or classes.

The command, the server and Python programs go through it, so that all of them give the same frames. `batch`
says how several are made at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kinoflow.conditioning.embedding import Condition
from kinoflow.configs.devices import name_of, parse_device, parse_dtype
from kinoflow.configs.errors import UserError
from kinoflow.sample.batch import alive, in_threads, on_threads
from kinoflow.sample.best import Take, best_take
from kinoflow.sample.cache import Passes
from kinoflow.sample.generate import SolverName, decode_pieces, null_condition
from kinoflow.sample.guidance import GuidanceKind
from kinoflow.sample.larger import enlarged, own_upsampler, require_upsampler, upsampled, with_clip
from kinoflow.sample.latents import autoencoder, solved
from kinoflow.sample.metadata import metadata
from kinoflow.sample.models import Models
from kinoflow.sample.plan import Plan, Video, planned
from kinoflow.sample.processes import Team, Way, way_for
from kinoflow.sample.release import Release
from kinoflow.sample.request import ClipRequest
from kinoflow.sample.rewritten import Prompts
from kinoflow.sample.stable_diffusion import open_release
from kinoflow.sample.upsample import decode_stills
from kinoflow.tae.model.pixels import Pixels
from kinoflow.tae.model.tae import TAE
from kinoflow.tae.tiles.tiled import DEFAULT_MEMORY

T = TypeVar("T")
R = TypeVar("R")
# Called with the velocities or frames that were just made; what it raises ends the work.
Progress = Callable[[int], None]


class Pipeline:
    """A release that makes videos; its models are read when the first one is asked for.

    Args:
        device: of the models.
        dtype: of the backbone's weights; flow time, the state of the flow and the autoencoder stay in fp32.
        threads: of the CPU for each clip. It decides how kernels round, so it belongs to the settings that
            give equal frames; 1 is what the command has.
        memory: bytes that the weights may take on the device, and the tiles in which a large clip is decoded
            (of each clip of a batch). Where the models do not fit together they are read one after the other,
            and one clip is made at a time; a GPU's blocks of the backbone may come one by one. None is
            `DEFAULT_MEMORY` for the tiles and no limit for weights. The frames are the same.
        text_cache: folder that keeps the text states of prompts.
        lora: the adapters of the release by name, for the metadata.
        rewrite: folder, hub id or server of a language model that makes a caption of each prompt first, as
            --rewrite has it. Calls and batches go through it; plans are of prompts as they stand.
        team: other processes that compute a part of each clip.
        upsampler: what makes each clip larger once it is there.
    """

    def __init__(
        self,
        release: Release,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
        memory: int | None = None,
        text_cache: Path | None = None,
        lora: Sequence[str] = (),
        rewrite: str | None = None,
        team: Team | None = None,
        upsampler: Pipeline | None = None,
    ) -> None:
        if threads < 1:
            raise UserError(f"threads: {threads}; use 1 or more")
        self.release, self.device, self.dtype = release, torch.device(device), dtype
        self.threads, self.memory, self._lora = threads, memory or DEFAULT_MEMORY, tuple(lora)
        self.reworded = Prompts(rewrite, release, self.device)
        self.team, self.upsampler = team, upsampler
        self.models = Models(
            release, device=self.device, dtype=dtype, text_cache=text_cache, team=team, limit=memory
        )
        if upsampler is not None:
            require_upsampler(upsampler.release)
        if team is not None and (upsampler or release.config.upsample.factor):
            raise UserError("upsample: one process makes clips larger; start it without torchrun")

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        revision: str | None = None,
        lora: Sequence[str] = (),
        device: str = "auto",
        dtype: str = "auto",
        threads: int = 1,
        memory: int | None = None,
        text_cache: Path | None = None,
        rewrite: str | None = None,
        team: Team | None = None,
        upsample: str | Path | None = None,
    ) -> Pipeline:
        """Open a folder or hub id, by default the shipped mini release; Stable Diffusion 3's are taken too.

        `upsample` is an upsampler's release, or "upsampler", the release's own; it makes each clip larger.
        `revision` is a branch, tag or commit of a hub id; `device` and `dtype` are as the command has them:
        "auto" takes the GPU where there is one, and bf16 on it.

        Raises:
            UserError: a missing or damaged file, a device that is not there, adapters that do not fit.
        """
        on = parse_device(device) if team is None else team.device(parse_device(device))
        number = parse_dtype(dtype, on)
        alike: dict[str, Any] = {"device": on, "dtype": number, "threads": threads, "memory": memory,
                                 "text_cache": text_cache}  # fmt: skip
        release = open_release(source, lora, number, revision)
        named = own_upsampler(upsample, release.folder)
        upsampler = None if named is None else cls(open_release(named, dtype=number), **alike)
        return cls(release, lora=lora, rewrite=rewrite, team=team, upsampler=upsampler, **alike)

    def __call__(
        self,
        prompt: str = "",
        *,
        seed: int = 0,
        negative: str | None = None,
        frames: int | None = None,
        width: int | None = None,
        height: int | None = None,
        fps: Fraction | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_kind: GuidanceKind | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float | None = None,
        cache: float | None = None,
        best_of: int | None = None,
        solver: SolverName | None = None,
        diffusion: float | None = None,
        image: str | Path | None = None,
        last: str | Path | None = None,
        extend: str | Path | None = None,
        seconds: float | None = None,
        edit: str | Path | None = None,
        mask: str | Path | None = None,
        upsample: str | Path | None = None,
        latent: bool = False,
        progress: Progress | None = None,
    ) -> Video:
        """The video of a prompt (of a release of classes: of a class), the same for the same arguments.

        Settings that are None are the release's. A release that reads what is known of a clip takes pictures
        that it begins and ends with (`image`, `last`), a clip to go on from (`extend`, by `seconds`), or one
        to change where a picture is white (`edit`, `mask`). An upsampler takes a clip alone (`upsample`).
        At most `best_of` clips are made, none after one that the verifier passes, and the best is kept.
        `latent` keeps the latent beside the frames; `progress` is called with 1 after each velocity and with
        the number of frames after each piece that was decoded.

        Raises:
            UserError: what the release cannot make, in one line.
        """
        request = ClipRequest(
            prompt=prompt, negative=negative, seed=seed, frames=frames, width=width, height=height, fps=fps,
            steps=steps, guidance=guidance, guidance_kind=guidance_kind, guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale, cache=cache, best_of=best_of, solver=solver,
            diffusion=diffusion, seconds=seconds,
            **_paths(image=image, last=last, extend=extend, edit=edit, mask=mask, upsample=upsample),
        )  # fmt: skip
        plan, more = self._asked(request)
        return self.make(plan, latent=latent, progress=progress, more=more)

    def batch(self, requests: Sequence[ClipRequest], *, at_once: int | None = None) -> Iterator[Video]:
        """Videos of many requests, in their order, `at_once` of them at a time; each equals the one alone.

        Raises:
            UserError: before anything is made, what the release cannot make.
        """
        asked = [self._asked(request) for request in requests]
        return self.at_once(lambda item: self.make(item[0], more=item[1]), asked, at_once)

    def at_once(self, work: Callable[[T], R], items: Sequence[T], count: int | None = None) -> Iterator[R]:
        """Results of `work` for all items, in their order, up to `count` (see `default_batch`) at a time.

        What `work` raises comes out at its place, and what has not begun is left undone.

        Raises:
            UserError: a count below 1.
        """
        count = self.default_batch if count is None else count
        if count < 1:
            raise UserError(f"batch: {count}; use 1 or more")
        if min(count, len(items)) > 1:
            self.load()  # once, before there are threads
        if min(count, len(items)) == 1 or self.models.is_short:
            return map(work, items)
        return in_threads(work, items, count)

    @property
    def default_batch(self) -> int:
        """As many clips at once as the CPU has cores for; 1 where one keeps a GPU or several processes busy.

        And 1 where memory is short.

        A clip of the mini release of 4 steps costs 1.3 s of CPU time, alone and beside another one: a second
        one loses nothing, and more than there are cores for would only take memory.
        """
        if self.device.type != "cpu" or self.team is not None or self.models.is_short:
            return 1
        return max(1, (os.cpu_count() or 1) // self.threads)

    def plan(self, request: ClipRequest) -> Plan:
        """The clip with all defaults filled in.

        Raises:
            UserError: what cannot be made, in one line that names the key and the remedy.
        """
        if self.release.config.upsample.factor:
            return upsampled(self.release, request)
        plan = planned(self.release, request)
        self.way(plan)
        return plan if self.upsampler is None else enlarged(self.upsampler.release, plan)

    def way(self, plan: Plan) -> Way | None:
        """How several processes share the clip, None where there is one.

        Raises:
            UserError: they cannot.
        """
        if self.team is None:
            return None
        return way_for(self.team.size, self.release.backbone_config(), guided=plan.sampling.is_guided)

    def _asked(self, request: ClipRequest) -> tuple[Plan, Mapping[str, str]]:
        """The clip of the prompt as it is reworded, and what its metadata says of that."""
        prompt, more = self.reworded(request.prompt)
        return self.plan(replace(request, prompt=prompt)), more

    def load(self) -> None:
        """Read the models now: text encoders, backbone, decoder; where memory is short, those that fit.

        And the verifier, where clips are chosen by default.

        Raises:
            UserError: a damaged file.
        """
        self.models.load()
        if self.release.config.best_of > 1:
            _ = self.release.verifier
        if self.upsampler is not None:
            self.upsampler.load()

    @property
    def decoder(self) -> TAE | Pixels:
        """What makes frames of latents."""
        return self.models.decoder()

    def bytes(self) -> dict[str, int]:
        """Memory that the weights of each part take."""
        return self.models.bytes()

    def make(
        self,
        plan: Plan,
        *,
        latent: bool = False,
        progress: Progress | None = None,
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> Video:
        """The video of a plan, all of its frames in memory; `more` goes into its metadata."""
        passes = Passes()
        take = self.flow(plan, self.conditions(plan), progress, passes)
        frames = np.concatenate(list(self.decode(plan, take, progress)))
        kept = take.latent if latent else None
        metadata = {**self.metadata(plan), **more}
        return Video(frames=frames, fps=plan.bucket.fps, metadata=metadata, latent=kept, passes=passes)

    def pieces(
        self, plan: Plan, progress: Progress | None = None, passes: Passes | None = None
    ) -> Iterator[UInt8[np.ndarray, "_ height width 3"]]:
        """The frames of a plan, a few at a time, in order: memory does not grow with the clip's length.

        Of the best of several it does: the frames that were looked at are kept.
        """
        return self.decode(plan, self.flow(plan, self.conditions(plan), progress, passes), progress)

    def latent(
        self, plan: Plan, progress: Progress | None = None, passes: Passes | None = None
    ) -> Float[Tensor, "1 c t h w"]:
        """The normalized latent of a plan, which takes most of the time."""
        return self.flow(plan, self.conditions(plan), progress, passes).latent

    def conditions(self, plan: Plan) -> tuple[Condition, Condition]:
        """What the backbone is told of the prompt, and of what it is steered away from."""
        encoder, fps = self.models.text(), plan.bucket.fps
        with on_threads(self.threads):
            told = encoder([plan.prompt], fps) if plan.prompt else encoder.null()
            return told, null_condition(encoder, plan.negative, fps)

    def flow(
        self,
        plan: Plan,
        conditions: tuple[Condition, Condition],
        progress: Progress | None = None,
        passes: Passes | None = None,
        seen: Callable[[Float[Tensor, "1 c t h w"]], None] | None = None,
    ) -> Take:
        """The best take of a plan whose `conditions` are there; of `passes`, `seen` see `sample_latent`."""

        def make(one: Plan) -> Float[Tensor, "1 c t h w"]:
            return solved(
                one, self.release, self.models, conditions, told=lambda: _tell(progress, 1), passes=passes,
                seen=seen,
            )  # fmt: skip

        def decode(latent: Float[Tensor, "1 c t h w"]) -> UInt8[np.ndarray, "_ height width 3"]:
            return np.concatenate(list(self._pieces(plan, latent)))

        def left_out(takes: int) -> None:
            _tell(progress, takes * plan.num_velocities)

        with on_threads(self.threads):
            if plan.best_of == 1:
                return Take(latent=make(plan))
            return best_take(plan, self.release.verifier, make, decode, left_out)

    def decode(
        self, plan: Plan, take: Take, progress: Progress | None = None
    ) -> Iterator[UInt8[np.ndarray, "_ height width 3"]]:
        """The frames of a take, a few at a time, in order.

        Raises:
            UserError: frames too large for the memory, when the first piece is asked for.
        """
        with on_threads(self.threads):
            if plan.larger is not None and self.upsampler is not None:
                small = np.concatenate(list(self._frames(plan, take)))
                yield from self.upsampler.pieces(with_clip(plan, small), progress)
                return
            for piece in self._frames(plan, take):
                yield piece
                _tell(progress, len(piece))
                del piece  # not held while the next one is made

    def _frames(self, plan: Plan, take: Take) -> Iterator[UInt8[np.ndarray, "_ height width 3"]]:
        return self._pieces(plan, take.latent) if take.frames is None else iter([take.frames])

    def _pieces(
        self, plan: Plan, latent: Float[Tensor, "1 c t h w"]
    ) -> Iterator[UInt8[np.ndarray, "_ height width 3"]]:
        """The frames; before and around them those of the clip that they go on from, or change."""
        if plan.stills:
            stills = decode_stills(autoencoder(self.models), latent, self.memory)
            yield from (frame[0].numpy() for frame in stills)
            return
        if plan.source is not None and plan.added:
            yield from plan.source.earlier()
        pieces = decode_pieces(self.decoder, latent, plan.decoded, self.memory)
        made = map(lambda piece: piece[0].numpy(), pieces)  # holds none while the next one is made
        yield from made if plan.source is None else plan.source.joined(made)

    def unknown_words(self, plan: Plan) -> list[str]:
        """Words of a plan that mean nothing to the release."""
        known = self.release.vocabulary
        return [] if known is None else known.unknown(f"{plan.prompt} {plan.negative or ''}")

    def metadata(self, plan: Plan) -> dict[str, str]:
        """All that decides the frames on a machine of one kind: what makes the clip again."""
        computed = {
            "device": self.device.type,
            "dtype": name_of(self.dtype),
            "threads": self.threads,
            "processes": None if self.team is None else self.team.size,
            "memory": self.memory,
        }
        upsampler = None if self.upsampler is None else self.upsampler.release
        return metadata(plan, self.release, self._lora, upsampler, computed)


def _paths(**files: str | Path | None) -> dict[str, Any]:
    return {key: str(path) for key, path in files.items() if path is not None}


def _tell(progress: Progress | None, count: int) -> None:
    alive()
    if progress is not None:
        progress(count)
