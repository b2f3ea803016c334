"""Where a clip goes on: what rests does not change there, what moves becomes what is made."""

import numpy as np
import pytest

from kinoflow.sample.seam import going_on, resting


def scene(count, seed=0, height=96, width=160):
    picture = np.random.default_rng(seed).integers(40, 200, (1, height, width, 3), dtype=np.uint8)
    return np.repeat(picture, count, axis=0)


def went_on(own, made, *sizes):
    pieces = np.split(made, np.cumsum(sizes)) if sizes else [made]
    return np.concatenate(list(going_on(own, iter(pieces))))


def test_what_rests_stays_and_is_lost_over_eight_frames():
    """The clip comes back as it was given, and the first frame added is its last."""
    own, made = scene(16), scene(30) + np.uint8(3)
    made[16:] += np.uint8(1)
    found = went_on(own, made)
    assert np.array_equal(found[:16], own) and np.array_equal(found[16], own[-1])
    for place in range(8):
        assert np.array_equal(found[16 + place], np.rint(made[20] - (1 - place / 8) * 4.0))
    assert np.array_equal(found[24:], made[24:])


def test_what_moves_becomes_what_is_made():
    """(n + 1) / 9 of it in the clip's last eight frames, and all of it in those that are added."""
    own = np.stack([np.roll(frame, 9 * i, axis=1) for i, frame in enumerate(scene(16))])
    made = np.stack([np.roll(frame, 9 * i, axis=1) for i, frame in enumerate(scene(30, seed=1))])
    found = went_on(own, made)
    share = np.clip((np.arange(16) - 7) / 9, 0, 1)[:, None, None, None]
    assert np.array_equal(found[:16], np.rint(share * made[:16] + (1 - share) * own).astype(np.uint8))
    assert np.array_equal(found[16:], made[16:])


def test_a_shade_is_let_pass_far_from_what_moved():
    """By the clip itself: of a background that comes back ten levels lighter; not beside a moving thing."""
    own, made = np.full((16, 96, 160, 3), 100, np.uint8), np.full((24, 96, 160, 3), 100, np.uint8)
    made[16:] = 110
    for i in range(16):
        own[i, 40:60, i : i + 20] = 200
    found = went_on(own, made)
    moved = np.zeros((96, 160), bool)
    moved[16:84, :60] = True  # 24 pixels around where it was
    assert (found[16][:, 66:] == 100).all() and (found[16][:, 64:] <= 101).all()
    assert (found[16, 40:60, 40:50] == 110).all()
    assert not resting(own[-8:], 6.0, 49)[moved].all()
    assert np.array_equal(found[:16, :, 66:], own[:, :, 66:])


@pytest.mark.parametrize("sizes", [(8, 8, 8), (10, 2, 8), (1, 1, 20), (17,), (24,)])
def test_the_pieces_make_no_difference(sizes):
    own, made = scene(16), scene(30, seed=1)
    made[:, :, :80] = own[-1, :, :80] + np.uint8(2)
    assert np.array_equal(went_on(own, made, *sizes), went_on(own, made))


def test_frames_come_as_soon_as_they_can():
    """The clip's first before any is made, its last with the first added, and then one piece for one."""
    own, made = scene(20), scene(40)
    asked = []

    def pieces():
        for first in range(0, 40, 4):
            asked.append(first)
            yield made[first : first + 4]

    found = going_on(own, pieces())
    assert len(next(found)) == 12 and asked == []
    assert len(next(found)) == 8 and asked[-1] == 20
    assert len(next(found)) == 4 and len(next(found)) == 4 and asked[-1] == 24
    assert sum(map(len, found)) == 12


def test_resting_counts_what_is_near_and_fades_between():
    frames = np.full((3, 20, 20, 3), 50, np.uint8)
    frames[0, 10, 10, 1] += 6
    still = resting(frames, 4.0, 5)[..., 0]
    assert still[10, 10] == pytest.approx(0.5) and still[10, 12] == pytest.approx(0.7, abs=0.05)
    assert (still[:, :6] == 1).all() and (still[:6] == 1).all()
    frames[0, 10, 10, 1] += 20
    assert resting(frames, 4.0, 5)[10, 10, 0] == 0
