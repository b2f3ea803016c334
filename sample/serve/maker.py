"""Clips of a release, with the pipeline that `kinoflow sample` has."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from kinoflow.configs.errors import UserError
from kinoflow.sample.best import seed_of
from kinoflow.sample.cache import Passes
from kinoflow.sample.options import CRF
from kinoflow.sample.output import Output, file_metadata
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.plan import filled
from kinoflow.sample.preview import each_few, fit_colors
from kinoflow.sample.request import ClipRequest
from kinoflow.sample.serve.pictures import encoded


class ReleaseMaker:
    """Makes the clips of a pipeline whose models stay in memory; a Maker.

    Args:
        at_once: clips at a time, of any settings: each is computed as if it were alone.

    Raises:
        UserError: a damaged file, or memory that does not suffice.
    """

    def __init__(self, pipeline: Pipeline, at_once: int | None = None) -> None:
        pipeline.load()
        self.at_once = pipeline.default_batch if at_once is None else at_once
        release = pipeline.release
        self._pipeline, self.name, self.rewrites = pipeline, release.name, pipeline.reworded.rewrites
        self.takes_pictures = release.reads_known
        self._colors = fit_colors(pipeline.decoder)
        default = release.bucket()
        self.clips = (default, *(clip for clip in release.buckets if clip != default))
        first = release.config.classes[0] if release.config.classes else "a clip"
        self.defaults = self.check(ClipRequest(prompt=first))

    def check(self, request: ClipRequest) -> ClipRequest:
        """See Maker. Of a release of classes the prompt is one, by its name or number."""
        if request.rewrite and not self.rewrites:
            line = "rewrite: the server has no language model; leave it out, or start it with --rewrite MODEL"
            raise UserError(line)
        # Only these: one of a million frames would keep the others waiting.
        self._pipeline.release.bucket(
            frames=request.frames, height=request.height, width=request.width, fps=request.fps
        )
        return filled(request, self._pipeline.plan(request))

    def make(
        self,
        request: ClipRequest,
        path: Path,
        progress: Callable[[float], None],
        show: Callable[[bytes], None] = lambda _: None,
    ) -> dict[str, Any]:
        """See Maker. What is shown is the middle of the clip."""
        prompt, more = self._pipeline.reworded(request.prompt) if request.rewrite else (request.prompt, {})
        plan = self._pipeline.plan(replace(request, prompt=prompt))
        bucket, metadata = plan.bucket, file_metadata(path, {**self._pipeline.metadata(plan), **more}, CRF)
        size = {"frames": plan.frames, "height": bucket.height, "width": bucket.width, "fps": bucket.fps}
        output, done = Output(path, **size, crf=CRF, metadata=metadata), 0

        def advance(parts: int) -> None:
            nonlocal done
            done += parts
            progress(done / plan.num_steps)

        def shown(latent: Float[Tensor, "1 c t h w"]) -> None:
            show(encoded(self._colors(latent[:, :, latent.shape[2] // 2, None])[0].numpy()))

        passes, seen = Passes(), each_few(plan.sampling.num_evaluations, shown)
        take = self._pipeline.flow(plan, self._pipeline.conditions(plan), advance, passes, seen)
        output.write(self._pipeline.decode(plan, take, advance))
        reworded = {"prompt": plan.prompt, **more} if more else {}
        figures = {"passes": asdict(passes), "kept_seed": seed_of(plan.seed, take.number)}
        return figures | {"unknown_words": self._pipeline.unknown_words(plan)} | reworded
