"""Sound is carried over unchanged where it can be, and beeps stay in place, however the clip is cut."""

from fractions import Fraction

import av
import numpy as np
import pytest

from kinoflow.configs.errors import UserError
from kinoflow.data import video
from kinoflow.data.video import VideoWriter
from kinoflow.data.video.audio import sound
from kinoflow.data.video.soundtrack import extract
from tests.data.making import encode, gradient, onsets, rgb_frames, with_sound

BEEPS = [0.2, 0.7, 1.2, 1.7]
KINDS = {
    "a.mp4": ("aac", "aac"),
    "b.mp4": ("libmp3lame", "mp3"),
    "c.mkv": ("libopus", "opus"),
    "d.mkv": ("flac", "flac"),
    "e.mkv": ("ac3", "ac3"),
    "f.mov": ("pcm_s16le", "aac"),  # mp4 players know no PCM
    "g.mkv": ("pcm_f32le", "aac"),
}


def rewritten(source, target, start: Fraction, end: Fraction, origin: Fraction) -> None:
    """The clip's frames 0 up, black, with the sound of start..end seconds."""
    frames = np.zeros((int((end - start) * 25), 48, 64, 3), np.uint8)
    with (
        sound(source, origin=origin, start=start, end=end) as heard,
        VideoWriter(target, fps=25, width=64, height=48, sound=heard) as writer,
    ):
        writer.write(frames)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kept", [False, True], ids=["from the clip", "from a copy"])
def test_beeps_stay_in_place(tmp_path, name, kept):
    codec, expected = KINDS[name]
    source = with_sound(tmp_path / name, rgb_frames(gradient(50)), codec, beeps=BEEPS)
    origin = video.origin(source)
    if kept:
        info = extract(source, tmp_path / "sound.nut", origin)
        assert info is not None
        source, origin = tmp_path / "sound.nut", info.origin
    for start, end in ((Fraction(0), Fraction(2)), (Fraction(12, 25), Fraction(37, 25))):
        rewritten(source, tmp_path / "out.mp4", start, end, origin)
        shown = [beep - float(start) for beep in BEEPS if start < beep < end]
        assert onsets(tmp_path / "out.mp4") == pytest.approx(shown, abs=0.012)
        with av.open(str(tmp_path / "out.mp4")) as container:
            track = container.streams.audio[0]
            assert track.codec_context.codec.canonical_name == expected
            assert float(track.duration * track.time_base) == pytest.approx(float(end - start), abs=0.1)
        assert video.probe(tmp_path / "out.mp4").frames == int((end - start) * 25)


def test_copied_packets_are_the_same_bytes(tmp_path):
    source = with_sound(tmp_path / "a.mp4", rgb_frames(gradient(50)), "aac", beeps=BEEPS)
    rewritten(source, tmp_path / "out.mp4", Fraction(0), Fraction(2), video.origin(source))

    def packets(path):
        with av.open(str(path)) as container:
            return [bytes(packet) for packet in container.demux(audio=0) if packet.size]

    assert packets(tmp_path / "out.mp4") == packets(source)[: len(packets(tmp_path / "out.mp4"))]


def test_clip_without_sound(tmp_path):
    path = encode(tmp_path / "a.mp4", rgb_frames(gradient(5)), "libx264")
    assert extract(path, tmp_path / "a.nut", Fraction(0)) is None
    with sound(path, origin=Fraction(0), start=Fraction(0), end=Fraction(1)) as heard:
        assert heard is None


def test_no_sound_file_is_named(tmp_path):
    (tmp_path / "a.nut").write_bytes(b"nothing")
    with (
        pytest.raises(UserError, match=r"clip\.kino: its sound is damaged"),
        sound(
            tmp_path / "a.nut",
            origin=Fraction(0),
            start=Fraction(0),
            end=Fraction(1),
            named=tmp_path / "clip.kino",
        ),
    ):
        pass
