"""Clips cut to buckets, and what a bad clip costs."""

import json
from fractions import Fraction

import numpy as np
import pytest

from kinoflow.configs.errors import UserError
from kinoflow.data import video
from kinoflow.data.clips import manifest
from kinoflow.data.clips.buckets import parse
from kinoflow.data.clips.fit import Clips, fit
from kinoflow.data.clips.manifest import ClipEntry

SHORT, LONG, IMAGE = parse("4x16x16@16"), parse("16x16x16@16"), parse("1x16x16@16")


def ramp(frames, height=32, width=32, step=6):
    """Gray clips whose level says which frame it is."""
    levels = 16 + step * np.arange(frames, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)).copy()


@pytest.fixture
def listing(tmp_path):
    """Six clips of 32 frames at 32 fps; clip 2 is cut off, clip 4 has 6 frames only."""
    entries = []
    for number in range(6):
        frames = 6 if number == 4 else 32
        video.write(tmp_path / f"{number}.mp4", ramp(frames), fps=Fraction(32), crf=1)
        known = {"frames": frames, "fps": Fraction(32), "width": 32, "height": 32} if number % 2 else {}
        entries.append(ClipEntry(path=f"{number}.mp4", caption=f"clip {number}", **known))
    bad = tmp_path / "2.mp4"
    bad.write_bytes(bad.read_bytes()[:300])
    manifest.write(tmp_path / "clips.jsonl", entries)
    return manifest.read(tmp_path / "clips.jsonl")


def clips(listing, name="quarantine.jsonl", buckets=(SHORT, LONG, IMAGE), seed=3):
    return Clips(listing, buckets, seed, listing.path.parent / name)


def level(frames):
    return np.round((frames.astype(float).mean((1, 2, 3)) - 16) / 6).astype(int).tolist()


def test_frames_are_spaced_by_the_bucket_and_windows_vary(listing):
    source, starts = clips(listing), set()
    for index in range(40):
        sample = source.get(index, SHORT)
        assert sample.video.shape == (4, 16, 16, 3)
        assert sample.video.dtype == np.uint8
        first, *rest = level(sample.video)
        assert rest == [first + 2, first + 4, first + 6]  # 32 fps to 16
        starts.add(first)
    assert len(starts) > 10
    assert max(starts) <= 25


def test_a_clip_serves_only_the_buckets_it_fills(listing):
    source = clips(listing)
    assert (source.count(SHORT), source.count(LONG), source.count(IMAGE)) == (4, 4, 5)
    assert {source.get(i, LONG).position for i in range(8)} == {0, 1, 3, 5}
    assert {source.get(i, IMAGE).position for i in range(5)} == {0, 1, 3, 4, 5}


def test_the_same_call_gives_the_same_clip(listing):
    one, two = clips(listing), clips(listing, name="other.jsonl")
    for index in (7, 0, 7):
        np.testing.assert_array_equal(one.get(index, SHORT).video, two.get(index, SHORT).video)
    other = clips(listing, seed=4)
    assert any(level(one.get(i, SHORT).video) != level(other.get(i, SHORT).video) for i in range(12))


def test_a_clip_that_goes_bad_is_replaced_and_shifts_nothing(listing):
    before = [clips(listing).get(i, SHORT) for i in range(4)]
    assert [sample.position for sample in before] == [0, 1, 3, 5]
    (listing.path.parent / "1.mp4").write_bytes(b"damaged")
    for _ in range(2):  # found bad, then already known
        source = clips(listing)
        after = [source.get(i, SHORT) for i in range(4)]
        assert [sample.position for sample in after] == [0, 3, 3, 5]
        assert [sample.caption for sample in after] == ["clip 0", "clip 3", "clip 3", "clip 5"]
        for i in (0, 2, 3):
            np.testing.assert_array_equal(after[i].video, before[i].video)
    rows = [json.loads(r) for r in (listing.path.parent / "quarantine.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == ["2.mp4", "1.mp4"]
    assert all(row["reason"] for row in rows)


def test_when_every_clip_is_bad(listing):
    for number in (0, 1, 3, 5):
        (listing.path.parent / f"{number}.mp4").write_bytes(b"")
    source = clips(listing)
    with pytest.raises(UserError, match="no good clip fills 16x16x16@16") as caught:
        source.get(0, LONG)
    assert "\n" not in str(caught.value)


def test_a_torn_quarantine_line_is_ignored(listing):
    (listing.path.parent / "quarantine.jsonl").write_text('{"path": "0.mp4", "reason": "x"}\n{"path": "1.m')
    assert [clips(listing).get(i, SHORT).position for i in range(2)] == [1, 1]


def test_a_list_that_overstates_a_clip_costs_the_clip_only(listing):
    wrong = ClipEntry(path="4.mp4", frames=32, fps=Fraction(32), width=32, height=32)
    manifest.write(listing.path, [wrong, *listing.entries[:2]])
    assert clips(manifest.read(listing.path)).get(0, LONG).position == 1


def test_fit_crops_the_centre_and_averages():
    frames = np.zeros((2, 40, 80, 3), np.uint8)
    frames[:, :, 20:60] = 200  # the centre square
    np.testing.assert_array_equal(fit(frames, 10, 10), np.full((2, 10, 10, 3), 200))
    assert fit(frames, 10, 20)[0, 0, 0, 0] == 0, "the whole width where the aspect is the same"
    checks = np.indices((64, 64)).sum(0) % 2 * 254
    small = fit(np.repeat(checks[None, ..., None], 3, axis=-1).astype(np.uint8), 16, 16)
    assert np.abs(small.astype(int) - 127).max() <= 1, "antialiased"
    same = np.random.default_rng(0).integers(0, 256, (1, 9, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit(same, 9, 7), same)
    assert fit(same, 1, 500).shape == (1, 1, 500, 3)


def test_a_clip_may_be_a_piece_of_its_file(tmp_path):
    """Frames 10..25 of 32, at 32 fps: what is cut never leaves them, whatever the window."""
    video.write(tmp_path / "a.mp4", ramp(32), fps=Fraction(32), crf=1)
    known = {"frames": 16, "fps": Fraction(32), "width": 32, "height": 32}
    rows = [ClipEntry(path="a.mp4", first_frame=first, **known) for first in (10, 16, 17)]
    manifest.write(tmp_path / "clips.jsonl", rows)
    listing = manifest.read(tmp_path / "clips.jsonl")
    assert [entry.piece for entry in listing.entries] == [range(10, 26), range(16, 32), range(17, 33)]
    assert [problem and problem.reason for problem in manifest.check(listing)] == [
        None, None, "first_frame: the list says 17:33, the file has 0:32"
    ]  # fmt: skip
    source = clips(listing, buckets=(SHORT,))
    first = {index: source.get(index, SHORT) for index in range(0, 60, 3)}
    levels = [level(sample.video) for sample in first.values()]
    assert {min(each) for each in levels} >= {10, 18} and max(map(max, levels)) == 25
    stamps = {source.stamp(index, SHORT) for index in (0, 1)}
    assert len(stamps) == 2, "two pieces of one file are two clips"
    assert source.get(2, SHORT).position == 0, "the third leaves its file"
    assert clips(listing, buckets=(SHORT,)).name(2, SHORT) == "a.mp4", "it alone is set aside"


@pytest.mark.parametrize("row", ['"first_frame": -1, "frames": 2', '"first_frame": 3'])
def test_a_piece_says_where_it_is(tmp_path, row):
    (tmp_path / "clips.jsonl").write_text(f'{{"path": "a.mp4", {row}}}\n')
    with pytest.raises(UserError, match=r"frames?: "):
        manifest.read(tmp_path / "clips.jsonl")
