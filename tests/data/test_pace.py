"""Variable frame rates: frames are chosen by time, and a constant rate gives those of before."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinoflow.data import video
from kinoflow.data.__main__ import main
from kinoflow.data.clips import manifest, pace
from kinoflow.data.clips.buckets import Bucket, parse
from kinoflow.data.clips.fit import Clips
from kinoflow.data.clips.manifest import ClipEntry
from kinoflow.data.video.timeline import Presentation
from tests.data.making import numbers, variable

# In ms: half a second at 60 frames a second, then 20, one hold of a second, then 25.
BEGINS = [*range(0, 500, 17), *range(510, 2000, 50), *range(3000, 5000, 40)]


def nearest(at, step):
    """The frame on show at a time in ms, or the next where that is nearer and begins within half a step."""
    shown = max(i for i, begin in enumerate(BEGINS) if begin <= at)
    following = [i for i in (shown + 1,) if i < len(BEGINS) and BEGINS[i] - at <= step / 2]
    return min([*following, shown], key=lambda i: abs(BEGINS[i] - at))


@pytest.fixture(scope="module")
def listing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variable")
    variable(folder / "a.mp4", BEGINS, 40)
    manifest.write(folder / "clips.jsonl", [ClipEntry(path="a.mp4")])
    return manifest.read(folder / "clips.jsonl")


@given(
    frames=st.integers(1, 400),
    fps=st.fractions(Fraction(1), 130, max_denominator=1001),
    bucket=st.builds(Bucket, frames=st.integers(1, 64), height=st.just(8), width=st.just(8),
                     fps=st.fractions(Fraction(1), 60, max_denominator=1001)),
)  # fmt: skip
def test_a_constant_rate_gives_the_frames_that_counting_gives(frames, fps, bucket):
    """Latents of before stay valid: the same windows, of the same frames, from the same seeds."""
    wanted = [math.floor(i * fps / bucket.fps + Fraction(1, 2)) for i in range(bucket.frames)]
    times = Presentation.constant(frames, fps)
    assert pace.usual_rate(times) == fps
    fills = bucket.frames == 1 or (fps >= Fraction(98, 100) * bucket.fps and wanted[-1] < frames)
    assert bucket.filled_by(duration=times.time_of(-1), fps=fps) == fills
    if fills:
        assert pace.starts(times, bucket.span) == frames - wanted[-1]
        for start in {0, frames - wanted[-1] - 1}:
            begin = times.time_of(start)
            found = pace.steady(times, begin=begin, rate=bucket.fps, count=bucket.frames)
            assert found == [start + frame for frame in wanted]


def test_a_held_frame_stays_until_the_next_one_begins():
    times = Presentation(ticks=np.array([0, 100, 200, 1000, 1100, 1200]), time_base=Fraction(1, 1000))
    assert pace.usual_rate(times) == 10
    found = pace.steady(times, begin=Fraction(0), rate=Fraction(10), count=12)
    assert found == [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 4]
    assert pace.steady(times, begin=Fraction(1, 10), rate=Fraction(2), count=3) == [1, 2, 4]


@pytest.mark.parametrize("shape", ["16x16x24@16", "24x16x24@8", "1x16x24@16"])
def test_training_takes_the_frames_shown_at_the_times_of_the_bucket(listing, tmp_path, shape):
    bucket = parse(shape)
    clips = Clips(listing, [bucket], 1, tmp_path / "quarantine.jsonl")
    assert clips.count(bucket) == 1
    begins, step = set(), 1000 / bucket.fps
    for index in range(30):
        found = numbers(clips.get(index, bucket).video)
        begins.add(found[0])
        assert found == [nearest(BEGINS[found[0]] + i * step, step) for i in range(bucket.frames)]
    assert len(begins) > 8
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_only_the_window_is_decoded(listing, tmp_path, monkeypatch):
    asked, frames_at = [], video.frames_at
    monkeypatch.setattr(video, "frames_at", lambda *a, **k: (asked.append(a[1]), frames_at(*a, **k))[1])
    bucket = parse("8x16x16@16")
    clips = Clips(listing, [bucket], 1, tmp_path / "quarantine.jsonl")
    for index in range(10):
        clips.get(index, bucket)
    assert len(asked) == 10
    assert max(wanted[-1] + 1 - wanted[0] for wanted in asked) <= 27, "half a second at 60 Hz"


def test_a_clip_too_short_in_time_does_not_serve(tmp_path):
    variable(tmp_path / "a.mp4", [0, 17, 33, 50, 67, 83, 100, 117, 140, 160], 20)
    manifest.write(tmp_path / "clips.jsonl", [ClipEntry(path="a.mp4")])
    short, long = parse("3x16x16@16"), parse("8x16x16@16")
    clips = Clips(manifest.read(tmp_path / "clips.jsonl"), [short, long], 0, tmp_path / "q.jsonl")
    assert (clips.count(short), clips.count(long)) == (1, 0)


@pytest.mark.parametrize("rate", [Fraction(16), Fraction(10), None])
def test_cut_gives_a_constant_rate_of_the_frames_shown(listing, tmp_path, rate, capsys):
    source = listing.resolve(listing.entries[0])
    options = ["--frames", "20", "--side", "32", "--per-minute", "200", "--json"]
    assert main(["cut", str(source), str(tmp_path), *options, *(["--fps", str(rate)] if rate else [])]) == 0
    assert json.loads(capsys.readouterr().out)["clips"] == round(200 * 5 / 60)
    made = manifest.read(tmp_path / "manifest.jsonl")
    expected = rate or video.probe(source).fps
    step, begins = 1000 / expected, set()
    for entry in made.entries:
        info = video.probe(made.resolve(entry))
        assert (info.frames, info.fps, info.variable_frame_rate) == (20, expected, False)
        assert entry.fps == expected
        found = numbers(video.read(made.resolve(entry)))
        slots = [slot for slot in range(int(5040 / step)) if nearest(slot * step, step) == found[0]]
        assert any(found == [nearest((slot + i) * step, step) for i in range(20)] for slot in slots)
        begins.add(found[0])
    assert len(begins) > 5
