"""`kinoflow tae` on what people have: variable rates, sound, folders, bad files among good ones, reports."""

import json
import os
import resource
import shutil
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kinoflow.configs.pretrained import fingerprint
from kinoflow.data import video
from kinoflow.data.clips.buckets import parse
from kinoflow.data.latents import shards
from kinoflow.data.latents.kino import LatentInfo, read_info, read_latents
from kinoflow.tae import TAE
from kinoflow.tae.__main__ import main
from tests.data.making import encode, gradient, onsets, rgb_frames, with_sound
from tests.tae.mutating import TINY

STAMPS = np.cumsum([0, *([40, 40, 120, 40, 33] * 4)]).tolist()


def times(path: Path) -> list[Fraction]:
    shown = video.presentation(path)
    assert shown is not None
    return [shown.time_of(index) for index in range(len(shown.ticks) - 1)]


@pytest.fixture
def variable(tmp_path):
    frames = rgb_frames(gradient(len(STAMPS)))
    return encode(tmp_path / "variable.mkv", frames, "libx264", stamps=STAMPS)


@pytest.mark.parametrize("name", ["a.kino", "a.zarr"])
def test_variable_rate_comes_back_to_the_tick(tmp_path, run, variable, name):
    figures = run("encode", variable, tmp_path / name)
    assert figures["variable_frame_rate"]
    assert figures["frame_times"].startswith("variable, kept exactly")
    assert run("info", tmp_path / name)["variable_frame_rate"]
    run("decode", tmp_path / name, tmp_path / "back.mp4")
    assert times(tmp_path / "back.mp4") == times(variable)
    run("decode", tmp_path / name, tmp_path / "part.mp4", "--start", 5, "--end", 15)
    assert times(tmp_path / "part.mp4") == [time - times(variable)[5] for time in times(variable)[5:15]]
    run("reconstruct", variable, tmp_path / "same.mp4")
    assert (tmp_path / "same.mp4").read_bytes() == (tmp_path / "back.mp4").read_bytes()


def test_constant_rate_on_request(tmp_path, run, variable):
    figures = run("encode", variable, tmp_path / "a.kino", "--fps", 25)
    assert not figures["variable_frame_rate"]
    assert figures["frame_times"].startswith("resampled to constant")
    assert read_info(tmp_path / "a.kino").resampled
    run("decode", tmp_path / "a.kino", tmp_path / "back.mp4")
    info = video.probe(tmp_path / "back.mp4")
    assert (info.fps, info.variable_frame_rate, info.frames) == (25, False, figures["frames"])


@pytest.mark.parametrize("codec", ["aac", "pcm_s16le"])
def test_sound_travels_through_the_latent_file(tmp_path, run, codec):
    source = with_sound(tmp_path / "a.mkv", rgb_frames(gradient(50)), codec, beeps=[0.3, 1.0, 1.5])
    assert run("encode", source, tmp_path / "a.kino", "--audio")["sound"] == codec
    said = run("decode", tmp_path / "a.kino", tmp_path / "whole.mp4")["sound"]
    assert ("copied" in said) == (codec == "aac")
    assert onsets(tmp_path / "whole.mp4") == pytest.approx([0.3, 1.0, 1.5], abs=0.012)
    run("decode", tmp_path / "a.kino", tmp_path / "part.mp4", "--start", 20, "--end", 45)
    assert onsets(tmp_path / "part.mp4") == pytest.approx([0.2, 0.7], abs=0.012)
    assert run("reconstruct", source, tmp_path / "same.mp4", "--audio")["sound"] == said
    assert onsets(tmp_path / "same.mp4") == pytest.approx([0.3, 1.0, 1.5], abs=0.012)
    assert run("encode", source, tmp_path / "b.kino")["sound"] is None
    run("decode", tmp_path / "b.kino", tmp_path / "silent.mp4")
    assert not video.probe(tmp_path / "silent.mp4").audio


def full(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """The system's temporary folder takes no file larger than 1 KiB; nothing else is written in this test."""
    folder.mkdir()
    patch.setattr(tempfile, "tempdir", str(folder))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))


def gone(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(tempfile, "tempdir", str(folder))


@pytest.mark.parametrize(("spoil", "reason"), [(full, "File too large"), (gone, "No such file or directory")])
def test_a_temporary_folder_that_takes_no_sound_is_blamed_itself(tmp_path, capsys, weights, spoil, reason):
    source, file, folder = tmp_path / "a.mkv", tmp_path / "a.kino", tmp_path / "system"
    with_sound(source, rgb_frames(gradient(50)), "aac", beeps=[0.3, 1.0, 1.5])
    model = ["--weights", str(weights)]
    assert main(["encode", str(source), str(file), "--audio", *model]) == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for words in (
        ["encode", str(source), str(tmp_path / "b.kino"), "--audio"],
        ["decode", str(file), str(tmp_path / "b.mp4")],
    ):
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            try:
                spoil(patch, folder)
                status = main([*words, *model])
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        remedy = "sound passes through this folder, free some space in it or set TMPDIR to another one"
        line = f"kinoflow tae: {folder}: {reason}; {remedy}"
        assert (status, capsys.readouterr().err.splitlines()) == (2, [line])
        shutil.rmtree(folder, ignore_errors=True)
    assert {path.name for path in tmp_path.iterdir()} == {"a.mkv", "a.kino"}


def test_a_silent_clip_needs_no_temporary_folder(tmp_path, run, variable, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    run("encode", variable, tmp_path / "a.kino", "--audio")
    run("decode", tmp_path / "a.kino", tmp_path / "a.mp4")


def test_rotated_grey_and_deep_clips_come_back_as_shown(tmp_path, run):
    clip = gradient(9)
    rotated = encode(tmp_path / "r.mp4", rgb_frames(clip), "libx264", rotation=-90)
    grey = encode(tmp_path / "g.mkv", rgb_frames(clip, "gray"), "ffv1")
    deep = encode(tmp_path / "d.mkv", rgb_frames(clip, "yuv420p10le"), "ffv1")
    for source, size in ((rotated, (48, 64)), (grey, (64, 48)), (deep, (64, 48))):
        run("encode", source, tmp_path / "a.kino")
        run("decode", tmp_path / "a.kino", tmp_path / "a.mp4")
        info = video.probe(tmp_path / "a.mp4")
        assert (info.width, info.height, info.frames, info.rotation) == (*size, 9, 0)
    assert run("info", deep)["bit_depth"] == 10
    assert run("info", rotated)["rotation"] == 90


def test_a_folder_of_pictures_is_one_clip(tmp_path, run):
    (tmp_path / "frames").mkdir()
    for index, picture in enumerate(gradient(12)):
        Image.fromarray(picture).save(tmp_path / "frames" / f"{index}.png")
    figures = run("encode", tmp_path / "frames", tmp_path / "a.kino")
    assert (figures["frames"], figures["fps"]) == (12, "24")
    assert (
        run("encode", tmp_path / "frames", tmp_path / "a.kino", "--fps", "30000/1001")["fps"] == "30000/1001"
    )
    assert run("info", tmp_path / "frames")["frames"] == 12


@pytest.fixture
def clips(tmp_path) -> Path:
    """Two good clips, one of them deeper down, a bad one, a folder of pictures, and a text."""
    folder = tmp_path / "clips"
    (folder / "deep" / "frames").mkdir(parents=True)
    video.write(folder / "a.mp4", gradient(9), fps=25)
    video.write(folder / "deep" / "b.mp4", gradient(5), fps=25)
    (folder / "bad.mp4").write_bytes((folder / "a.mp4").read_bytes()[:700])
    for index, picture in enumerate(gradient(3)):
        Image.fromarray(picture).save(folder / "deep" / "frames" / f"{index}.jpg")
    (folder / "notes.txt").write_text("hello")
    return folder


def test_a_folder_goes_on_after_a_bad_file_and_skips_what_is_done(tmp_path, run, clips):
    out = tmp_path / "latents"
    figures = run("encode", clips, out, status=1)
    assert (figures["clips"], figures["written"], figures["skipped"], figures["ignored_files"]) == (
        4,
        3,
        0,
        1,
    )
    assert [entry["input"] for entry in figures["failed"]] == [str(clips / "bad.mp4")]
    assert "bad.mp4" in figures["failed"][0]["error"]
    files = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    assert files == ["a.mp4.kino", "deep/b.mp4.kino", "deep/frames.kino"]

    assert run("encode", clips, out, status=1)["skipped"] == 3
    (clips / "bad.mp4").unlink()
    os.utime(clips / "a.mp4")  # as if it had been exported again
    figures = run("encode", clips, out)
    assert (figures["written"], figures["skipped"], figures["failed"]) == (1, 2, [])
    assert run("encode", clips, out, "--fps", 12)["written"] == 3

    figures = run("decode", out, tmp_path / "back")
    assert (figures["written"], figures["frames"]) == (3, sum(r["frames"] for r in figures["results"]))
    assert sorted(file.name for file in (tmp_path / "back").rglob("*.mp4")) == [
        "a.mp4",
        "b.mp4",
        "frames.mp4",
    ]


def test_another_autoencoder_encodes_again(tmp_path, run, clips, capsys):
    (clips / "bad.mp4").unlink()
    run("encode", clips, tmp_path / "out")
    torch.manual_seed(1)
    model = TAE(TINY)
    model.init_weights()
    model.save_pretrained(tmp_path / "other")
    words = ["encode", str(clips), str(tmp_path / "out"), "--weights", str(tmp_path / "other"), "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 3


def test_a_person_reads_what_failed(tmp_path, capsys, weights, clips):
    words = ["reconstruct", str(clips), str(tmp_path / "out"), "--weights", str(weights), "--perceptual", "0"]
    assert main(words) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("failed: ") and "bad.mp4" in line for line in lines)
    assert lines[-1] == str(tmp_path / "out")


def test_folders_that_make_no_sense(tmp_path, capsys, weights, clips):
    (tmp_path / "empty").mkdir()
    for words, said in (
        (["encode", tmp_path / "empty", tmp_path / "out"], "holds no clips"),
        (["decode", clips, tmp_path / "out"], "holds no latent files"),
        (["reconstruct", clips, clips], "written over itself"),
    ):
        assert main([*map(str, words), "--weights", str(weights)]) == 2
        printed = capsys.readouterr()
        assert said in printed.err
        assert printed.err.count("\n") == 1


def test_info_on_clips(tmp_path, run, variable):
    info = run("info", variable)
    assert (info["codec"], info["frames"], info["variable_frame_rate"]) == ("h264", len(STAMPS), True)
    assert (info["shortest_frame"], info["longest_frame"]) == pytest.approx((0.033, 0.12))


def test_latent_files_of_before_are_read(tmp_path):
    attributes = LatentInfo(
        frames=3, height=8, width=8, fps=Fraction(25), color={}, source="a", tae="b", tae_sha256="c",
        channels=2, tile=4,
    ).to_attributes()  # fmt: skip
    for key in ("variable_frame_rate", "time_base", "resampled", "sound", "sound_origin", "source_bytes"):
        del attributes[key]
    del attributes["metadata"]
    attributes["normalized"] = False  # which they said of themselves
    assert not LatentInfo.from_attributes(attributes).variable_frame_rate
    assert LatentInfo.from_attributes(attributes).metadata == {}
    with pytest.raises((ValueError, TypeError), match="metadata"):
        LatentInfo.from_attributes(attributes | {"metadata": {"seed": 3}})
    with pytest.raises(KeyError, match="tile"):
        LatentInfo.from_attributes({key: attributes[key] for key in attributes.keys() - {"tile"}})


@pytest.fixture
def precomputed(tmp_path, weights, run) -> Path:
    """A latent folder as precompute writes it: two clips of one shape, one of another."""
    folder = tmp_path / "latents"
    index = shards.LatentIndex(
        buckets={"9x32x24@25 weight=2": 2, "1x8x8@25": 1}, shard_size=2, captions_per_clip=2, widths=(3,),
        made_from={"source": "a.jsonl", "tae": fingerprint(TAE.from_pretrained(weights).state_dict())},
        latent_mean=(0.0, 0.5), latent_std=(1.0, 2.0),
    )  # fmt: skip
    text = np.ones((2, 3), np.float16)
    shards.begin(folder, index, [text])
    for bucket, count in index.buckets.items():
        latents = []
        for number in range(count):
            size = parse(bucket)
            clip = np.roll(gradient(size.frames), 20 * number, axis=2)[:, : size.height, : size.width]
            video.write(tmp_path / f"{number}.mp4", clip, fps=25, crf=1)
            run("encode", tmp_path / f"{number}.mp4", tmp_path / f"{size.frames}-{number}.kino")
            shape = (-(-size.frames // 8), 2, size.height // 8, size.width // 8)
            (latent,) = read_latents(tmp_path / f"{size.frames}-{number}.kino", 0, shape[0], shape)
            latents.append(np.swapaxes(latent, 0, 1))
        captions = [[f"clip {number}", "x"] for number in range(count)]
        content = shards.Shard(latent=np.stack(latents), texts=[[text] * 2 * count], captions=captions)
        shards.write_shard(folder, bucket, 0, content)
    return folder


def test_a_latent_folder_is_described(precomputed, run, capsys):
    said = run("info", precomputed)
    assert (said["clips"], said["captions_per_clip"], said["shards_missing"]) == (3, 2, 0)
    assert said["buckets"] == {"9x32x24@25 weight=2": 2, "1x8x8@25": 1}
    assert (said["text_widths"], said["made_from"]["source"]) == ({"text_0": 3}, "a.jsonl")
    assert said["bytes"] == sum(file.stat().st_size for file in precomputed.rglob("*") if file.is_file())
    assert main(["info", str(precomputed)]) == 0
    assert "9x32x24@25 weight=2: 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("chosen", "same"),
    [(["--clip", 1], "9-1"), (["--clip", 0, "--bucket", "1x8x8@25"], "1-0"), (["--clip", 0], "9-0")],
)
def test_a_clip_of_a_latent_folder_is_what_its_latent_file_decodes_to(precomputed, run, chosen, same):
    place = precomputed.parent
    figures = run("decode", precomputed, place / "seen.mp4", *chosen)
    run("decode", place / f"{same}.kino", place / "same.mp4")
    assert np.array_equal(video.read(place / "seen.mp4"), video.read(place / "same.mp4"))
    assert (figures["input"], figures["clip"]) == (str(precomputed), chosen[1])
    metadata = video.probe(place / "seen.mp4").metadata
    assert (metadata["title"], metadata["caption_1"]) == (f"clip {chosen[1]}", "x")


def test_what_a_latent_folder_does_not_hold_is_one_line(precomputed, weights, capsys, tmp_path):
    model, out = ["--weights", str(weights)], str(tmp_path / "a.mp4")
    for words, said in (
        ([precomputed, out], "holds many clips; choose one with --clip N"),
        ([precomputed, out, "--clip", "2"], "choose one from 0 to 1 of 9x32x24@25"),
        ([precomputed, out, "--clip", "0", "--bucket", "2x8x8@25"], "which holds 9x32x24@25, 1x8x8@25"),
        ([tmp_path / "9-0.kino", out, "--clip", "0"], "not what precompute wrote"),
    ):
        assert main(["decode", *map(str, words), *model]) == 2
        printed = capsys.readouterr()
        assert said in printed.err and printed.err.count("\n") == 1
    assert main(["decode", str(precomputed), out, "--clip", "0"]) == 2
    assert f"made by the autoencoder of {precomputed}" in capsys.readouterr().err
    assert not Path(out).exists()


def test_without_the_perceptual_weights_that_is_said(tmp_path, weights, variable, monkeypatch, capsys):
    monkeypatch.setattr("kinoflow.tae.__main__.installed", lambda: False)
    words = ["reconstruct", str(variable), str(tmp_path / "a.mp4"), "--weights", str(weights), "--json"]
    assert main(words) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["perceptual"] is None
    assert "stlpips-pytorch" in figures["perceptual_note"]
    assert main([*words, "--perceptual", "1"]) == 2
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1 and "pip install --no-deps stlpips-pytorch, or leave --perceptual out" in said
    )


@pytest.mark.parametrize("name", ["pipe.mp4", "pipe.kino"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, capsys, name):
    os.mkfifo(tmp_path / name)
    assert main(["info", str(tmp_path / name)]) == 2
    assert name in capsys.readouterr().err


def test_names_with_brackets_are_shown_as_they_are(tmp_path, capsys, weights):
    video.write(tmp_path / "[bold]x.mp4", gradient(2), fps=25)
    words = ["encode", str(tmp_path / "[bold]x.mp4"), str(tmp_path / "x.kino"), "--weights", str(weights)]
    assert main(words) == 0
    assert "[bold]" in capsys.readouterr().out.replace("\n", "")
