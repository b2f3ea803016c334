"""Latent folders: precomputed latents and text states in shards that any process may read or write.

    folder/index.json                 what the folder holds and from what; written before the first shard
    folder/null/text_0.npy            states of the null prompt, one file per encoder [l, d]; pooled_0.npy [p]
    folder/<bucket>/<00012>/          one finished shard; its clips are shard * shard_size + 0, 1, …
        latent.npy                    float16 [n, c, t, h, w], the encoder's means, not normalized
        keyframes.npy                 float16 [n, 1 + t, c, h, w], of single frames, if kept
        smaller.npy                   float16 [n, c, t, h, w], of smaller twins brought to size, if kept
        text_0.npy, offsets_0.npy     float16 [tokens, d] and int64 [n * captions + 1], per encoder
        pooled_0.npy                  float16 [n * captions, p], of an encoder that gives pooled text
        captions.jsonl                one list of captions per clip
        label.npy                     int64 [n], where clips have a class
        stamps.txt                    of clips of a list: which version of each clip was read, a line each

Texts are ragged: the states of caption k of clip i are rows offsets[i * captions + k] up to the next offset.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Int, Int64
from torch import Tensor

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import replacing, replacing_folder, write_json
from kinoflow.data.clips.buckets import parse
from kinoflow.data.latents.index import FORMAT, INDEX, LatentIndex, read_index

NULL, STAMPS = "null", "stamps.txt"
_OPEN = 256  # each mapped file is an open one, and systems allow a process 1,024


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The content of one shard: latents as `stored` gives them, and their captions.

    texts[e][i * captions + k] are encoder e's states of caption k of clip i. `stamps` say of each clip what
    it was made of, for those who ask whether it is still so; none where that cannot change. `labels` are
    positions in the index's classes, one a clip where there are some. `keyframes` are latents of the
    first frame and of the last of each latent frame, each encoded alone. `pooled` are pooled texts, in the
    order of `texts`; of an encoder that gives none it is empty. `smaller` are those of the smaller twins.
    """

    latent: Float16[np.ndarray, "n c t h w"]
    texts: Sequence[Sequence[Float[np.ndarray, "_ _"]]]
    captions: Sequence[Sequence[str]]
    stamps: Sequence[str] = ()
    labels: Sequence[int] = ()
    keyframes: Float16[np.ndarray, "n k c h w"] | None = None
    pooled: Sequence[Sequence[Float[np.ndarray, " p"]]] = ()
    smaller: Float16[np.ndarray, "n c t h w"] | None = None


def begin(
    folder: Path,
    index: LatentIndex,
    null: Sequence[Float[np.ndarray, "_ _"]],
    pooled: Sequence[Float[np.ndarray, " p"] | None] = (),
) -> None:
    """Write index.json and the null prompt's states, or check that the folder was begun the same way.

    Several processes may call it at once: they write equal files.
    """
    if (folder / INDEX).exists():
        before, after = asdict(read_index(folder)), asdict(index)
        for key, value in before.items():
            if value != after[key]:
                raise UserError(f"{folder}: {key} was {value} and is {after[key]} now; "
                                  "choose another out= or delete the folder")  # fmt: skip
        return
    (folder / NULL).mkdir(parents=True, exist_ok=True)
    for i, states in enumerate(null):
        with replacing(folder / NULL / f"text_{i}.npy") as aside:
            np.save(aside, np.asarray(states, np.float16))
    for i, whole in enumerate(pooled):
        if whole is not None:
            with replacing(folder / NULL / f"pooled_{i}.npy") as aside:
                np.save(aside, np.asarray(whole, np.float16))
    write_json(folder / INDEX, {"format": FORMAT, **index.described()})


def shard_path(folder: Path, bucket: str, shard: int) -> Path:
    """The folder of a shard: the bucket's shape and rate (without weight and batch size), then a number."""
    return folder / bucket.partition(" ")[0].replace("/", "_") / f"{shard:05d}"


def is_finished(folder: Path, bucket: str, shard: int) -> bool:
    """Whether write_shard completed."""
    return shard_path(folder, bucket, shard).is_dir()


def unfinished(folder: Path, index: LatentIndex, bucket: str) -> list[int]:
    """The shards of a bucket that are not there: one listing, not a question for each of them."""
    place = shard_path(folder, bucket, 0).parent
    there = {entry.name for entry in os.scandir(place)} if place.is_dir() else set()
    shards = range(index.num_shards(bucket))
    return [shard for shard in shards if shard_path(folder, bucket, shard).name not in there]


def read_stamps(folder: Path, bucket: str, shard: int) -> list[str]:
    """The stamps of a finished shard; none where it was written without."""
    path = shard_path(folder, bucket, shard) / STAMPS
    return path.read_text(encoding="utf-8", errors="replace").split() if path.exists() else []


def write_shard(folder: Path, bucket: str, shard: int, content: Shard) -> None:
    """Write a shard aside and rename it when whole."""
    whole = shard_path(folder, bucket, shard)
    with replacing_folder(whole) as aside:
        np.save(aside / "latent.npy", content.latent)
        if content.keyframes is not None:
            np.save(aside / "keyframes.npy", content.keyframes)
        if content.smaller is not None:
            np.save(aside / "smaller.npy", content.smaller)
        for i, states in enumerate(content.texts):
            lengths = np.array([len(state) for state in states], np.int64)
            np.save(aside / f"text_{i}.npy", np.concatenate(states).astype(np.float16))
            np.save(aside / f"offsets_{i}.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        for i, pooled in enumerate(content.pooled):
            if len(pooled):
                np.save(aside / f"pooled_{i}.npy", np.stack(pooled).astype(np.float16))
        lines = (json.dumps(list(captions), ensure_ascii=False) + "\n" for captions in content.captions)
        (aside / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
        if len(content.labels):
            np.save(aside / "label.npy", np.array(content.labels, np.int64))
        if content.stamps:
            (aside / STAMPS).write_text("".join(f"{stamp}\n" for stamp in content.stamps), encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class PaddedText:
    """States of one text encoder, padded to the longest of the batch; mask is True on real tokens.

    `pooled` is the whole text in one vector, of an encoder that gives it.
    """

    hidden: Float[Tensor, "b l d"]
    mask: Bool[Tensor, "b l"]
    pooled: Float[Tensor, "b p"] | None = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Latents (normalized, float32) and the text states that belong to them, one entry per encoder.

    `labels` are positions in the index's classes, `keyframes` normalized latents of single frames, `smaller`
    those of smaller twins; None where there are none.
    """

    latent: Float[Tensor, "b c t h w"]
    texts: tuple[PaddedText, ...]
    labels: Int[Tensor, " b"] | None = None
    keyframes: Float[Tensor, "b k c h w"] | None = None
    smaller: Float[Tensor, "b c t h w"] | None = None

    @classmethod
    def of(cls, rows: Sequence["Row"], index: LatentIndex) -> "Batch":
        """Clips of folders whose statistics are the index's."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1, 1)
            for values in (index.latent_mean, index.latent_std)
        )
        latent = torch.from_numpy(np.stack([row.latent for row in rows])).float()
        stills = [row.keyframes for row in rows if row.keyframes is not None]
        keyframes = torch.from_numpy(np.stack(stills)).float() if stills else None
        twins = [row.smaller for row in rows if row.smaller is not None]
        smaller = (torch.from_numpy(np.stack(twins)).float() - mean) / std if twins else None
        texts = _padded([row.texts for row in rows], [row.pooled for row in rows] if index.pooled else None)
        labels = torch.tensor([row.label for row in rows]) if index.classes else None
        if keyframes is not None:
            keyframes = (keyframes - mean[..., 0]) / std[..., 0]
        latent = (latent - mean) / std
        return cls(latent=latent, texts=texts, labels=labels, keyframes=keyframes, smaller=smaller)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One clip as it is on disk: its latents, of each encoder the states of one caption, or its label.

    Where the folder has keyframes, those of a clip of more than one frame.
    """

    latent: Float16[np.ndarray, "c t h w"]
    texts: Sequence[Float[np.ndarray, "_ _"]]
    label: int | None = None
    keyframes: Float16[np.ndarray, "k c h w"] | None = None
    pooled: Sequence[Float[np.ndarray, " p"] | None] = ()
    smaller: Float16[np.ndarray, "c t h w"] | None = None


class LatentDataset:
    """Random access to a finished latent folder. Reads map files into memory and hold nothing else."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        for bucket in self.index.buckets:
            if missing := unfinished(self.folder, self.index, bucket):
                raise UserError(f"{shard_path(self.folder, bucket, missing[0])} is missing: run the same "
                                  "precompute command again, it makes what is left")  # fmt: skip
        null = self.folder / NULL
        self._null = [self._load(null / f"text_{i}.npy") for i in range(len(self.index.widths))]
        self._null_pooled = [
            self._load(null / f"pooled_{i}.npy") if width else None
            for i, width in enumerate(self.index.pooled)
        ]
        self._open = lru_cache(maxsize=_OPEN)(self._load)

    @property
    def buckets(self) -> tuple[str, ...]:
        """The names of the buckets."""
        return tuple(self.index.buckets)

    @property
    def fingerprint(self) -> str:
        """A name for what was precomputed from what, wherever the folder lies."""
        content = json.dumps(self.index.described(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def place(self, bucket: str, index: int) -> str:
        """Where a clip lies, for people."""
        return f"{self._path(bucket, index)} clip {index % self.index.shard_size}"

    def num_clips(self, bucket: str) -> int:
        """The number of clips of a bucket."""
        return self.index.buckets[bucket]

    def get(
        self,
        bucket: str,
        indices: Int64[np.ndarray, " b"],
        text_choice: Int64[np.ndarray, " b"] | Int64[np.ndarray, "b encoders"],
    ) -> Batch:
        """Normalized latents and padded texts of these clips.

        text_choice picks the caption of each clip, in [0, captions_per_clip), for all encoders or for each
        of them; -1 stands for the null prompt.
        """
        choices = each_encoder(text_choice, len(self._null)).tolist()
        return Batch.of([self.row(bucket, *each) for each in zip(indices.tolist(), choices, strict=True)],
                        self.index)  # fmt: skip

    def null(self, count: int) -> tuple[PaddedText, ...]:
        """The null prompt for so many clips."""
        return _padded([self._null] * count, [self._null_pooled] * count if self.index.pooled else None)

    def row(self, bucket: str, index: int, choices: Sequence[int]) -> Row:
        """One clip, with the caption that `choices` name for each encoder; -1 is the null prompt."""
        texts = [self._text(bucket, index, encoder, choice) for encoder, choice in enumerate(choices)]
        pooled = (
            [self._pooled(bucket, index, *each) for each in enumerate(choices)] if self.index.pooled else ()
        )
        label = self.label(bucket, index) if self.index.classes else None
        keyframes = None
        if self.index.keyframes and parse(bucket).frames > 1:
            keyframes = self._file(bucket, index, "keyframes")[index % self.index.shard_size]
        place, smaller = index % self.index.shard_size, None
        if self.index.upsample:
            smaller = self._file(bucket, index, "smaller")[place]
        stored = self.stored(bucket, index)
        return Row(
            latent=stored, texts=texts, label=label, keyframes=keyframes, pooled=pooled, smaller=smaller
        )

    def stored(self, bucket: str, index: int) -> Float16[np.ndarray, "c t h w"]:
        """The latents of one clip as they are on disk."""
        return self._file(bucket, index, "latent")[index % self.index.shard_size]

    def label(self, bucket: str, index: int) -> int:
        """The class of one clip of a folder that has classes."""
        return int(self._file(bucket, index, "label")[index % self.index.shard_size])

    def captions(self, bucket: str, index: int) -> list[str]:
        """The captions of one clip."""
        path = self._path(bucket, index) / "captions.jsonl"
        return json.loads(path.read_text(encoding="utf-8").split("\n")[index % self.index.shard_size])

    def _text(self, bucket: str, index: int, encoder: int, choice: int) -> Float[np.ndarray, "l d"]:
        if choice < 0:
            return self._null[encoder]
        offsets = self._file(bucket, index, f"offsets_{encoder}")
        row = index % self.index.shard_size * self.index.captions_per_clip + choice
        return self._file(bucket, index, f"text_{encoder}")[offsets[row] : offsets[row + 1]]

    def _pooled(self, bucket: str, index: int, encoder: int, choice: int) -> Float[np.ndarray, " p"] | None:
        if choice < 0 or not self.index.pooled[encoder]:
            return self._null_pooled[encoder]
        row = index % self.index.shard_size * self.index.captions_per_clip + choice
        return self._file(bucket, index, f"pooled_{encoder}")[row]

    def _file(self, bucket: str, index: int, name: str) -> np.ndarray:
        return self._open(self._path(bucket, index) / f"{name}.npy")

    def _path(self, bucket: str, index: int) -> Path:
        return shard_path(self.folder, bucket, index // self.index.shard_size)

    @staticmethod
    def _load(path: Path) -> np.ndarray:
        try:
            return np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is unreadable ({error}); delete its shard's folder and run the same "
                              "precompute command again") from error  # fmt: skip


def each_encoder(
    choice: Int64[np.ndarray, " b"] | Int64[np.ndarray, "b _"], encoders: int
) -> Int64[np.ndarray, "b _"]:
    """A choice of captions for each encoder, where there may be one for all of them, or for none."""
    return np.repeat(choice[:, None], encoders, axis=1) if choice.ndim == 1 else choice[:, :encoders]


def _padded(
    states: Sequence[Sequence[Float[np.ndarray, "_ _"]]],
    pooled: Sequence[Sequence[Float[np.ndarray, " p"] | None]] | None,
) -> tuple[PaddedText, ...]:
    """Of clips' states of each encoder, and their pooled texts, a batch for each encoder."""
    texts = tuple(map(_pad, zip(*states, strict=True)))
    if pooled is None:
        return texts
    whole = map(_stack, zip(*pooled, strict=True))
    return tuple(replace(text, pooled=one) for text, one in zip(texts, whole, strict=True))


def _pad(states: Sequence[Float[np.ndarray, "_ d"]]) -> PaddedText:
    """Ragged states as one float32 tensor, zero where the mask is False."""
    longest = max(len(state) for state in states)
    hidden = np.zeros((len(states), longest, states[0].shape[1]), np.float32)
    mask = np.zeros((len(states), longest), bool)
    for i, state in enumerate(states):
        hidden[i, : len(state)] = state
        mask[i, : len(state)] = True
    return PaddedText(hidden=torch.from_numpy(hidden), mask=torch.from_numpy(mask))


def _stack(pooled: Sequence[Float[np.ndarray, " p"] | None]) -> Float[Tensor, "b p"] | None:
    found = [each for each in pooled if each is not None]
    return torch.from_numpy(np.stack(found).astype(np.float32)) if found else None


def is_latent_folder(path: Path) -> bool:
    """Whether `begin` has been here."""
    return (path / INDEX).is_file() and (path / NULL).is_dir()
