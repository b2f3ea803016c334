"""Which clips a step takes: a function of (seed, step) alone, whatever the number of processes.

An epoch over n clips is a keyed permutation of range(n) evaluated at single points, so nothing of size n is
held. Buckets take turns by their weights: a step belongs to the bucket in whose share of [0, 1) its
radical inverse lies (van der Corput 1935: its bits, mirrored at the point). So each 64 steps have every
bucket's share within one; inside each 64 they are shuffled. How often a bucket came before is counted by the
bits of the step. All are closed forms: a resumed run needs no state, and no clip comes twice before all of
its bucket came. The sets of a bucket take turns by their weights in the same way, clip by clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import seeded

_BLOCK = 64
_ROUNDS = 4
_BITS = 48  # of the number of a step


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The bucket of a step, by position, the clips of that bucket it takes, and how often each came before.

    Clips are counted through all sets of the bucket, one set after the other.
    """

    bucket: int
    indices: Int64[np.ndarray, " b"]
    epochs: Int64[np.ndarray, " b"]


class Sampler:
    """Draws for buckets of the given lengths (clips), weights (share of the steps) and global batch sizes.

    The clips of a bucket lie in one set or several; lengths[bucket] says how many in each, 0 where a set has
    none. Without `set_weights` they are one heap, of which each clip comes once an epoch. With them, a set
    has its share of the bucket's draws, whatever its length, and epochs of its own.
    """

    def __init__(
        self, lengths: Sequence[Sequence[int]], *, weights: Sequence[float], batch_sizes: Sequence[int],
        seed: int, set_weights: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        if not len(lengths) == len(weights) == len(batch_sizes) > 0:
            raise UserError("buckets: give one length, one weight and one batch size for each")
        if min(map(sum, lengths)) < 1 or min(batch_sizes) < 1:
            raise UserError("buckets: a bucket without clips or with an empty batch cannot be sampled")
        if min(weights) < 0 or sum(weights) <= 0:
            raise UserError("buckets: weights must not be negative, and one must be positive")
        self._lengths, self._batch_sizes, self._seed = [[*each] for each in lengths], list(batch_sizes), seed
        self._turns = Turns(weights, seed)
        self._set_turns: list[Turns | None] = [None] * len(lengths)
        for bucket, sets in enumerate(self._lengths):
            if set_weights is not None and sum(length > 0 for length in sets) > 1:
                shares = [weight * (length > 0) for weight, length in zip(set_weights, sets, strict=True)]
                self._set_turns[bucket] = Turns(shares, seeded("sets", seed, bucket))

    def draw(self, step: int, rank: int = 0, world_size: int = 1) -> Draw:
        """Slice `rank` of `world_size` of this step's batch.

        Raises:
            UserError: the batch does not divide evenly.
        """
        who, before = self._turns.at(np.array([step]))
        bucket = int(who[0])
        size = self._batch_sizes[bucket]
        if size % world_size:
            raise UserError(f"batch_size: {size} does not divide into {world_size} slices")
        part = size // world_size
        positions = np.arange(part, dtype=np.int64) + int(before[0]) * size + rank * part
        indices, epochs = self._clips(bucket, positions)
        return Draw(bucket=bucket, indices=indices, epochs=epochs)

    def _clips(
        self, bucket: int, positions: Int64[np.ndarray, " b"]
    ) -> tuple[Int64[np.ndarray, " b"], Int64[np.ndarray, " b"]]:
        """The clips at these positions of the bucket's endless stream, and how often each came before."""
        lengths, turns = self._lengths[bucket], self._set_turns[bucket]
        if turns is None:
            length = sum(lengths)
            return permuted(positions, length, self._seed + bucket), positions // length
        indices, epochs = np.empty_like(positions), np.empty_like(positions)
        which, before = turns.at(positions)
        for number in np.unique(which).tolist():
            own, length = which == number, lengths[number]
            order = seeded("set", self._seed, bucket, number)
            indices[own] = sum(lengths[:number]) + permuted(before[own], length, order)
            epochs[own] = before[own] // length
        return indices, epochs


class Turns:
    """Whose turn it is at each of an endless row of steps, by weights: closed forms of (seed, step)."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self._seed = seed
        shares = np.cumsum(np.asarray(weights, np.float64)) / sum(weights)
        # Whole numbers, so that drawing and counting cannot differ; the last one with a weight ends at 1.
        self._ends = [round(share * 2**_BITS) for share in shares.tolist()]
        last = max(who for who, weight in enumerate(weights) if weight > 0)
        self._ends[last:] = [2**_BITS] * (len(self._ends) - last)

    def at(self, steps: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Who has each of these steps, and how many that one had before it."""
        who, before = np.empty_like(steps), np.empty_like(steps)
        blocks = steps // _BLOCK
        for block in np.unique(blocks).tolist():
            turns, inside = self.block(block), blocks == block
            earlier = np.array(self.before(block * _BLOCK), np.int64)
            same = np.tril(turns[:, None] == turns, -1).sum(axis=1)
            slots = steps[inside] % _BLOCK
            who[inside], before[inside] = turns[slots], (earlier[turns] + same)[slots]
        return who, before

    def before(self, step: int) -> list[int]:
        """How many of the first steps each one has; `step` is a multiple of 64."""
        return np.diff([0, *(_inverses_below(end, step) for end in self._ends)]).tolist()

    def block(self, block: int) -> Int64[np.ndarray, " steps"]:
        """Who has each step of the 64 of this number."""
        inverses = [_inverse(step) for step in range(block * _BLOCK, (block + 1) * _BLOCK)]
        turns = np.searchsorted(self._ends, inverses, side="right")
        return np.random.default_rng(seeded("turns", self._seed, block)).permutation(turns)


def _inverse(step: int) -> int:
    """The radical inverse of a step in base 2, times 2^_BITS."""
    return int(f"{step:0{_BITS}b}"[::-1], 2)


def _inverses_below(end: int, steps: int) -> int:
    """How many of the first `steps` radical inverses are less than `end`, both times 2^_BITS.

    The steps fall into runs of 2^k, one for each bit of their number, whose inverses lie 2^-k apart.
    """
    count, first = 0, 0
    for k in reversed(range(steps.bit_length())):
        if steps >> k & 1:
            gap = 2 ** (_BITS - k)
            count += min(max(-(-(end - _inverse(first)) // gap), 0), 2**k)
            first += 2**k
    return count


def permuted(positions: Int64[np.ndarray, " n"], length: int, seed: int) -> Int64[np.ndarray, " n"]:
    """The clip at each position of an endless stream of epochs, each its own permutation of range(length).

    A four-round Feistel network over the least even number of bits that holds `length`, walked until it
    lands inside (less than four tries on average).
    """
    epochs, inside = np.divmod(positions.astype(np.uint64), np.uint64(length))
    half = np.uint64(max((length - 1).bit_length() + 1, 2) // 2)
    values = _feistel(inside, epochs, half, seed)
    while (outside := values >= length).any():
        values[outside] = _feistel(values[outside], epochs[outside], half, seed)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, epochs: np.ndarray, half: np.uint64, seed: int) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for turn in range(_ROUNDS):
        key = np.uint64((seed * 0x9E3779B97F4A7C15 + turn * 0xD1B54A32D192ED03) % 2**64)
        left, right = right, left ^ (_mix(right + key + _mix(epochs + key)) & mask)
    return (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
