"""Kinds of healthy files that readers get wrong; the truth is what was encoded, in the decoder's order."""

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from kinoflow.configs.errors import UserError
from kinoflow.data import video
from kinoflow.data.video import VideoWriter
from kinoflow.data.video.footage import footage
from kinoflow.data.video.timeline import Presentation
from tests.data.making import encode, gradient, rgb_frames

QUARTERS = np.array([(220, 40, 40), (40, 220, 40), (40, 40, 220), (220, 220, 40)], np.uint8)


def quarters(height: int = 48, width: int = 64) -> np.ndarray:
    """Red, green, blue and yellow quarters, from top left to bottom right."""
    return QUARTERS.reshape(2, 2, 3).repeat(height // 2, 0).repeat(width // 2, 1)


def levels(clip: np.ndarray) -> list[int]:
    return clip.mean(axis=(1, 2, 3)).round().astype(int).tolist()


def restamped(source: Path, target: Path, stamp, options=None) -> Path:
    """The packets of a clip with other time stamps: `stamp(number, packet)` gives (pts, dts)."""
    with av.open(str(source)) as read, av.open(str(target), "w", options=options or {}) as file:
        video_stream = read.streams.video[0]
        copy = file.add_stream_from_template(video_stream)
        for number, packet in enumerate(p for p in read.demux(video_stream) if p.size):
            packet.pts, packet.dts = stamp(number, packet)
            packet.stream = copy
            file.mux(packet)
    return target


# Time stamps.


@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.mp4"])
def test_frames_whose_stamps_are_those_of_decoding(tmp_path, name):
    """B-frames in a container that was given decode times: each frame once, in order."""
    flat = np.stack([np.full((48, 64, 3), 20 + 8 * index, np.uint8) for index in range(25)])
    if name == "a.avi":  # which has no time stamps at all
        path = encode(tmp_path / name, rgb_frames(flat), "libx264", options={"bf": 2, "g": 9})
    else:
        source = encode(tmp_path / "b.mkv", rgb_frames(flat), "libx264", options={"bf": 2, "g": 9})
        path = restamped(source, tmp_path / name, lambda number, _: (40 * number, 40 * number))
    info, whole = video.probe(path), video.read(path)
    assert (info.frames, info.fps) == (25, 25)
    assert np.abs(np.array(levels(whole)) - np.array([20 + 8 * i for i in range(25)])).max() <= 1
    for start, end in ((7, 9), (12, 25), (24, 25)):
        assert np.array_equal(video.read(path, start, end), whole[start:end])


def test_streams_that_could_reorder_and_do_not_keep_their_random_access(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mkv", rgb_frames(gradient(30)), "mpeg2video", options={"g": 5, "bf": 0})
    whole = video.read(path)
    assert np.array_equal(video.read(path, 21, 24), whole[21:24])
    assert video.reader._examine(path).timeline.sequential is False


def test_one_pair_of_equal_stamps(tmp_path):
    source = encode(tmp_path / "a.webm", rgb_frames(gradient(10)), "libvpx", options={"g": 4})
    path = restamped(source, tmp_path / "b.mkv", lambda number, _: (100 * (number - (number > 2)),) * 2)
    times = video.presentation(path)
    assert times is not None
    assert [times.time_of(i) for i in (0, 2, 4, 9)] == [0, Fraction(1, 5), Fraction(3, 10), Fraction(4, 5)]
    assert times.time_of(3) - times.time_of(2) == Fraction(1, 1000)
    whole = video.read(path)
    assert levels(whole) == levels(video.read(source))
    for start, end in ((2, 4), (3, 4), (3, 10), (9, 10)):
        assert np.array_equal(video.read(path, start, end), whole[start:end])


def test_the_newer_of_two_durations_counts(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.metadata["DURATION-eng"] = "00:00:04.000000000"
        for index, frame in enumerate(rgb_frames(gradient(38))):
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert len(video.read(path)) == 38


@pytest.mark.parametrize("jump", [3600, -3, 100])
def test_recordings_joined_in_a_transport_stream(tmp_path, jump):
    first = encode(tmp_path / "a.ts", rgb_frames(gradient(30)), "libx264", options={"bf": 2, "g": 10})
    shift = jump * 90000
    second = restamped(
        encode(tmp_path / "b.ts", rgb_frames(gradient(20) + 50), "libx264", options={"bf": 2, "g": 10}),
        tmp_path / "c.ts",
        lambda _, packet: (packet.pts + 30 * 3600 + shift, packet.dts + 30 * 3600 + shift),
        options={"mpegts_copyts": "1"},
    )
    joined = tmp_path / "joined.ts"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    info, whole = video.probe(joined), video.read(joined)
    assert (info.frames, info.duration, info.variable_frame_rate) == (50, 2, False)
    assert levels(whole) == levels(video.read(first)) + levels(video.read(second))
    assert np.array_equal(video.read(joined, 33, 41), whole[33:41])


def lossy(path: Path) -> Path:
    """A broadcast of 40 frames that lacks a packet of 188 bytes."""
    encode(path, rgb_frames(gradient(40)), "libx264", options={"bf": 0, "g": 10, "crf": 4})
    data, size = path.read_bytes(), 188
    inside = [at for at in range(0, len(data), size) if data[at + 1] & 0x5F == 0x01 and data[at + 2] == 0]
    gone = inside[len(inside) // 2]  # of the video's, not the first packet of a frame
    path.write_bytes(data[:gone] + data[gone + size :])
    return path


def test_a_lost_packet_of_a_broadcast_costs_what_it_held(tmp_path):
    path = lossy(tmp_path / "a.ts")
    info, whole = video.probe(path), video.read(path)
    assert (info.frames, info.lost_packets > 0) == (40, True)
    truth = gradient(40).mean(axis=(1, 2, 3))
    assert (np.abs(whole.mean(axis=(1, 2, 3)) - truth) < 2).sum() >= 30
    assert np.array_equal(video.read(path, 25, 30), whole[25:30])


# How long the last frame is shown.


def held(path: Path, ticks: list[int], codec: str = "libx264") -> Path:
    """Frames that begin at ticks[:-1] milliseconds; the last one is shown until ticks[-1]."""
    times = Presentation(ticks=np.array(ticks), time_base=Fraction(1, 1000))
    with VideoWriter(path, fps=10, width=64, height=48, presentation=times) as writer:
        writer.write(gradient(len(ticks) - 1))
    return path


@pytest.mark.parametrize(
    "ticks", [[0, 500, 1000, 6000], [0, 4000, 8000], [0, 40, 80, 90, 500], [0, 20, 9000]]
)
def test_the_last_frame_is_shown_as_long_when_written_and_read_again(tmp_path, ticks):
    path = held(tmp_path / "a.mp4", ticks)
    info, times = video.probe(path), video.presentation(path)
    assert info.duration == Fraction(ticks[-1], 1000)
    if times is None:
        times = Presentation.constant(info.frames, info.fps)
    assert [times.time_of(index) * 1000 for index in range(len(ticks))] == ticks
    with av.open(str(path)) as container:  # as other players see it
        track = container.streams.video[0]
        assert track.duration * track.time_base == Fraction(ticks[-1], 1000)


def test_a_gif_whose_last_frame_is_held(tmp_path):
    pictures = [Image.fromarray(picture) for picture in gradient(5)]
    pictures[0].save(
        tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=[100] * 4 + [3000]
    )
    assert video.probe(tmp_path / "a.gif").duration == Fraction(34, 10)
    assert footage(tmp_path / "a.gif", Fraction(10)).info.frames == 34


def test_constant_rates_stay_constant_although_containers_round(tmp_path):
    for name, fps in (("a.mkv", 30), ("b.mkv", 60), ("c.webm", 24)):
        frames = rgb_frames(gradient(20))
        with av.open(str(tmp_path / name), "w") as container:
            codec = "libvpx" if name.endswith("webm") else "libx264"
            stream: Any = container.add_stream(codec, rate=fps)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for index, frame in enumerate(frames):
                frame.pts, frame.time_base = index, Fraction(1, fps)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        info = video.probe(tmp_path / name)
        assert (info.variable_frame_rate, info.fps, info.frames) == (False, fps, 20)


# Orientation.

MATRICES = {  # a, b, c, d of the display matrix, and what it makes of a picture
    (1, 0, 0, 1): lambda p: p,
    (-1, 0, 0, 1): lambda p: p[:, ::-1],
    (1, 0, 0, -1): lambda p: p[::-1],
    (-1, 0, 0, -1): lambda p: p[::-1, ::-1],
    (0, 1, 1, 0): lambda p: p.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    (0, 1, -1, 0): lambda p: np.rot90(p, -1),
    (0, -1, 1, 0): lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_every_display_matrix(tmp_path, matrix, name):
    a, b, c, d = (65536 * value for value in matrix)
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        frame = av.VideoFrame.from_ndarray(quarters(), format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    info, shown, expected = video.probe(path), video.read(path)[0], MATRICES[matrix](quarters())
    assert (info.height, info.width) == shown.shape[:2] == expected.shape[:2]
    assert np.abs(shown.astype(int) - expected).max() <= 6
    assert info.mirrored == (matrix[0] * matrix[3] - matrix[1] * matrix[2] < 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_every_exif_orientation(tmp_path, orientation, name):
    """By EXIF's own definition of row 0 and column 0, through Pillow's tags."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if name == "a.jpg" else {"lossless": True}
    Image.fromarray(quarters()).save(tmp_path / name, exif=exif, **options)
    upright = {
        1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2), 6: lambda p: np.rot90(p, -1),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2), 8: lambda p: np.rot90(p, 1),
    }[orientation](quarters())  # fmt: skip
    shown = video.read(tmp_path / name)[0]
    assert shown.shape == upright.shape
    assert np.abs(shown[4::8, 4::8].astype(int) - upright[4::8, 4::8]).max() <= 8


# Transparency, pages and tiles.


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_transparency_beside_the_picture(tmp_path, codec):
    pixels = np.full((48, 64, 4), 255, np.uint8)
    pixels[:, 32:, 3] = 0
    frames = [av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format="yuva420p") for _ in range(9)]
    path = encode(tmp_path / "a.webm", frames, codec, options={"auto_alt_ref": 0, "g": 4})
    with av.open(str(path)) as container:
        if container.streams.video[0].metadata.get("alpha_mode") != "1":
            pytest.skip("this FFmpeg wrote no alpha")
    whole = video.read(path)
    assert whole[:, :, :24].min() > 230
    assert whole[:, :, 40:].max() < 12
    assert np.array_equal(video.read(path, 5, 8), whole[5:8])


def test_avif_with_transparency_and_animated_webp(tmp_path):
    pixels = np.full((48, 64, 4), 255, np.uint8)
    pixels[:, 32:, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.avif", quality=90)
    shown = video.read(tmp_path / "a.avif")[0]
    assert shown[:, :30].min() > 230
    assert shown[:, 34:].max() < 12
    clip = gradient(4)
    pictures = [Image.fromarray(picture) for picture in clip]
    pictures[0].save(
        tmp_path / "a.webp", save_all=True, append_images=pictures[1:], duration=[100, 100, 100, 700],
        lossless=True,
    )  # fmt: skip
    info = video.probe(tmp_path / "a.webp")
    assert (info.frames, info.duration, info.variable_frame_rate) == (4, 1, True)
    assert np.array_equal(video.read(tmp_path / "a.webp", 1, 3), clip[1:3])


def test_pages_are_not_taken_for_a_picture(tmp_path):
    pages = [Image.fromarray(picture) for picture in gradient(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(UserError, match=r"a\.tif: has 3 pages; save each"):
        video.probe(tmp_path / "a.tif")


# Sizes and rates.


def of_two_sizes(path: Path, first: tuple[int, int], second: tuple[int, int]) -> Path:
    """Raw VP8 frames of two encoders in one WebM, as a conference records them."""
    with av.open(str(path), "w") as container:
        tracks: list[Any] = []
        for width, height in (first, second):
            stream: Any = container.add_stream("libvpx", rate=25) if not tracks else None
            context = stream.codec_context if stream else av.CodecContext.create("libvpx", "w")
            context.width, context.height, context.pix_fmt = width, height, "yuv420p"
            context.time_base = Fraction(1, 25)
            tracks.append(stream or context)
        number = 0
        for encoder, (width, height) in zip(tracks, (first, second), strict=True):
            for picture in gradient(5, height, width):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                number += 1
                for packet in encoder.encode(frame):
                    packet.stream = tracks[0]
                    container.mux(packet)
            for packet in encoder.encode(None):
                packet.stream = tracks[0]
                container.mux(packet)
    return path


def test_a_size_that_keeps_its_shape_is_scaled_and_another_one_refused(tmp_path):
    same = of_two_sizes(tmp_path / "a.webm", (96, 64), (48, 32))
    assert video.read(same).shape == (10, 64, 96, 3)
    other = of_two_sizes(tmp_path / "b.webm", (96, 64), (32, 64))
    with pytest.raises(UserError, match=r"frame 5 has 32x64 pixels, the first one has 96x64"):
        video.read(other)
    assert video.read(other, 0, 5).shape == (5, 64, 96, 3)


def test_sample_aspect_ratio_is_written(tmp_path):
    with VideoWriter(
        tmp_path / "a.mp4", fps=25, width=64, height=48, sample_aspect_ratio=Fraction(64, 45)
    ) as writer:
        writer.write(gradient(3))
    assert video.probe(tmp_path / "a.mp4").sample_aspect_ratio == Fraction(64, 45)


@pytest.mark.parametrize("fps", [2000, Fraction(1_000_000, 3)])
def test_high_speed(tmp_path, fps):
    video.write(tmp_path / "a.mp4", gradient(20), fps=fps)
    info = video.probe(tmp_path / "a.mp4")
    assert (info.fps, info.frames, info.variable_frame_rate) == (fps, 20, False)


# Promises of containers.


def test_an_avi_header_one_frame_too_high(tmp_path):
    path = encode(tmp_path / "a.avi", rgb_frames(gradient(12), "yuvj420p"), "mjpeg")
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"avih", 24), (b"strh", 40)):
        place = data.index(mark) + offset
        assert int.from_bytes(data[place : place + 4], "little") == 12
        data[place : place + 4] = (13).to_bytes(4, "little")
    path.write_bytes(bytes(data))
    assert len(video.read(path)) == 12


def test_a_codec_that_nobody_knows_is_not_called_damaged(tmp_path):
    path = encode(tmp_path / "a.mkv", rgb_frames(gradient(3)), "libvpx")
    path.write_bytes(path.read_bytes().replace(b"V_VP8", b"V_XYZ"))
    with pytest.raises(UserError, match=r"a\.mkv: its video is of a kind that this FFmpeg does not decode"):
        video.probe(path)


# Names.


def test_names_that_are_not_utf8(tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))
    video.write(odd, gradient(3), fps=25, metadata={"title": odd.name})
    assert len(video.read(odd)) == 3


def test_digits_that_are_no_numbers(tmp_path):
    for name in ("frame①.png", "frame2.png", "frame².png"):
        Image.fromarray(gradient(1)[0]).save(tmp_path / name)
    assert footage(tmp_path).info.frames == 3


def test_a_clip_cut_short_gives_what_is_there_on_demand(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8)
    video.write(tmp_path / "a.mp4", noise, fps=25)
    whole = video.read(tmp_path / "a.mp4")
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) * 6 // 10])
    clip = footage(tmp_path / "a.mp4", partial=True)
    assert 20 < clip.info.frames == video.readable(tmp_path / "a.mp4") < 50
    assert np.array_equal(np.concatenate(list(clip.stream(7))), whole[: clip.info.frames])
    assert clip.info.duration == Fraction(clip.info.frames, 25)
    with pytest.raises(UserError, match="truncated or damaged"):
        list(footage(tmp_path / "a.mp4").stream(7))
