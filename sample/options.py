"""The options of `kinoflow sample`: what messages call them, and which have no effect beside others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinoflow.configs.errors import UserError
from kinoflow.configs.terminal import argument

if TYPE_CHECKING:
    from kinoflow.sample.release import Release

_OPTIONS = {
    "num_steps": "--steps",
    "guidance_scale": "--guidance",
    "guidance_kind": "--guidance-kind",
    "guidance_interval": "--guidance-interval",
    "guidance_rescale": "--guidance-rescale",
    "best_of": "--best-of",
}
CRF = 18.0
"""Of mp4 files where nothing else is said."""
_CLIPS = {".mp4", ".m4v", ".mov", ".png", ".gif", ".webp"}


def add_hardware(add: Callable[..., Any]) -> None:
    """The options that say where and in what is computed; `add` is a parser's add_argument."""
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default auto: the GPU where there is one)")
    add(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16", "int8"),
        default="auto",
        help="number type of the transformer (default auto: bf16 on a GPU, fp32 on a CPU); int8 takes a "
        "quarter of fp32's memory; flow times, the state of the flow and the autoencoder stay in fp32",
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
        help="add an adapter (of kinoflow train export RUN FOLDER --adapter, or peft's, or one that comes "
        "with the release by its name) to the transformer, so much of it (default 1); again for more; "
        "a student of few steps sets steps and guidance as well",
    )


def add_rewrite(add: Callable[..., Any]) -> None:
    """The option that has prompts reworded."""
    add(
        "--rewrite",
        metavar="MODEL",
        help="have a language model make a caption of each prompt first: the folder or hub id of one, or "
        "http://HOST:PORT/v1[#MODEL] of a server that speaks OpenAI's protocol (it gets OPENAI_API_KEY); "
        "words in quotes stay; the file says both prompts",
    )


def refuse_other_kind(
    release: Release, label: str | None, text_cache: Path | None, *, listed: bool = False
) -> None:
    """Refuse prompts for a release of classes, labels for one that reads prompts, and what it has no use for.

    Lists are read later, and their lines refused one by one.

    Raises:
        UserError: one line that names what the release takes.
    """
    from kinoflow.conditioning.labels import LabelEncoder  # torch, which --help does without

    if not release.config.classes and label is not None:
        raise UserError(f"label: {release.name} reads prompts and has no classes; give a PROMPT instead")
    if release.config.classes and label is None and not listed:
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


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of WIDTHxHEIGHT, or of one number for a square.

    Raises:
        UserError: anything else.
    """
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"{text!r} is not a size; write WIDTHxHEIGHT, for example 64x64")
    return int(parts[0]), int(parts[-1])


def parse_interval(text: str) -> tuple[float, float]:
    """Two flow times of A:B.

    Raises:
        UserError: anything else.
    """
    first, colon, last = text.partition(":")
    try:
        if colon:
            return float(first), float(last)
    except ValueError:
        pass
    raise UserError(f"{text!r} is not an interval of flow times; write A:B, for example 0.1:0.9")


def add_guidance(add: Callable[..., Any]) -> None:
    """How the weight of the prompt is used, and what need not be computed."""
    add(
        "--guidance-kind",
        choices=("cfg", "zero-star", "apg"),
        help="classifier-free guidance, CFG-Zero* or adaptive projected guidance",
    )
    add(
        "--guidance-interval",
        type=argument(parse_interval),
        metavar="A:B",
        help="flow times, 0 noise to 1 data, with guidance; steps outside take half the time",
    )
    add(
        "--guidance-rescale",
        type=float,
        metavar="SHARE",
        help="how much of the contrast is taken back that guidance adds, 0 to 1",
    )
    add(
        "--cache",
        type=float,
        metavar="THRESHOLD",
        help="leave out steps whose velocity changes by less than this share, 0.02 for example: faster, and "
        "not quite the same clip; 0 computes all",
    )


def add_best_of(add: Callable[..., Any]) -> None:
    """The option that says how many clips may be made to keep one."""
    add(
        "--best-of",
        type=int,
        metavar="N",
        help="make the clip again, from other noise, while the release's verifier finds that it is not what "
        "the prompt says, N times at most, and keep the best (default: the release's, of a clip of a prompt "
        "alone); 1 keeps the first",
    )


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
