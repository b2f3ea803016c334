"""Frames read by their indices are those of the stream, byte for byte, and no others are converted."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kinoflow.configs.errors import UserError
from kinoflow.data import video
from kinoflow.data.clips.buckets import parse
from kinoflow.data.clips.fit import Clips, fit
from kinoflow.data.clips.manifest import ClipEntry, Manifest
from tests.data.making import encode, gradient, real_clip, rgb_frames, variable
from tests.data.test_kinds import lossy, of_two_sizes, restamped
from tests.data.test_video import KINDS


def lists(frames: int, count: int = 6) -> list[list[int]]:
    """Indices that rise, some repeated: the ends of a clip, and `count` draws of up to nine."""
    rng = np.random.default_rng(frames)
    drawn = [np.sort(rng.integers(0, frames, 1 + int(rng.integers(9)))).tolist() for _ in range(count)]
    return [[0], [frames - 1], [0, 0, frames - 1, frames - 1], [frames // 2] * 3, *drawn]


def assert_equal_to_the_stream(path: Path) -> None:
    frames = video.probe(path).frames
    whole = np.concatenate(list(video.stream(path, chunk=7)))
    assert len(whole) == frames
    for wanted in lists(frames):
        found = list(video.frames_at(path, wanted, threads=1 if len(wanted) % 2 else None))
        assert len(found) == len(wanted)
        np.testing.assert_array_equal(np.stack(found), whole[wanted], err_msg=f"{wanted}")


@pytest.mark.parametrize("name", KINDS)
def test_any_kind(tmp_path, name):
    codec, options = KINDS[name]
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    assert_equal_to_the_stream(
        encode(tmp_path / name, rgb_frames(gradient(37), pixel_format), codec, options=options)
    )


@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4"])
def test_real_clips(name):
    path = real_clip(name)
    last = video.probe(path).frames - 1
    one, several = (list(video.frames_at(path, [3, 5, 9], threads=threads)) for threads in (1, 3))
    np.testing.assert_array_equal(one, several)
    for wanted in ([3, 5, 5, 9], [last - 30, last - 28, last - 11, last, last]):
        stream = np.concatenate(list(video.stream(path, wanted[0], wanted[-1] + 1)))
        found = np.stack(list(video.frames_at(path, wanted)))
        np.testing.assert_array_equal(found, stream[np.array(wanted) - wanted[0]])


def test_variable_rate(tmp_path):
    assert_equal_to_the_stream(variable(tmp_path / "a.mp4", [0, 40, 80, 200, 233, 600, 640, 700, 900], 40))


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_rotation(tmp_path, turn):
    assert_equal_to_the_stream(encode(tmp_path / "a.mp4", rgb_frames(gradient(12)), "libx264", rotation=turn))


def test_odd_sizes(tmp_path):
    video.write(tmp_path / "a.mp4", gradient(20, 47, 63), fps=25)
    assert_equal_to_the_stream(tmp_path / "a.mp4")
    assert next(video.frames_at(tmp_path / "a.mp4", [19])).shape == (47, 63, 3)


def test_sizes_that_change(tmp_path):
    assert_equal_to_the_stream(of_two_sizes(tmp_path / "a.webm", (96, 64), (48, 32)))


def test_frames_held_where_a_broadcast_lost_some(tmp_path):
    path = lossy(tmp_path / "a.ts")
    assert video.probe(path).lost_packets > 0
    assert_equal_to_the_stream(path)


def test_frames_that_an_edit_list_hides(tmp_path):
    source = encode(tmp_path / "a.mp4", rgb_frames(gradient(30)), "libx264", options={"g": 10, "bf": 0})
    path = restamped(
        source,
        tmp_path / "b.mp4",
        lambda _, packet: (packet.pts - 4 * 512, packet.dts - 4 * 512),
        options={"avoid_negative_ts": "disabled"},
    )
    assert video.probe(path).frames == 26
    assert_equal_to_the_stream(path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.avif"])
def test_pictures(tmp_path, name):
    Image.fromarray(gradient(1)[0]).save(tmp_path / name)
    (whole,) = video.stream(tmp_path / name)
    np.testing.assert_array_equal(np.stack(list(video.frames_at(tmp_path / name, [0, 0]))), whole[[0, 0]])


@pytest.mark.parametrize("name", ["a.webp", "a.gif", "a.avif"])
def test_animated_pictures(tmp_path, name):
    first, *others = (Image.fromarray(picture) for picture in gradient(9))
    durations = [100] * 8 + [700]
    first.save(tmp_path / name, save_all=True, append_images=others, duration=durations, lossless=True)
    assert video.probe(tmp_path / name).frames == 9
    assert_equal_to_the_stream(tmp_path / name)


def test_only_frames_wanted_are_converted_each_once(monkeypatch):
    shown = []
    finish = video.picture.Display.finish
    monkeypatch.setattr(video.picture.Display, "finish", lambda *a: shown.append(1) or finish(*a))
    assert len(list(video.frames_at(real_clip("bikes.mp4"), [30, 33, 33, 33, 50]))) == 5
    assert len(shown) == 3


def test_a_bucket_takes_the_frames_of_the_stream(tmp_path, monkeypatch):
    path, bucket = real_clip("bikes.mp4"), parse("5x32x48@10")
    listing = Manifest(path=tmp_path / "clips.jsonl", entries=(ClipEntry(path=str(path)),), rows=(1,))
    asked, frames_at = [], video.frames_at
    taking = lambda *a, **more: (asked.append(a[1]), frames_at(*a, **more))[1]  # noqa: E731
    monkeypatch.setattr(video, "frames_at", taking)
    clips = Clips(listing, [bucket], 0, tmp_path / "quarantine.jsonl")
    for index in range(3):
        found = clips.get(index, bucket).video
        stream = np.concatenate(list(video.stream(path, asked[index][0], asked[index][-1] + 1)))
        taken = stream[np.array(asked[index]) - asked[index][0]]
        np.testing.assert_array_equal(found, fit(taken, 32, 48))


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [[5], [0, 5], [-1, 2], [2, 400]])
def test_an_index_outside_is_refused_as_the_stream_refuses_it(tmp_path, wanted):
    video.write(tmp_path / "a.mp4", gradient(5), fps=25)
    with pytest.raises(UserError, match="has frames 0:5") as by_stream:
        next(video.stream(tmp_path / "a.mp4", wanted[0], wanted[-1] + 1))
    with pytest.raises(UserError) as by_index:
        next(video.frames_at(tmp_path / "a.mp4", wanted))
    assert str(by_index.value) == str(by_stream.value)


@pytest.mark.parametrize("wanted", [[], [3, 2], [0, 4, 1]])
def test_indices_in_no_order_are_refused(tmp_path, wanted):
    video.write(tmp_path / "a.mp4", gradient(5), fps=25)
    with pytest.raises(UserError, match=r"a\.mp4: .* rising order; sort"):
        next(video.frames_at(tmp_path / "a.mp4", wanted))


def faults(path: Path, wanted: list[int]) -> tuple[str, str]:
    """What the stream and reading by index say of the same range."""
    with pytest.raises(UserError) as by_stream:
        list(video.stream(path, wanted[0], wanted[-1] + 1))
    with pytest.raises(UserError) as by_index:
        list(video.frames_at(path, wanted))
    return str(by_stream.value), str(by_index.value)


def test_a_frame_between_that_is_at_fault_counts_too(tmp_path):
    path = of_two_sizes(tmp_path / "a.webm", (96, 64), (32, 64))
    by_stream, by_index = faults(path, [3, 8])
    assert by_stream == by_index
    assert "frame 5 has 32x64 pixels" in by_index
    assert len(list(video.frames_at(path, [0, 4]))) == 2


def test_damage_is_told_when_it_is_reached(tmp_path):
    clip = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8)
    video.write(tmp_path / "a.mp4", clip, fps=25)
    whole = video.read(tmp_path / "a.mp4")
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) * 6 // 10])
    by_stream, by_index = faults(tmp_path / "a.mp4", [2, 59])
    assert by_stream == by_index
    assert "does not decode" in by_index
    found = video.frames_at(tmp_path / "a.mp4", [2, 9, 59])
    np.testing.assert_array_equal(np.stack([next(found), next(found)]), whole[[2, 9]])
    with pytest.raises(UserError, match="does not decode"):
        next(found)
