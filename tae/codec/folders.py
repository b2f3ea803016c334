"""Whole folders in one call: find the clips, skip what is done, go on after a bad file, and list it."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.data.video.frames import PICTURES

CLIPS = frozenset({
    ".264", ".265", ".3gp", ".avi", ".flv", ".gif", ".h264", ".hevc", ".m2ts", ".m4v", ".mkv", ".mov",
    ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".y4m",
})  # fmt: skip
_IGNORED_NAMED = 10
LATENTS = frozenset({".kino", ".zarr"})


@dataclass(frozen=True, kw_only=True)
class FolderItem:
    """One file, or folder of pictures, and what is made of it."""

    source: Path
    output: Path


@dataclass(frozen=True, kw_only=True)
class FolderPlan:
    """What a folder asks for; `ignored` says which files are neither clips nor frames of one."""

    folder: Path
    out: Path
    items: tuple[FolderItem, ...]
    ignored: tuple[str, ...]


def plan(folder: Path, out: Path, *, latents: bool, suffix: str) -> FolderPlan:
    """Clips below `folder` (or latent files), each with an output of the same name and place below `out`.

    A folder that holds pictures and no clip is itself one clip. Outputs add `suffix` to the clip's whole
    name (`a.mp4` to `a.mp4.kino`), so that a.mp4 and a.mov do not meet; of latent files, .kino goes first.
    Hidden files, and what lies in `out`, do not count.

    Raises:
        UserError: a folder that cannot be read, with nothing in it, or with two sources for one output.
    """
    sources, ignored = _sources(folder, out, LATENTS if latents else CLIPS, PICTURES if not latents else ())
    if not sources:
        kind = "latent files (.kino, .zarr)" if latents else "clips or pictures"
        raise UserError(f"{folder}: holds no {kind}; name a folder that does")
    items = [FolderItem(source=source, output=_output(source, folder, out, suffix)) for source in sources]
    taken: dict[Path, Path] = {}
    for item in items:
        if item.output.resolve() == item.source.resolve():
            raise UserError(
                f"{item.source}: would be written over itself; name another folder for the output"
            )
        other = taken.setdefault(item.output, item.source)
        if other != item.source:
            raise UserError(f"{item.source}: would be written over {other.name}'s; rename one of them")
    return FolderPlan(folder=folder, out=out, items=tuple(items), ignored=tuple(ignored))


def run(
    todo: FolderPlan,
    one: Callable[[FolderItem], dict[str, Any]],
    *,
    done: Callable[[FolderItem], bool],
    progress: Callable[[int, FolderItem], None],
) -> dict[str, Any]:
    """Do every item that is not `done`; what fails is listed under "failed", and the others go on."""
    began = time.perf_counter()
    results: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    skipped: list[str] = []
    for number, item in enumerate(todo.items):
        progress(number, item)
        try:
            if done(item):
                skipped.append(str(item.source))
            else:
                results.append(one(item))
        except UserError as error:
            failed.append({"input": str(item.source), "error": str(error)})
    return {
        "input": str(todo.folder),
        "output": str(todo.out),
        "clips": len(todo.items),
        "written": len(results),
        "skipped": len(skipped),
        "failed": failed,
        "ignored_files": len(todo.ignored),
        "ignored": todo.ignored[:_IGNORED_NAMED],
        "frames": sum(result["frames"] for result in results),
        "seconds": time.perf_counter() - began,
        "results": results,
    }


def _sources(
    folder: Path, out: Path, kinds: frozenset[str], pictures: Sequence[str] | frozenset[str]
) -> tuple[list[Path], list[str]]:
    """What is to be done below `folder`, and the names of the files that are not."""
    found: list[Path] = []
    ignored: list[str] = []

    def unreadable(error: OSError) -> None:
        raise UserError(os_error_line(Path(error.filename or folder), error)) from error

    for place, folders, names in os.walk(folder, onerror=unreadable):
        here = Path(place)
        seen = sorted(name for name in names if not name.startswith("."))
        clips = [here / name for name in seen if Path(name).suffix.lower() in kinds]
        stores = [
            name for name in folders if Path(name).suffix in kinds and (here / name / "zarr.json").exists()
        ]
        clips += [here / name for name in stores]
        frames = [name for name in seen if Path(name).suffix.lower() in pictures]
        if frames and not clips:
            found.append(here)
            taken = {*frames}
        else:
            found += clips
            taken = {clip.name for clip in clips}
        why = dict.fromkeys(frames, " (a picture beside clips)")
        ignored += [
            f"{(here / name).relative_to(folder)}{why.get(name, '')}" for name in seen if name not in taken
        ]
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name not in stores and (here / name).resolve() != out.resolve()
        )
    return sorted(found), ignored


def _output(source: Path, folder: Path, out: Path, suffix: str) -> Path:
    place = Path(folder.resolve().name) if source == folder else source.relative_to(folder)
    name = place.name
    if place.suffix in LATENTS:
        name = place.stem
    return out / place.with_name(name if name.endswith(suffix) else name + suffix)
