"""VBench's folder of clips (Huang et al. 2024, arXiv:2311.17982): several samples of each prompt, by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from kinoflow.configs.errors import UserError
from kinoflow.sample.output import derived_seed
from kinoflow.sample.request import ClipRequest

SAMPLES = 5
"""Of each prompt; of those that are judged for flicker it wants 25."""
_LONGEST = 255  # bytes of a file's name


def samples(
    requests: Iterable[tuple[str, ClipRequest]], folder: Path, count: int
) -> Iterator[tuple[str, ClipRequest, Path]]:
    """(place, request, path) of `count` clips of each prompt: PROMPT-0.mp4, PROMPT-1.mp4, …

    A prompt that comes again, to be judged for something else, has its clips already. The seed of a sample
    follows from the request's, the prompt and the sample's number.

    Raises:
        UserError: a prompt that is no file's name, or a count below 1.
    """
    if count < 1:
        raise UserError(f"vbench: {count} samples of a prompt; use 1 or more")
    seen = set[str]()
    for place, request in requests:
        prompt = request.prompt
        if prompt in seen:
            continue
        seen.add(prompt)
        for number in range(count):
            path = folder / f"{prompt}-{number}.mp4"
            if "/" in prompt or len(path.name.encode()) > _LONGEST:
                raise UserError(
                    f"{place}: prompt: no file can be called {prompt[:60]!r}, as VBench wants; change it"
                )
            seed = derived_seed(request.seed, prompt, repeat=number)
            yield place, replace(request, seed=seed), path
