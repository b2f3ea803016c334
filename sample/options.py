"""The options of `kinoflow sample`: what messages call them, and which have no effect beside others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinoflow.configs.errors import UserError

if TYPE_CHECKING:
    from kinoflow.sample.generate import SolverName
    from kinoflow.sample.release import Release

_OPTIONS = {"num_steps": "--steps", "guidance_scale": "--guidance"}
_CLIPS = {".mp4", ".m4v", ".mov", ".png"}


def add_hardware(add: Callable[..., Any]) -> None:
    """The options that say where and in what is computed; `add` is a parser's add_argument."""
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default auto: the GPU where there is one)")
    add(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="number type of the transformer (default auto: bf16 on a GPU, fp32 on a CPU); flow times, the "
        "state of the flow and the autoencoder stay in fp32",
    )
    add(
        "--threads",
        type=int,
        default=1,
        help="CPU threads (default 1: small releases gain nothing from more)",
    )


def add_lora(add: Callable[..., Any]) -> None:
    """The option that adds adapters to a release."""
    add(
        "--lora",
        action="append",
        default=[],
        metavar="FOLDER[:SCALE]",
        help="add an adapter (of kinoflow train export RUN FOLDER --adapter, or peft's) to the transformer, "
        "so much of it (default 1); again for more of them",
    )


def refuse_other_kind(release: Release, label: str | None, text_cache: Path | None) -> None:
    """Refuse prompts for a release of classes, labels for one that reads prompts, and what it has no use for.

    Raises:
        UserError: one line that names what the release takes.
    """
    from kinoflow.conditioning.labels import LabelEncoder  # torch, which --help does without

    if not release.config.classes and label is not None:
        raise UserError(f"label: {release.name} reads prompts and has no classes; give a PROMPT instead")
    if release.config.classes and label is None:
        known = LabelEncoder(release.config.classes).known()
        raise UserError(f"prompt: {release.name} reads none; give --label, one of {known}")
    if release.config.classes and text_cache is not None:
        raise UserError(f"text-cache: {release.name} reads no text; leave it out")


@contextmanager
def named_as_options() -> Iterator[None]:
    """Mistakes in a release's keys, which the options set, said of the options."""
    try:
        yield
    except UserError as error:
        line = str(error)
        for key, option in _OPTIONS.items():
            line = line.replace(key, option)
        raise UserError(line) from None


def is_picture(frames: int, out: Path | None) -> bool:
    """Whether a PNG is written; `out` is None where the file's name follows from the prompt."""
    return frames == 1 if out is None else out.suffix.lower() == ".png"


def refuse_without_effect(
    *, diffusion: float | None, crf: float | None, solver: SolverName, picture: bool
) -> None:
    """Refuse options that change nothing beside the others.

    Raises:
        UserError: one line that names the option and the one that takes its effect.
    """
    if diffusion is not None and solver != "sde":
        raise UserError(f"diffusion: {solver} adds no noise; use --solver sde with it")
    if crf is not None and picture:
        remedy = "leave --crf out, or write a clip of one frame with --out NAME.mp4"
        raise UserError(f"crf: a picture (--frames 1) is a PNG, which loses nothing; {remedy}")


def folder_of_list(out: Path | None) -> Path:
    """Where the clips of --prompts go.

    Raises:
        UserError: --out is a file, or has a file's name.
    """
    folder = out or Path()
    if not folder.is_dir() and (folder.exists() or folder.suffix.lower() in _CLIPS):
        raise UserError(
            f"{folder}: with --prompts, --out is a folder, which gets a clip a prompt; name a folder"
        )
    return folder
