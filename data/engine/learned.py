"""Scores by a CLIP-like model: how well pictures and caption of a kept shot agree, and how good it looks.

In OUT/embeddings lies what the model made of each shot (`kept`): the mean of its pictures' unit embeddings,
and the embedding of its caption; from these and a linear layer the scores follow without the model.
"""

import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kinoflow.conditioning.clip_model import ClipModel
from kinoflow.configs.errors import UserError, one_line, os_error_line
from kinoflow.configs.files import replacing, write_json
from kinoflow.data.clips import manifest
from kinoflow.data.clips.manifest import ClipEntry
from kinoflow.data.clips.workers import Workers
from kinoflow.data.engine import captioning, clusters, kept
from kinoflow.data.engine.config import ClipConfig, digest
from kinoflow.data.engine.kept import LEDGER, SETTINGS, Kept
from kinoflow.data.engine.score import CLUSTERED, LEARNED

_FOLDER = kept.EMBEDDINGS
_FORMAT, _SIDE = 1, 512  # pixels of the longer side; these models see some 224 to 384
_THREADS = 4
Shown = Callable[[Iterable[Any], str, int], Iterable[Any]]


@dataclass(frozen=True, kw_only=True)
class Told:
    """How many clips the model was `asked` about now, and which could not be looked at."""

    asked: int
    failed: tuple[Mapping[str, Any], ...]


def embed(listing: Path, model: ClipModel, frames: int, *, workers: Workers, show: Shown) -> Told:
    """Ask about each clip of a list whose pictures or caption the model has not seen.

    Raises:
        UserError: the list cannot be read; all clips fail, or twenty one after another.
    """
    folder = listing.parent / _FOLDER
    how = digest([_FORMAT, model.key, frames, _SIDE])
    cache, entries = Kept(folder, how), manifest.read(listing).entries
    todo = [entry for entry in entries if _news(entry, cache.get(entry))]
    known = {kept.key_of(entry): cache.get(entry) for entry in todo}

    def ask(entry: ClipEntry) -> dict[str, Any]:
        before = known[kept.key_of(entry)]
        if before is None:
            shown = workers.call(kept.pictures, entry.path, kept.sampled(entry, frames), _SIDE)
            picture = _packed(model.pictures([_opened(each) for each in shown]).mean(axis=0))
        else:
            picture = before["picture"]
        text = _packed(model.text(entry.caption)) if entry.caption else None
        return {"picture": picture, "text": text, "said": digest([entry.caption])}

    failed = kept.gather(
        show(kept.work(todo, ask, _THREADS), "embedding", len(todo)), cache.put,
        model=model.name, of=len(entries), ledger=folder / LEDGER, lack="could not be looked at",
    )  # fmt: skip
    write_json(folder / SETTINGS, {"how": how, "model": model.name})
    return Told(asked=len(todo), failed=failed)


def cluster(listing: Path, count: int) -> None:
    """Put what `embed` looked at of a list into so many clusters, for `added`.

    Raises:
        UserError: fewer clips than clusters; the list cannot be read, or the centres not written.
    """
    folder = listing.parent / _FOLDER
    how = _how(listing.parent)
    rows = kept.read(folder, how)
    seen = [rows[key] for key in map(kept.key_of, manifest.read(listing).entries) if key in rows]
    points = [_unpacked(row["picture"]) for row in seen]
    found = clusters.centres(np.stack(points) if points else np.empty((0, 1), np.float32), count)
    path = _centres(folder, how)
    try:
        with replacing(path) as aside, aside.open("wb") as file:
            np.save(file, found)
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error


def added(table: Any, out: Path, config: ClipConfig) -> Any:
    """The table of scores with those that the last `kinoflow data embed OUT` allows; itself before one.

    A shot that was not looked at has none; nor has one whose caption changed since a `match`.

    Raises:
        UserError: the settings or the linear layer cannot be read.
    """
    import pyarrow

    if not (out / _FOLDER / SETTINGS).exists():
        return table
    how = _how(out)
    rows = kept.read(out / _FOLDER, how)
    head = None if config.aesthetic is None else _Head(Path(config.aesthetic))
    captions = captioning.read(out)
    facts = table.select(["path", "first_frame", "frames", "caption", "camera"]).to_pylist()
    values = [_scores(each, rows, captions, head) for each in facts]
    for key in LEARNED:
        column = pyarrow.array([row.get(key) for row in values], pyarrow.float64())
        table = table.append_column(key, column)
    path = _centres(out / _FOLDER, how)
    return _clustered(table, facts, rows, path) if path.exists() else table


def _clustered(
    table: Any, facts: Sequence[Mapping[str, Any]], rows: Mapping[kept.Key, Mapping[str, Any]], path: Path
) -> Any:
    """The table with the cluster of each shot that was looked at, and how many of them are in it."""
    import pyarrow

    try:
        centres = np.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read; run kinoflow data embed again") from error
    keys = [(each["path"], each["first_frame"], each["frames"]) for each in facts]
    known = [at for at, key in enumerate(keys) if key in rows]
    points = [_unpacked(rows[keys[at]]["picture"]) for at in known]
    nearest = clusters.nearest(np.array(points, np.float32).reshape(len(points), centres.shape[1]), centres)
    sizes = np.bincount(nearest, minlength=len(centres))
    for key, values in zip(CLUSTERED, (nearest, sizes[nearest]), strict=True):
        column = np.full(len(keys), np.nan)
        column[known] = values
        table = table.append_column(key, pyarrow.array(column, pyarrow.float64(), from_pandas=True))
    return table


def _how(out: Path) -> str:
    """In which way the last `embed` looked."""
    path = out / _FOLDER / SETTINGS
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["how"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: cannot be read; run kinoflow data embed {out} again") from None


def _centres(folder: Path, how: str) -> Path:
    return folder / f"centres-{how}.npy"


def _scores(
    facts: Mapping[str, Any], rows: Mapping[kept.Key, Mapping[str, Any]],
    captions: captioning.Captions | None, head: "_Head | None",
) -> dict[str, float]:  # fmt: skip
    row = rows.get((facts["path"], facts["first_frame"], facts["frames"]))
    if row is None or not facts["path"]:
        return {}
    picture = _unpacked(row["picture"])
    found = {} if head is None else {"aesthetic": head(picture)}
    entry = ClipEntry(path=facts["path"], caption=facts["caption"] or "", first_frame=facts["first_frame"],
                      frames=facts["frames"], extra={"camera": facts["camera"]})  # fmt: skip
    caption = entry.caption if captions is None else captions.applied(entry).caption
    if row["text"] is not None and row["said"] == digest([caption]):
        text = _unpacked(row["text"])
        norms = np.linalg.norm(picture) * np.linalg.norm(text)
        found["match"] = float(picture @ text / max(float(norms), 1e-9))
    return found


class _Head:
    """A linear layer from an embedding to one number, as LAION's first aesthetic predictors are."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        self._path = path
        try:
            found = {key: value.astype(np.float32).reshape(-1) for key, value in load_file(path).items()}
        except OSError as error:
            raise UserError(os_error_line(path, error)) from error
        except (SafetensorError, ValueError, TypeError) as error:
            raise UserError(f"clip.aesthetic: {path}: is no safetensors file ({one_line(error)})") from error
        weights = [value for value in found.values() if len(value) > 1]
        biases = [value for value in found.values() if len(value) == 1]
        if len(weights) != 1 or len(biases) > 1:
            raise UserError(f"clip.aesthetic: {path}: is not one linear layer; give that alone")
        self._weight, self._bias = weights[0], float(biases[0][0]) if biases else 0.0

    def __call__(self, picture: np.ndarray) -> float:
        if len(picture) != len(self._weight):
            said = f"takes {len(self._weight)} numbers, clip.model gives {len(picture)}"
            raise UserError(f"clip.aesthetic: {self._path}: {said}; give the layer of that model")
        return float(picture @ self._weight) + self._bias


def _news(entry: ClipEntry, row: Mapping[str, Any] | None) -> bool:
    return row is None or row["said"] != digest([entry.caption])


def _opened(jpeg: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(jpeg)).convert("RGB")


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.astype(np.float16).tobytes()).decode()


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.float16).astype(np.float32)
