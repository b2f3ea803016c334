"""Exact times, other rates, and folders of pictures."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from kinoflow.configs.errors import UserError
from kinoflow.data import video
from kinoflow.data.video import VideoWriter
from kinoflow.data.video.footage import footage, stamp
from kinoflow.data.video.timeline import Presentation
from tests.data.making import encode, gradient, real_clip, rgb_frames

STAMPS = np.cumsum([0, *([40, 40, 120, 40, 33] * 4)]).tolist()


@pytest.fixture
def variable(tmp_path):
    frames = rgb_frames(gradient(len(STAMPS)))
    return encode(tmp_path / "a.mkv", frames, "libx264", stamps=STAMPS, options={"g": 8})


def seconds(times: Presentation | None) -> list[Fraction]:
    assert times is not None
    return [times.time_of(index) for index in range(len(times.ticks) - 1)]


def test_times_of_a_variable_rate_are_exact_and_survive_writing(tmp_path, variable):
    times = video.presentation(variable)
    assert seconds(times) == [Fraction(stamp, 1000) for stamp in STAMPS]
    info = video.probe(variable)
    with VideoWriter(tmp_path / "b.mp4", fps=info.fps, width=64, height=48, presentation=times) as writer:
        for chunk in video.stream(variable, chunk=6):
            writer.write(chunk)
    assert seconds(video.presentation(tmp_path / "b.mp4")) == seconds(times)
    assert video.probe(tmp_path / "b.mp4").frames == len(STAMPS)


def test_constant_rates_need_no_times(tmp_path):
    video.write(tmp_path / "a.mp4", gradient(4), fps=25)
    assert video.presentation(tmp_path / "a.mp4") is None
    assert video.presentation(real_clip("bikes.mp4")) is None


def test_more_frames_than_times(tmp_path):
    times = Presentation.constant(2, Fraction(25))
    with (
        pytest.raises(UserError, match="more frames than"),
        VideoWriter(tmp_path / "b.mp4", fps=25, width=64, height=48, presentation=times) as writer,
    ):
        writer.write(gradient(3))


@pytest.mark.parametrize("ticks", [[0], [1, 2], [0, 2, 2], [0, 3, 1]])
def test_times_must_rise(ticks):
    with pytest.raises(ValueError, match="rise"):
        Presentation(ticks=np.array(ticks, np.int64), time_base=Fraction(1, 1000))


def test_repeats_follow_the_nearest_slot():
    """By hand: at 10 a second slots are 0, 100, 200 ... ms; frames begin at 0, 40, 160, 170 and 330 ms."""
    times = Presentation(ticks=np.array([0, 40, 160, 170, 330, 400]), time_base=Fraction(1, 1000))
    assert times.repeats(Fraction(10)).tolist() == [0, 2, 0, 1, 1]
    # A rate that is constant but for the container's rounding keeps every frame once.
    jitter = Presentation(ticks=np.array([0, 33, 67, 100, 133, 167]), time_base=Fraction(1, 1000))
    assert jitter.repeats(Fraction(30)).tolist() == [1] * 5
    assert Presentation.constant(50, Fraction(50)).repeats(Fraction(25)).sum() == 25
    assert Presentation.constant(3, Fraction(100)).repeats(Fraction(1)).sum() == 1


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_resampled_stream(variable, chunk):
    """The frame on show at each moment, read off the times directly."""
    clip, stored = footage(variable, Fraction(25)), video.read(variable)
    begins = np.array(STAMPS)
    shown = [np.flatnonzero(begins - 20 <= 40 * slot)[-1] for slot in range(clip.info.frames)]
    got = np.concatenate(list(clip.stream(chunk)))
    assert np.array_equal(got, stored[shown])
    assert clip.resampled
    assert not clip.info.variable_frame_rate
    assert clip.presentation is None
    assert abs(clip.info.frames - STAMPS[-1] / 40) <= 2


def test_same_rate_is_not_resampled(tmp_path):
    video.write(tmp_path / "a.mp4", gradient(4), fps=25)
    assert not footage(tmp_path / "a.mp4", Fraction(25)).resampled
    with pytest.raises(UserError, match="use a rate"):
        footage(tmp_path / "a.mp4", Fraction(0))


def test_absurd_times_are_refused(tmp_path):
    path = encode(
        tmp_path / "a.mkv", rgb_frames(gradient(3)), "libx264", stamps=[0, 40, 40_000_000], options={"bf": 0}
    )
    with pytest.raises(UserError, match=r"a\.mkv: 3 frames would become"):
        footage(path, Fraction(60))


def test_folder_of_pictures_in_the_order_of_its_numbers(tmp_path):
    clip = gradient(12)
    for index, picture in enumerate(clip):
        Image.fromarray(picture).save(tmp_path / f"frame{index}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / ".hidden.png").write_text("not a frame")
    source = footage(tmp_path)
    assert (source.info.frames, source.info.fps, source.info.height, source.info.width) == (12, 24, 48, 64)
    assert np.array_equal(np.concatenate(list(source.stream(5))), clip)
    assert footage(tmp_path, Fraction(10)).info.duration == Fraction(12, 10)
    size, modified = stamp(tmp_path)
    assert size == sum(file.stat().st_size for file in tmp_path.glob("frame*.png"))
    assert modified == max(file.stat().st_mtime_ns for file in tmp_path.glob("frame*.png"))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_pictures_of_other_kinds(tmp_path, mode):
    """Grey is shown grey, alpha over black, palettes in their colours, 16 bits rounded to 8."""
    picture = gradient(1)[0]
    image = Image.fromarray(picture)
    if mode == "I;16":
        deep = picture[..., 0].astype(np.uint16) * 257
        Image.fromarray(deep).save(tmp_path / "0.png")
    else:
        image.convert(mode).save(tmp_path / "0.png")
    shown = next(footage(tmp_path).stream(1))[0]
    expected = np.asarray(image.convert(mode).convert("RGB"))
    if mode == "I;16":
        expected = picture[..., :1].repeat(3, axis=2)
    assert np.abs(shown.astype(int) - expected).max() <= 1


def test_pictures_of_two_sizes_and_folders_without_any(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no picture"):
        footage(tmp_path / "empty")
    Image.fromarray(gradient(1)[0]).save(tmp_path / "0.png")
    Image.fromarray(gradient(1, 48, 60)[0]).save(tmp_path / "1.png")
    with pytest.raises(UserError, match=r"1\.png: has 60x48 pixels, 0\.png has 64x48"):
        list(footage(tmp_path).stream(8))
