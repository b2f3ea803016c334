"""Files that hold labelled pictures as numbers: .npz, MNIST's IDX, .csv; each read whole.

Pictures are bytes, 0..255, of one channel or three. What is stored otherwise is converted: bits and numbers
in [0, 1] fill the range, 16 bits keep their upper eight. Rows of numbers are square pictures of one channel.
"""

import gzip
import math
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from kinoflow.configs.errors import UserError, one_line, os_error_line

_IMAGES, _LABELS = ("x", "images"), ("y", "labels")  # the names of an .npz
_LABEL_HEADS = {"label", "labels", "class", "y", "target"}
_UNSIGNED_BYTE = 0x08  # IDX: the third byte of a file says the type of its values, the fourth how many axes


@dataclass(frozen=True, kw_only=True)
class Table:
    """Pictures of one size and the number of each one's class, as the file has it."""

    pictures: UInt8[np.ndarray, "n height width c"]
    labels: Int64[np.ndarray, " n"]


def reader_of(path: Path) -> Callable[[Path], Table] | None:
    """What reads a file or folder, by its name; None of what holds no table."""
    name = path.name.lower()
    if path.is_dir():
        return read_idx if _idx_files(path) else None
    if name.endswith(".npz"):
        return read_npz
    if name.endswith((".csv", ".csv.gz")):
        return read_csv
    return read_idx if _is_idx(name) else None


def read_npz(path: Path) -> Table:
    """The arrays x or images, and y or labels, of an .npz.

    Raises:
        UserError: it is damaged, lacks one of them, or they are not pictures and labels.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = [_one_of(wanted, arrays.files, path) for wanted in (_IMAGES, _LABELS)]
            images, labels = (arrays[name] for name in names)
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: no .npz of plain arrays ({one_line(error)}); save it again with "
                        "numpy.savez(file, images=…, labels=…)") from None  # fmt: skip
    return _table(images, labels, path)


def _one_of(wanted: tuple[str, ...], names: list[str], path: Path) -> str:
    found = [name for name in wanted if name in names]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{path}: has both {' and '.join(found)}; leave out one of them")
    there = ", ".join(names) or "no array"
    raise UserError(f"{path}: has {there}, and none is called {' or '.join(wanted)}; name one of them so")


def read_idx(path: Path) -> Table:
    """MNIST's own format: a file of pictures, gzipped or not, beside that of its labels.

    Of a folder it is that of the training pictures, `train-images-idx3-ubyte`; `t10k-images-idx3-ubyte` is
    read when it is named.

    Raises:
        UserError: a file is not there, is cut short or of another kind, or there are more of one than of the
            other.
    """
    images = _training_file(path) if path.is_dir() else path
    labels = _labels_beside(images)
    return _table(_read_idx(images, axes=3), _read_idx(labels, axes=1), images)


def _is_idx(name: str) -> bool:
    return name.removesuffix(".gz").endswith(("idx3-ubyte", "idx3"))


def _idx_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and _is_idx(path.name.lower()))


def _training_file(folder: Path) -> Path:
    every = _idx_files(folder)
    chosen = [path for path in every if "train" in path.name.lower()] or every
    stems = {path.name.removesuffix(".gz") for path in chosen}
    if len(stems) > 1:
        raise UserError(f"{folder}: has {', '.join(path.name for path in chosen)}; name one of them")
    return chosen[0]


def _labels_beside(images: Path) -> Path:
    name = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    for candidate in (images.with_name(name), images.with_name(name + ".gz")):
        if candidate.is_file():
            return candidate
    raise UserError(f"{images}: {name} is not beside it; fetch it, it holds the labels")


def _read_idx(path: Path, axes: int) -> np.ndarray:
    """An array of bytes: two zeros, the type, the number of axes, their lengths in 32 bits, the values."""
    content = _content(path)
    head = 4 + 4 * axes
    if content[:4] != bytes((0, 0, _UNSIGNED_BYTE, axes)):
        kind = "pictures (00000803)" if axes == 3 else "labels (00000801)"
        raise UserError(f"{path}: begins with {content[:4].hex() or 'nothing'}, which is no IDX file of "
                        f"{kind}; fetch it again")  # fmt: skip
    shape = tuple(int(size) for size in np.frombuffer(content[4:head], ">u4")) if len(content) >= head else ()
    if len(content) != head + math.prod(shape) or not shape:
        asked = f"{head + math.prod(shape):,} bytes" if shape else f"a head of {head} bytes"
        raise UserError(f"{path}: has {len(content):,} bytes where its head asks for {asked}; fetch it again")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def read_csv(path: Path) -> Table:
    """A row for each picture: its label, first or last, and its pixels. The file may be gzipped.

    A row of names says where the label is (`label`, `class`, `y` or `target`). Without one it is the end
    whose column varies: most pictures have a corner that never does.

    Raises:
        UserError: a row has another length or something that is no number, or both ends could be the label.
    """
    try:
        lines = _content(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: no text; name a .csv or a .csv.gz") from None
    if not lines:
        raise UserError(f"{path}: is empty; write a row for each picture")
    names = [cell.strip(" \"'").lower() for cell in lines[0].split(",")]
    headed = any(name and not _is_number(name) for name in names)
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()][headed:]
    for number, line in rows:
        if (length := line.count(",") + 1) != len(names):
            raise UserError(f"{path}: row {number} has {length} values, the first has {len(names)}; mend it")
    values = _numbers(rows, path)
    last = _label_is_last(names if headed else None, values, path)
    pixels, labels = (values[:, :-1], values[:, -1]) if last else (values[:, 1:], values[:, 0])
    return _table(pixels, labels, path)


def _numbers(rows: list[tuple[int, str]], path: Path) -> np.ndarray:
    if not rows:
        raise UserError(f"{path}: has no row; write one for each picture")
    try:
        return np.loadtxt([line for _, line in rows], np.float32, delimiter=",", ndmin=2, comments=None)
    except ValueError:
        for number, line in rows:
            for cell in line.split(","):
                if not _is_number(cell):
                    raise UserError(f"{path}: row {number} has {cell.strip()[:20]!r} where a number "
                                    "should be; mend it") from None  # fmt: skip
        raise


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _label_is_last(names: list[str] | None, values: np.ndarray, path: Path) -> bool:
    if names is not None:
        ends = [names[0] in _LABEL_HEADS, names[-1] in _LABEL_HEADS]
    else:
        ends = [bool(np.ptp(values[:, column])) for column in (0, -1)]
    if ends[0] == ends[1]:
        raise UserError(f"{path}: its first and its last column could both be the label, or neither; name "
                        'that column "label" in a first row')  # fmt: skip
    return ends[1]


def _content(path: Path) -> bytes:
    """The bytes of a file, unpacked.

    Raises:
        UserError: it cannot be read, or is cut short.
    """
    try:
        if path.suffix.lower() != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged or cut short ({one_line(error)}); fetch it again") from None
    except OSError as error:
        raise UserError(os_error_line(path, error)) from None


def _table(images: np.ndarray, labels: np.ndarray, path: Path) -> Table:
    pictures = _bytes(_shaped(images, path), path)
    if len(pictures) != labels.size:
        raise UserError(f"{path}: has {len(pictures)} pictures and {labels.size} labels; give one for each")
    return Table(pictures=pictures, labels=_whole(labels, path))


def _shaped(images: np.ndarray, path: Path) -> np.ndarray:
    """As n x height x width x channels, from what may be rows, lack the channels, or have them in front."""
    if images.ndim == 2 and (side := math.isqrt(images.shape[1])) ** 2 == images.shape[1]:
        images = images.reshape(len(images), side, side)
    if images.ndim == 3:
        images = images[..., None]
    elif images.ndim == 4 and images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        shape = " x ".join(map(str, images.shape))
        raise UserError(f"{path}: its pictures have the shape {shape}; store n x height x width, x 3 in "
                        "colour, or rows of square ones")  # fmt: skip
    return images


def _bytes(images: np.ndarray, path: Path) -> UInt8[np.ndarray, "n height width c"]:
    kind, low, high = images.dtype, images.min(), images.max()
    if kind == np.uint8:
        return images
    if kind == np.bool_:
        return images.astype(np.uint8) * 255
    if kind == np.uint16 and high > 255:
        return (images >> 8).astype(np.uint8)
    if kind.kind in "iuf" and low >= 0 and high <= 1:
        return np.rint(images * 255).astype(np.uint8)
    if kind.kind in "iuf" and low >= 0 and high <= 255 and _is_whole(images):
        return images.astype(np.uint8)
    raise UserError(f"{path}: its pixels are {kind} from {low:.4g} to {high:.4g}; store bytes, or numbers "
                    "from 0 to 1")  # fmt: skip


def _whole(labels: np.ndarray, path: Path) -> Int64[np.ndarray, " n"]:
    flat = labels.reshape(-1)
    if flat.dtype.kind not in "iuf" or not _is_whole(flat):
        shown: Any = next((value for value in flat.tolist() if not isinstance(value, int)), flat[0])
        raise UserError(f"{path}: its labels are not whole numbers, such as {shown!r}; number the classes")
    return flat.astype(np.int64)


def _is_whole(values: np.ndarray) -> bool:
    return values.dtype.kind in "iu" or bool(np.isfinite(values).all() and (values == np.rint(values)).all())
