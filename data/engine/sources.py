"""What there is to look at: the videos of a folder, of a list, or of a glob on any disk or server."""

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.configs.files import seeded
from kinoflow.data import video
from kinoflow.data.clips import captions, manifest
from kinoflow.data.clips.remote import Place, Url, filesystem, place, stamp

VIDEOS = frozenset({
    ".3gp", ".asf", ".avi", ".divx", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".y4m",
})  # fmt: skip
_LISTS = {".json", ".jsonl", ".ndjson", ".parquet", ".pq"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One video: where it is (a full path or a URL), and what is written about it."""

    path: str
    caption: str = ""

    @property
    def place(self) -> Place:
        """The path, or the URL."""
        return place(self.path)

    @property
    def name(self) -> str:
        """The file name of what is kept about it: the same for the same path."""
        return f"{seeded('source', self.path):016x}"

    def stamp(self) -> str:
        """Another text when the file has changed; `GONE` where it is not there."""
        return stamp(self.place)


def find(text: str) -> list[Source]:
    """The videos of a folder and all below it, of a text file of paths, a clip list, or a glob; sorted.

    A clip's caption is the list's, or the .txt file's of its name beside it.

    Raises:
        UserError: nothing is there, it cannot be read, or it names no video.
    """
    where = place(text)
    if isinstance(where, Url) or glob.has_magic(text):
        found = _expanded(text)
    elif where.is_dir():
        found = _below(where)
    elif where.suffix.lower() in VIDEOS:
        found = {_full(where): ""}
    else:
        found = _listed(where)
    if not found:
        raise UserError(
            f"{text}: names no video; give a folder, a list of paths or a glob such as 'in/**/*.mp4'"
        )
    return [Source(path=path, caption=caption) for path, caption in sorted(found.items())]


def _full(path: Path) -> str:
    return str(path.absolute())


def _below(folder: Path) -> dict[str, str]:
    """Pipes and devices too, if they are named like a video: it is told what became of them."""
    try:
        files = [file for file in folder.rglob("*") if file.suffix.lower() in VIDEOS and not file.is_dir()]
    except OSError as error:
        raise UserError(os_error_line(folder, error)) from error
    inside = (file.relative_to(folder).parts for file in files)
    shown = [file for file, parts in zip(files, inside, strict=True) if not any(p[0] == "." for p in parts)]
    return {_full(file): _beside(file) for file in shown}


def _beside(file: Path) -> str:
    return captions.caption_of(file, {})


def _expanded(text: str) -> dict[str, str]:
    """A glob, or one URL."""
    where = place(text)
    if isinstance(where, Url) and not glob.has_magic(text):
        return {text: ""}
    if isinstance(where, Path):
        return {_full(Path(file)): _beside(Path(file)) for file in glob.glob(text, recursive=True)  # noqa: PTH207
                if Path(file).suffix.lower() in VIDEOS}  # fmt: skip
    system, path = filesystem(where)
    try:
        found = [system.unstrip_protocol(file) for file in system.glob(path)]
    except Exception as error:  # each of fsspec's libraries has errors of its own
        raise UserError(f"{text}: cannot be listed ({error}); check the URL and your rights") from error
    return dict.fromkeys(sorted(found), "")


def _listed(path: Path) -> dict[str, str]:
    if path.suffix.lower() in _LISTS:
        listing = manifest.read(path)
        entries = ((listing.resolve(entry), entry.caption) for entry in listing.entries)
        return {str(at) if isinstance(at, Url) else _full(at): caption for at, caption in entries}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not a text file with a path on each line; give a folder or a list"
        ) from error
    places = [place(line.strip()) for line in lines if line.strip() and not line.startswith("#")]
    return {str(at) if isinstance(at, Url) else _full(path.parent / at): "" for at in places}


def probe(path: Path) -> dict[str, Any]:
    """The first stage: what a video says of itself; whether all of it decodes is seen later.

    Raises:
        UserError: it cannot be read at all.
    """
    info = video.probe(path)
    return {
        "width": info.width, "height": info.height, "fps": str(info.fps), "frames": info.frames,
        "variable_rate": int(info.variable_frame_rate),
    }  # fmt: skip
