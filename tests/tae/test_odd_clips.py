"""Odd but healthy clips go through `kinoflow tae` and come back: sizes, pixels, sound, held frames."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from kinoflow.configs.errors import UserError
from kinoflow.data import video
from kinoflow.data.latents.kino import read_info
from kinoflow.data.video import VideoWriter
from kinoflow.data.video.audio import sound
from kinoflow.data.video.timeline import Presentation
from tests.data.making import gradient, onsets, rgb_frames, with_sound


def test_sample_aspect_ratio_travels(tmp_path, run):
    aspect, source = Fraction(64, 45), tmp_path / "a.mp4"
    with VideoWriter(source, fps=25, width=64, height=48, sample_aspect_ratio=aspect) as writer:
        writer.write(gradient(3))
    run("encode", source, tmp_path / "a.kino")
    assert run("info", tmp_path / "a.kino")["sample_aspect_ratio"] == "64/45"
    run("decode", tmp_path / "a.kino", tmp_path / "b.mp4")
    run("reconstruct", source, tmp_path / "c.mp4")
    for name in ("b.mp4", "c.mp4"):
        assert video.probe(tmp_path / name).sample_aspect_ratio == aspect


@pytest.mark.parametrize("fps", [Fraction(2000), Fraction(1, 8)])
def test_any_rate_is_encoded_and_decoded(tmp_path, run, fps):
    video.write(tmp_path / "a.mp4", gradient(4), fps=fps)
    run("encode", tmp_path / "a.mp4", tmp_path / "a.kino")
    run("decode", tmp_path / "a.kino", tmp_path / "b.mp4")
    assert video.probe(tmp_path / "b.mp4").fps == fps


def test_an_odd_size_is_said(tmp_path, run):
    video.write(tmp_path / "a.mp4", gradient(2, 47, 64), fps=25)
    for figures in (
        run("reconstruct", tmp_path / "a.mp4", tmp_path / "b.mp4"),
        run("encode", tmp_path / "a.mp4", tmp_path / "a.kino")
        and run("decode", tmp_path / "a.kino", tmp_path / "c.mp4"),
    ):
        assert figures["stored_size"].startswith("64x48: H.264 takes even sides")
    assert video.probe(tmp_path / "b.mp4").height == 47
    video.write(tmp_path / "even.mp4", gradient(2), fps=25)
    assert run("reconstruct", tmp_path / "even.mp4", tmp_path / "d.mp4")["stored_size"] is None


def test_a_held_last_frame_and_the_sound_below_it(tmp_path, run):
    """Two pictures of four seconds with sound to the end."""
    talk = with_sound(tmp_path / "talk.mkv", rgb_frames(gradient(200)), "aac", beeps=[1.0, 5.0, 7.5])
    times = Presentation(ticks=np.array([0, 4000, 8000]), time_base=Fraction(1, 1000))
    slides = tmp_path / "slides.mp4"
    with (
        sound(talk, origin=video.origin(talk), start=Fraction(0), end=Fraction(8)) as heard,
        VideoWriter(slides, fps=1, width=64, height=48, presentation=times, sound=heard) as writer,
    ):
        writer.write(gradient(2))
    assert run("encode", slides, tmp_path / "a.kino", "--audio")["sound"] == "aac"
    run("decode", tmp_path / "a.kino", tmp_path / "b.mp4")
    assert video.probe(tmp_path / "b.mp4").duration == 8
    assert onsets(tmp_path / "b.mp4") == pytest.approx([1.0, 5.0, 7.5], abs=0.05)


@pytest.mark.parametrize(
    ("clip", "kept", "written"),
    [
        (("a.mov", "alac", 48000), "alac", "alac, copied"),
        (("a.ts", "eac3", 48000), "eac3", "eac3, copied"),
        (("a.mkv", "tta", 48000), "tta", "tta, encoded again as aac"),
        (("a.avi", "adpcm_ima_wav", 48000), "pcm_s16le", "pcm_s16le, encoded again as aac"),
    ],
)
def test_sound_that_not_every_container_holds(tmp_path, run, clip, kept, written):
    (name, codec, rate), beeps = clip, [0.3, 1.0, 1.5]
    source = with_sound(tmp_path / name, rgb_frames(gradient(50)), codec, beeps=beeps, rate=rate)
    assert run("encode", source, tmp_path / "a.kino", "--audio")["sound"] == kept
    assert run("decode", tmp_path / "a.kino", tmp_path / "b.mp4")["sound"] == written
    assert onsets(tmp_path / "b.mp4")[-3:] == pytest.approx(beeps, abs=0.06)


def test_mp3_at_a_rate_that_mp4_has_no_place_for(tmp_path, run):
    source = with_sound(
        tmp_path / "a.avi", rgb_frames(gradient(50)), "libmp3lame", beeps=[0.3, 1.0], rate=8000
    )
    run("encode", source, tmp_path / "a.kino", "--audio")
    run("decode", tmp_path / "a.kino", tmp_path / "b.mp4")
    assert onsets(tmp_path / "b.mp4")[-2:] == pytest.approx([0.3, 1.0], abs=0.08)


def test_a_clip_cut_short_on_demand(tmp_path, run):
    noise = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8)
    video.write(tmp_path / "a.mp4", noise, fps=25)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) * 6 // 10])
    assert "truncated or damaged" in run("encode", tmp_path / "a.mp4", tmp_path / "a.kino", status=2)["error"]
    frames = video.readable(tmp_path / "a.mp4")
    assert run("encode", tmp_path / "a.mp4", tmp_path / "a.kino", "--partial")["frames"] == frames
    assert read_info(tmp_path / "a.kino").frames == frames
    assert run("reconstruct", tmp_path / "a.mp4", tmp_path / "b.mp4", "--partial")["frames"] == frames


def test_a_picture_with_an_orientation(tmp_path, run):
    """Mirrored and turned as EXIF says, both in what is told and in what is written."""
    exif = Image.Exif()
    exif[0x0112] = 7
    Image.fromarray(gradient(1)[0]).save(tmp_path / "a.png", exif=exif)
    told = run("info", tmp_path / "a.png")
    assert (told["width"], told["height"], told["rotation"], told["mirrored"]) == (48, 64, 90, True)
    run("reconstruct", tmp_path / "a.png", tmp_path / "b.mp4")
    assert video.probe(tmp_path / "b.mp4").height == 64


def test_a_name_that_is_not_utf8(tmp_path, run):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))
    video.write(odd, gradient(3), fps=25)
    run("encode", odd, tmp_path / "a.kino")
    run("decode", tmp_path / "a.kino", odd.with_suffix(".out.mp4"))
    assert len(video.read(odd.with_suffix(".out.mp4"))) == 3


def test_colours_that_are_not_undone_are_refused(tmp_path, run):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
        stream.codec_context.colorspace = 14
        frame = rgb_frames(gradient(1), "yuv444p")[0]
        frame.colorspace = 14
        container.mux([*stream.encode(frame), *stream.encode(None)])
    error = run("encode", tmp_path / "a.mkv", tmp_path / "a.kino", status=2)["error"]
    assert "ICtCp" in error
    with pytest.raises(UserError, match="ICtCp"):
        video.read(tmp_path / "a.mkv")
