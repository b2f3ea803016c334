"""A clip is made again from its own file, and files of other kinds hold what that takes."""

import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kinoflow.data.video import write
from kinoflow.sample.__main__ import main
from kinoflow.sample.output import finished, read_metadata
from kinoflow.sample.picture import read_frames, write_picture
from kinoflow.sample.pipeline import Pipeline

PROMPT = 'a "☂" in\nthe rain'


@pytest.fixture
def again(tiny_release, capsys):
    def command(*argv):
        capsys.readouterr()
        code = main(["again", *argv, "--weights", str(tiny_release.folder)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.mark.parametrize("name", ["x.mp4", "x.gif", "x.webp", "x.png"])
@pytest.mark.parametrize(
    "more",
    [
        ["--negative", "snow"],
        ["--solver", "sde", "--diffusion", "0.5"],
        ["--size", "48x32", "--seed", "9"],
        ["--guidance-kind", "apg", "--guidance-interval", "0:0.9", "--guidance-rescale", "0.5"],
        ["--guidance-kind", "zero-star", "--cache", "0.9"],
    ],
)
def test_a_clip_is_made_again_from_its_own_file(run, again, name, more):
    assert run(PROMPT, "--out", name, *more)[0] == 0
    shutil.copy(name, "kept")
    code, out, err = again(name)
    assert (code, out) == (0, f"{name}: equal, to the byte\n"), err
    assert Path(name).read_bytes() == Path("kept").read_bytes()


def test_a_clip_of_a_batch_and_one_of_a_picture(run, again):
    Path("list.csv").write_text('prompt,frames,seed\na ring,,3\n"a ""star"", red",1,4\n')
    assert run("--prompts", "list.csv", "--batch", "2", "--out", "clips", "--threads", "2")[0] == 0
    for path in Path("clips").iterdir():
        assert again(str(path))[0] == 0


def test_what_was_changed_since_is_not_equal(run, again):
    assert run(PROMPT, "--out", "x.mp4", "--crf", "0")[0] == 0
    metadata = read_metadata(Path("x.mp4"))
    write("y.mp4", np.zeros((16, 32, 32, 3), np.uint8), fps=Fraction(16), metadata=metadata)
    code, out, _ = again("y.mp4", "--json", "--out", "z.mp4")
    figures = json.loads(out)
    assert (code, figures["equal"], figures["same_file"]) == (1, False, False)
    assert Path("z.mp4").read_bytes() == Path("x.mp4").read_bytes()
    assert again("y.mp4")[1] == "y.mp4: not equal\n"


def test_other_versions_are_named_and_the_frames_decide(run, again):
    assert run(PROMPT, "--frames", "1", "--out", "x.png")[0] == 0
    metadata = read_metadata(Path("x.png")) | {"torch": "1.0"}
    write_picture(Path("y.png"), read_frames(Path("x.png")), Fraction(16), metadata)
    code, out, _ = again("y.png")
    assert code == 0
    assert out.startswith("y.png: equal in all frames (torch 1.0 then, ")


def test_what_cannot_be_made_again_is_one_line(run, again, tiny_release, capsys):
    assert run(PROMPT, "--frames", "1", "--out", "x.png")[0] == 0
    metadata = read_metadata(Path("x.png"))
    frames = read_frames(Path("x.png"))

    def changed(**values):
        write_picture(Path("y.png"), frames, Fraction(16), metadata | values)
        return again("y.png")

    write_picture(Path("bare.png"), frames, Fraction(16), {})
    for (code, out, err), said in [
        (again("bare.png"), "bare.png: does not say how it was made"),
        (again("gone.png"), "gone.png: no picture that can be read"),
        (again("gone.mp4"), "gone.mp4"),
        (again("x.png", "--out", "x.png"), "give --out another name that ends in .png"),
        (changed(weights="0" * 16), "y.png: made with tiny, weights 0000000000000000; these are tiny"),
        (changed(shift="2", schedule="shifted"), "y.png: made otherwise (schedule shifted, here linear-quad"),
        (changed(seed="x"), "y.png: its metadata is damaged"),
        (changed(threads="x"), "y.png: its threads is 'x'"),
    ]:
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert said in err


def test_a_pipelines_file_is_made_again(tiny_release, again, tmp_path):
    for name in ("a.mp4", "a.webp"):
        Pipeline(tiny_release)(PROMPT, steps=2, seed=4).save(tmp_path / name)
        assert again(str(tmp_path / name))[0] == 0


def test_gif_and_webp_move_at_their_rate_and_a_sheet_shows_eight_frames(tiny_release, tmp_path):
    video = Pipeline(tiny_release)(PROMPT, steps=2)
    for suffix, tick in ((".gif", 10), (".webp", 1)):
        path = video.save(tmp_path / f"a{suffix}")
        with Image.open(path) as image:
            durations = []
            for index in range(image.n_frames):
                image.seek(index)
                image.load()
                durations.append(image.info["duration"])
        assert len(durations) == 16 and sum(durations) == 1000
        assert {abs(duration - 62.5) < tick for duration in durations} == {True}
        assert finished(path, video.metadata) and not finished(path, video.metadata | {"seed": "1"})
    assert np.array_equal(read_frames(tmp_path / "a.webp"), video.frames)
    assert np.abs(read_frames(tmp_path / "a.gif").astype(int) - video.frames).mean() < 8
    sheet = read_frames(video.save(tmp_path / "a.png"))
    assert sheet.shape == (1, 32, 8 * 36 - 4, 3)
    assert np.array_equal(sheet[0, :, :32], video.frames[0])
    assert np.array_equal(sheet[0, :, -32:], video.frames[-1])
