"""Adapters (LoRA) that a release is opened with, and how a student among them is sampled.

A student of few steps (`kinoflow train`, `distill.steps`) says in the sampling.yaml of its folder with which
steps, grid and guidance it was trained; those are then the release's defaults. Adapters that come with a
release lie in its adapters/, and are named as their folder there.
"""

from collections.abc import Sequence
from pathlib import Path

from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import dump, load
from kinoflow.dit_video.lora import Adapter, read_adapter, split_scale
from kinoflow.sample.generate import Sampling

FOLDER = "adapters"
SAMPLING_NAME = "sampling.yaml"


def read_adapters(lora: Sequence[str], release: Path) -> tuple[tuple[Adapter, ...], Sampling | None]:
    """The adapters of "NAME", "FOLDER" or "FOLDER:scale", and how the last student among them is sampled.

    Raises:
        UserError: as `read_adapter`, or a sampling.yaml that can't be read.
    """
    adapters = tuple(read_adapter(_located(words, release)) for words in lora)
    files = [Path(adapter.source) / SAMPLING_NAME for adapter in adapters]
    found = [load(Sampling, [str(file)]) for file in files if file.is_file()]
    return adapters, found[-1] if found else None


def write_sampling(folder: Path, sampling: Sampling) -> None:
    """Say in an adapter's folder how it is to be sampled."""
    dump(sampling, folder / SAMPLING_NAME)


def shipped(release: Path) -> tuple[str, ...]:
    """The names of the adapters that come with a release."""
    return tuple(sorted(path.name for path in (release / FOLDER).glob("*") if path.is_dir()))


def _located(words: str, release: Path) -> str:
    """The same words with the folder of a release's own adapter in the place of its name."""
    name, scale = split_scale(words)
    if Path(name).is_dir() or len(Path(name).parts) > 1:  # a folder, or a hub id such as owner/name
        return words
    own = release / FOLDER / name
    if not own.is_dir():
        has = f"has {', '.join(there)}" if (there := shipped(release)) else "has none of its own"
        raise UserError(f"lora: {name}: no such folder, and {release} {has}")
    return f"{own}:{scale}"
