"""The order of clips: a function of (seed, step), the same for any number of processes."""

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from kinoflow.configs.errors import UserError
from kinoflow.data.clips.order import Sampler, Turns, permuted

LENGTHS, WEIGHTS, SIZES = [101, 1000, 7], [0.3, 0.6, 0.1], [4, 8, 12]


def sampler(seed=5):
    return Sampler([[length] for length in LENGTHS], weights=WEIGHTS, batch_sizes=SIZES, seed=seed)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 64, 100, 1025])
def test_every_epoch_is_a_permutation(length):
    stream = permuted(np.arange(3 * length), length, seed=1)
    epochs = stream.reshape(3, length)
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    if length >= 64:
        assert (epochs[0] == epochs[1]).mean() < 0.1, "another epoch, another order"
        assert (permuted(np.arange(length), length, seed=2) == epochs[0]).mean() < 0.1
        assert abs(np.corrcoef(epochs[0], np.arange(length))[0, 1]) < 0.3


def test_order_is_close_to_uniform():
    """Where clip 0 lands over many epochs: chi-square of 15 degrees, 99.9 % quantile 37.7."""
    length, epochs = 50, 3200
    stream = permuted(np.arange(epochs * length), length, seed=9).reshape(epochs, length)
    counts, _ = np.histogram(stream.argmin(axis=1), bins=np.linspace(0, length, 17))
    expected = np.diff(np.ceil(np.linspace(0, length, 17))) * epochs / length
    assert ((counts - expected) ** 2 / expected).sum() < 37.7


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_process(world_size):
    one, many = sampler(), sampler()
    for step in (0, 1, 63, 64, 1000, 12345):
        whole = one.draw(step)
        slices = [many.draw(step, rank, world_size) for rank in range(world_size)]
        assert {part.bucket for part in slices} == {whole.bucket}
        assert np.concatenate([part.indices for part in slices]).tolist() == whole.indices.tolist()


def test_resume_needs_no_history():
    order = sampler()
    straight = [order.draw(step) for step in range(200)]
    again = sampler()
    for step in (199, 3, 150):
        assert again.draw(step).indices.tolist() == straight[step].indices.tolist()


def test_buckets_follow_their_weights_and_use_each_clip_once_per_epoch():
    order = sampler()
    draws = [order.draw(step) for step in range(64 * 20)]
    counts = np.bincount([draw.bucket for draw in draws])
    assert np.abs(counts - np.array(WEIGHTS) * len(draws)).max() <= 2
    for bucket, length in enumerate(LENGTHS):
        seen = np.concatenate([draw.indices for draw in draws if draw.bucket == bucket])
        for epoch in range(len(seen) // length):
            assert sorted(seen[epoch * length : (epoch + 1) * length]) == list(range(length))
    runs = np.diff(np.flatnonzero(np.array([draw.bucket for draw in draws]) == 2))
    assert runs.min() < 5 < runs.max() < 128, "turns are shuffled, never far apart"


@given(
    weights=st.lists(st.floats(0, 1e6) | st.sampled_from([0.3, 0.001, 0.699, 1e-9]), min_size=1, max_size=9),
    block=st.integers(0, 2**20),
)
@example(weights=[0.3, 0.001, 0.699], block=2)
def test_turns_are_counted_as_they_are_taken(weights, block):
    """Each 64 steps have a bucket's share within one, and what came before is what was counted."""
    assume(sum(weights) > 0)
    count = len(weights)
    order = Turns(weights, seed=1)
    turns = order.block(block)
    taken = np.bincount(turns, minlength=count)
    shares = np.array(weights) / sum(weights)
    assert len(turns) == 64 and np.abs(taken - 64 * shares).max() <= 1 + 1e-6
    assert all(taken[np.array(weights) == 0] == 0)
    before, after = (np.array(order.before(64 * at)) for at in (block, block + 1))
    assert (after - before == taken).all() and before.sum() == 64 * block
    assert np.abs(before - 64 * block * shares).max() <= 1 + np.log2(1 + block)


def test_seeds_differ():
    assert sampler(1).draw(7).indices.tolist() != sampler(2).draw(7).indices.tolist()


@pytest.mark.parametrize(
    ("lengths", "weights", "sizes", "message"),
    [
        ([], [], [], "one length"),
        ([0], [1.0], [4], "without clips"),
        ([5], [0.0], [4], "positive"),
        ([5], [1.0], [0], "empty batch"),
    ],
)
def test_bad_buckets(lengths, weights, sizes, message):
    with pytest.raises(UserError, match=message):
        Sampler([[length] for length in lengths], weights=weights, batch_sizes=sizes, seed=0)


def test_uneven_split_names_the_key():
    with pytest.raises(UserError, match=r"batch_size: \d+ does not divide into 3 slices"):
        Sampler([[5]], weights=[1.0], batch_sizes=[4], seed=0).draw(0, 0, 3)
