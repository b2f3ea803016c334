"""What comes behind the choice: clips cut to files, and the latents of those that are kept."""

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import seeded
from kinoflow.data import video
from kinoflow.data.clips import manifest
from kinoflow.data.clips.manifest import ClipEntry
from kinoflow.data.clips.remote import local, place
from kinoflow.data.engine.pools import Call, Done, Pool

Shown = Callable[[Iterable[Done], str, int], Iterable[Done]]


def cut_files(listing: Path, folder: Path, *, pool: Pool, show: Shown) -> tuple[int, int]:
    """Write each clip of a list to a file in a folder, and a list of the files; how many, how many copied.

    Files that are there already are left as they are and count as neither.

    Raises:
        UserError: a clip cannot be read or written; those before it stay.
    """
    entries = manifest.read(listing).entries
    names = [_name(entry) for entry in entries]
    todo = [(entry, folder / name) for entry, name in zip(entries, names, strict=True)
            if not (folder / name).exists()]  # fmt: skip
    copied, written = 0, 0
    for _, given in show(pool.run(_calls(todo)), "cutting", len(todo)):
        if isinstance(given, UserError):
            raise given
        written, copied = written + 1, copied + bool(given)
    files = (replace(entry, path=name, first_frame=None) for entry, name in zip(entries, names, strict=True))
    manifest.write(folder / "manifest.jsonl", files)
    return written, copied


def cut_to(path: str, span: range, out: Path) -> bool:
    """Write a piece of what lies at a path or URL to a file; whether its packets were copied.

    Raises:
        UserError: it cannot be read or written.
    """
    with local(place(path)) as file:
        return video.extract(file, span, out)


def _calls(todo: Sequence[tuple[ClipEntry, Path]]) -> Iterator[Call]:
    for entry, out in todo:
        span = entry.piece
        assert span is not None, "the engine lists pieces"
        yield Call(key=out, function=cut_to, arguments=(entry.path, span, out))


def _name(entry: ClipEntry) -> str:
    """The same for the same piece of the same file; files of one name in two folders do not meet."""
    folder = seeded("clip", entry.path) & 0xFFFFFFFF
    return f"{Path(entry.path).stem[:80]}-{folder:08x}-{entry.first_frame}-{entry.frames}.mp4"


def precompute(listing: Path, words: Sequence[str], *, ray: str | None, quiet: bool) -> int:
    """Make the latents of a list by `kinoflow train precompute`, on a Ray cluster's actors; its exit status.

    It is a process of its own: it wants the memory of the models, and this one knows nothing of them.
    """
    command = [sys.executable, "-m", "kinoflow.train", "precompute", *words, f"source={listing}"]
    command += [] if ray is None or any(word.startswith("ray=") for word in words) else [f"ray={ray}"]
    return subprocess.run(command, stdout=sys.stderr if quiet else None, check=False).returncode
