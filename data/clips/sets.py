"""Several sets of clips that a run learns from, each with its share: lists, or folders of latents."""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kinoflow.configs.errors import UserError
from kinoflow.data.clips import manifest
from kinoflow.data.clips.buckets import Bucket
from kinoflow.data.clips.fit import Clips, Sample
from kinoflow.data.clips.workers import Workers

_WEIGHED = re.compile(r"(.+?)\s+weight=(\S+)")


@dataclass(frozen=True, kw_only=True)
class Sets:
    """Where sets lie, and the share that each has of a bucket's draws, among those that have the bucket.

    Without weights the clips of all are one heap: a set counts by how many it has.
    """

    places: tuple[str, ...]
    weights: tuple[float, ...] | None

    def fingerprint(self, sets: Sequence[str]) -> str:
        """A name for sets of these names, in their order and with their weights; of one alone its own."""
        if len(sets) == 1:
            return sets[0]
        return hashlib.sha256("\0".join([*sets, str(self.weights)]).encode()).hexdigest()


def parse(texts: Sequence[str], key: str) -> Sets:
    """Read places with or without ` weight=3` behind them; beside one that has a weight, others have 1.

    Raises:
        UserError: none, the same one twice, or a weight that is no number above 0; it names the `key`.
    """
    if not texts:
        raise UserError(f"{key}: is empty; name at least one")
    found = [match.groups() if (match := _WEIGHED.fullmatch(text)) else (text, None) for text in texts]
    places = tuple(place for place, _ in found)
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"{key}: {place} is named twice; give it a weight instead")
    if not any(weight for _, weight in found):
        return Sets(places=places, weights=None)
    return Sets(places=places, weights=tuple(_weight(text or "1", key) for _, text in found))


def _weight(text: str, key: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(f"{key}: weight={text} is no number above 0; write for example 'a weight=3'")
    return weight


class ClipSets:
    """The clips of one list or several, cut to buckets: those of a bucket are counted list after list.

    Clips that cannot be read are written to `quarantine`, and replaced by others of their list and bucket.

    Raises:
        UserError: a list that cannot be read, or a folder of clips that is away.
    """

    def __init__(
        self, texts: Sequence[str], key: str, buckets: Sequence[Bucket], *, seed: int, quarantine: Path,
        workers: Workers | None = None,
    ) -> None:  # fmt: skip
        sets = parse(texts, key)
        lists = [manifest.read(place) for place in sets.places]
        named = sets.places if len(lists) > 1 else ("",)
        self._clips = [
            Clips(listing, buckets, seed, quarantine, workers, of=name)
            for listing, name in zip(lists, named, strict=True)
        ]
        self.weights = sets.weights
        self.fingerprint = sets.fingerprint([listing.fingerprint for listing in lists])
        self.warnings = [listing.warning for listing in lists if listing.bad]

    def lengths(self, bucket: Bucket) -> list[int]:
        """How many clips of each list, good or bad, serve the bucket."""
        return [clips.count(bucket) for clips in self._clips]

    def count(self, bucket: Bucket) -> int:
        """How many clips of all lists serve the bucket."""
        return sum(self.lengths(bucket))

    def get(self, index: int, bucket: Bucket) -> Sample:
        """Clip `index`, modulo `count`, of those that serve the bucket; each round cuts elsewhere in time.

        Raises:
            UserError: as `data.clips.fit.Clips.get`.
        """
        clips, turn = self._find(index, bucket)
        return clips.get(turn, bucket)

    def name(self, index: int, bucket: Bucket) -> str:
        """The path of what `get` gives, as its list has it."""
        clips, turn = self._find(index, bucket)
        return clips.name(turn, bucket)

    def stamp(self, index: int, bucket: Bucket) -> str:
        """What `get` would say in `Sample.stamp`, without reading the clip: another where it changed."""
        clips, turn = self._find(index, bucket)
        return clips.stamp(turn, bucket)

    def _find(self, index: int, bucket: Bucket) -> tuple[Clips, int]:
        """The list of a clip, and its index there in the same round."""
        lengths = self.lengths(bucket)
        epoch, inside = divmod(index, sum(lengths))
        number, own = locate(inside, lengths)
        return self._clips[number], epoch * lengths[number] + own


def locate(index: int, lengths: Sequence[int]) -> tuple[int, int]:
    """In which set clip `index` of all of them lies, and where there."""
    for number, length in enumerate(lengths):
        if index < length:
            return number, index
        index -= length
    raise IndexError(index)
