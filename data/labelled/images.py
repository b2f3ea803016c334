"""Labelled pictures, split into those to train on and those held out.

A source is a folder with a folder for each class, or a table (data.labelled.layouts). Which side a picture
is on, and its place in the order, come from a hash of its bytes: neither depends on the source's order, the
classes are mixed, and copies of a picture are on one side.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int64, UInt8

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.data import video
from kinoflow.data.clips.manifest import ClipEntry, Manifest
from kinoflow.data.labelled.layouts import Table, reader_of

Side = Literal["train", "heldout"]
_SCHEME = "images"
_HELD_OUT = 10  # one picture in so many
_GREY = ("gray", "mono", "ya8", "ya16")  # how FFmpeg's names of such pixels begin


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where labelled pictures are, and which side of the split is asked for."""

    path: Path
    side: Side

    @classmethod
    def parse(cls, text: str) -> "Place | None":
        """Read `images:PATH`, `images:PATH:heldout` or `images:PATH:train`; None of anything else."""
        scheme, _, rest = text.partition(":")
        if scheme != _SCHEME or not rest:
            return None
        for side in get_args(Side):
            if rest.endswith(f":{side}"):
                return cls(path=Path(rest.removesuffix(f":{side}")), side=side)
        return cls(path=Path(rest), side="train")


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """The pictures of one side: bytes of one size, or a list of files of any; and each one's class.

    `labels` are positions in `classes`, the names. `grey` says that no picture has colours.
    """

    classes: tuple[str, ...]
    labels: Int64[np.ndarray, " n"]
    pictures: UInt8[np.ndarray, "n height width c"] | Manifest
    grey: bool

    @property
    def fingerprint(self) -> str:
        """A name for the pictures and labels of a table."""
        assert isinstance(self.pictures, np.ndarray), "files have stamps"
        digest = hashlib.sha256(self.pictures.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()


def read(place: Place) -> Labelled:
    """The pictures of a folder of classes, an .npz, IDX files or a .csv.

    Raises:
        UserError: nothing of that kind is there, it is damaged, a class is empty, there is only one, or this
            side has no picture.
    """
    path = place.path
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check the path")
    reader = reader_of(path)
    if reader is not None:
        found = _of_table(reader(path), place)
    elif path.is_dir():
        found = _of_folder(place)
    else:
        raise UserError(f"{path}: no labelled pictures; name a folder with a folder for each class, an .npz, "
                        "a .csv, or IDX files")  # fmt: skip
    if len(found.classes) < 2:
        only = ", ".join(found.classes)
        raise UserError(f"{path}: has one class only, {only}; name what holds all of them")
    if len(found.labels) == 0:
        raise UserError(f"{path}: too few pictures, none is on the side {place.side}; add some")
    return found


def _of_table(table: Table, place: Place) -> Labelled:
    values, labels = np.unique(table.labels, return_inverse=True)
    order = _order([_hash(picture.tobytes()) for picture in table.pictures], place.side)
    pictures = table.pictures
    grey = pictures.shape[-1] == 1 or bool((pictures == pictures[..., :1]).all())
    return Labelled(
        classes=tuple(map(str, values.tolist())), labels=labels.astype(np.int64)[order],
        pictures=pictures[order], grey=grey,
    )  # fmt: skip


def _of_folder(place: Place) -> Labelled:
    """Every file of the folders is a picture of the class that its folder is called, but for hidden ones."""
    root = place.path.resolve()
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise UserError(f"{place.path}: has no folders; put the pictures of each class into one of its name")
    entries: list[ClipEntry] = []
    labels, hashes, grey = [], [], True
    for label, folder in enumerate(folders):
        files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
        if not files:
            raise UserError(f"{folder}: no picture in it; add some, or remove the folder")
        for file in files:
            entry, its_grey = _entry(file, root)
            entries.append(entry)
            labels.append(label)
            hashes.append(_hash_of(file))
            grey &= its_grey
    order = _order(hashes, place.side)
    chosen = tuple(entries[i] for i in order)
    listing = Manifest(path=root, entries=chosen, rows=tuple(range(1, len(chosen) + 1)))
    names = tuple(folder.name for folder in folders)
    return Labelled(classes=names, labels=np.array(labels, np.int64)[order], pictures=listing, grey=grey)


def _entry(file: Path, root: Path) -> tuple[ClipEntry, bool]:
    """Its row in a list, and whether it has no colours; what cannot be read is left to whoever reads it."""
    path, name = f"{root.name}/{file.relative_to(root).as_posix()}", file.parent.name
    try:
        info = video.probe(file)
    except UserError:
        return ClipEntry(path=path, caption=name), True
    entry = ClipEntry(
        path=path, caption=name, frames=info.frames, fps=info.fps, width=info.width, height=info.height
    )
    return entry, info.pixel_format.startswith(_GREY)


def _hash_of(file: Path) -> bytes:
    try:
        return _hash(file.read_bytes())
    except OSError as error:
        raise UserError(os_error_line(file, error)) from None


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


def _order(hashes: list[bytes], side: Side) -> list[int]:
    """The pictures of a side in the order of their hashes; copies in that of the source."""
    mine = [
        i for i, each in enumerate(hashes)
        if (int.from_bytes(each, "big") % _HELD_OUT == 0) == (side == "heldout")
    ]  # fmt: skip
    return sorted(mine, key=lambda i: hashes[i])
