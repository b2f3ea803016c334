"""Clips from pictures and clips: what is shown, kept, added and changed, by Python and by the command."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from kinoflow.configs.errors import UserError
from kinoflow.data.clips.fit import fit
from kinoflow.data.video import read, write
from kinoflow.dit_video.flow.known import keep, span
from kinoflow.sample.again import main as again
from kinoflow.sample.given import Given, extended, known_of, last_alone, read_source
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.release import Release
from kinoflow.sample.request import ClipRequest
from kinoflow.tae.model.tae import TAE
from tests.sample.conftest import HashEncoder

PROMPT = "a red star moves left"


@pytest.fixture
def pipeline(reading_folder, monkeypatch):
    monkeypatch.setattr(Release, "encoder", lambda self, text_cache=None, device="cpu": HashEncoder())
    return Pipeline(Release.load(reading_folder))


def frames(count, height=40, width=64, seed=0):
    """A picture that drifts, so that neighbours are alike."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.stack([np.roll(base, i, axis=1) for i in range(count)])


def picture(folder, name="a.png", seed=0, **size):
    Image.fromarray(frames(1, seed=seed, **size)[0]).save(folder / name)
    return folder / name


def clip(folder, count, name="clip.mp4", fps=16):
    write(folder / name, frames(count, 32, 32), fps=Fraction(fps), crf=0)
    return folder / name


def masked(folder, rows=slice(8, 16), columns=slice(8, 24)):
    mask = np.zeros((32, 32), np.uint8)
    mask[rows, columns] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder / "mask.png"


def test_a_picture_is_shown_as_training_shows_it(pipeline, tmp_path):
    path = picture(tmp_path)
    plan = pipeline.plan(ClipRequest(prompt=PROMPT, image=str(path), steps=2))
    tae = pipeline.decoder
    assert isinstance(tae, TAE) and plan.source is not None
    known = known_of(plan.source, tae, 2)
    pixels = torch.from_numpy(fit(read(path), 32, 32)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        want = tae.normalize(tae.encode(pixels).mean)
    assert torch.equal(known.latent[:, :, 0], want[:, :, 0]) and not known.latent[:, :, 1:].any()
    assert known.shown[:, :, 0].all() and not known.kept.any()
    shown = pipeline(PROMPT, image=path, steps=2)
    assert not np.array_equal(shown.frames, pipeline(PROMPT, steps=2).frames)
    assert np.array_equal(shown.frames, pipeline(PROMPT, image=path, steps=2).frames)


def test_the_last_frame_too(pipeline, tmp_path):
    first, last = picture(tmp_path), picture(tmp_path, "b.png", seed=1)
    plan = pipeline.plan(ClipRequest(prompt=PROMPT, image=str(first), last=str(last)))
    known = known_of(plan.source, pipeline.decoder, 2)
    assert known.shown.all() and not torch.equal(known.latent[:, :, 0], known.latent[:, :, 1])


@pytest.mark.parametrize("seconds", [None, 0.5, 1.3])
def test_a_clip_goes_on(pipeline, tmp_path, seconds):
    path = clip(tmp_path, 21)
    told = []
    video = pipeline(PROMPT, extend=path, seconds=seconds, steps=2, progress=told.append)
    added = 8 if seconds is None else round(seconds * 16)
    assert len(video.frames) == 21 + added
    assert np.array_equal(video.frames[:13], read(path)[:13]), "what was there stays"
    plan = pipeline.plan(ClipRequest(prompt=PROMPT, extend=str(path), seconds=seconds, steps=2))
    assert sum(told) == plan.num_steps and plan.frames == 21 + added


def test_each_turn_keeps_the_end_of_the_one_before():
    begin = keep(torch.randn(1, 2, 4, 2, 2), span(torch.zeros(1, 2, 4, 2, 2), 0, 1))
    seen = []

    def alone(latent):
        return 10 * latent[:, :, -1]

    def make(known, turn):
        seen.append((turn, known))
        made = torch.full_like(known.latent, float(turn + 1))
        return torch.where(known.kept > 0, known.latent, made)

    latent = extended(make, begin, 1, 9, alone)
    assert [turn for turn, _ in seen] == [0, 1, 2]
    assert latent[0, 0, :, 0, 0].tolist()[1:] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert torch.equal(latent[:, :, :1], begin.latent[:, :, :1])
    assert seen[0][1] is begin
    second = seen[1][1]
    assert (second.latent[:, :, 0] == 1).all() and second.kept[0, 0, :, 0, 0].tolist() == [1, 0, 0, 0]
    assert (second.latent[:, :, 1] == 10).all() and second.shown[0, 0, :, 0, 0].tolist() == [0, 1, 0, 0]


def test_the_last_frame_alone_is_encoded_as_a_picture_is(pipeline):
    tae = pipeline.decoder
    latent = torch.randn(1, tae.config.latent_channels, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        video = tae.decode(tae.denormalize(latent), 16)
        want = tae.normalize(tae.encode(video[:, :, 15:].clamp(-1, 1)).mean)[:, :, 0]
    assert torch.allclose(last_alone(tae, latent), want, atol=1e-5)


def test_a_clip_of_another_rate_and_size_is_brought_to_the_models(pipeline, tmp_path):
    write(tmp_path / "wide.mp4", frames(30, 48, 96), fps=Fraction(30), crf=0)
    video = pipeline(PROMPT, extend=tmp_path / "wide.mp4", steps=2)
    assert video.fps == 16 and video.frames.shape == (16 + 8, 32, 32, 3), "one second, and half a clip"


def test_only_what_is_masked_changes(pipeline, tmp_path):
    path, mask = clip(tmp_path, 20), masked(tmp_path)
    video = pipeline(PROMPT, edit=path, mask=mask, steps=2)
    before = read(path)[:16]
    changed = (video.frames != before).any(axis=(0, 3))
    assert video.frames.shape == before.shape
    assert changed[10:14, 12:20].any(), "inside it is new"
    assert not changed[:4].any() and not changed[20:].any() and not changed[:, :4].any()


def test_the_masked_cells_are_made_anew(pipeline, tmp_path):
    plan = pipeline.plan(ClipRequest(prompt=PROMPT, edit=str(clip(tmp_path, 20)), mask=str(masked(tmp_path))))
    known = known_of(plan.source, pipeline.decoder, 2)
    # White in rows 8 to 16 and columns 8 to 24; with a margin of 4 pixels it touches these cells of 8.
    want = torch.ones(4, 4)
    want[0:3, 0:4] = 0
    assert torch.equal(known.kept[0, 0, 0], want) and torch.equal(known.kept[0, 0, 1], want)


def test_a_clip_longer_than_trained_is_made_in_windows(pipeline):
    plan = pipeline.plan(ClipRequest(prompt=PROMPT, frames=96, width=48, height=32, steps=2))
    assert plan.bucket.frames == 96 and plan.windows is not None and plan.windows.length == 5
    made = pipeline.make(plan)
    assert made.frames.shape == (96, 32, 48, 3)
    assert made.metadata["clip"] == "96x32x48@24000/1001"


@pytest.mark.parametrize("given", ["image", "extend", "edit"])
def test_the_command_makes_it_and_again_makes_it_equal(pipeline, tmp_path, given, capsys, monkeypatch):
    from kinoflow.sample.__main__ import main

    monkeypatch.chdir(tmp_path)
    paths = {"image": picture(tmp_path), "extend": clip(tmp_path, 20), "edit": clip(tmp_path, 20, "e.mp4")}
    words = [f"--{given}", str(paths[given]), *(["--mask", str(masked(tmp_path))] if given == "edit" else [])]
    release = ["--weights", str(pipeline.release.folder)]
    assert main([PROMPT, *words, *release, "--steps", "2", "--out", "a.mp4"]) == 0
    assert again(["a.mp4", *release]) == 0, capsys.readouterr()
    assert "equal" in capsys.readouterr().out
    paths[given].write_bytes(picture(tmp_path, "other.png", seed=9).read_bytes())
    with pytest.raises(UserError, match="has changed since the clip was made"):
        again(["a.mp4", *release])


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"image": "a.png", "extend": "c.mp4"}, "extend: not beside image"),
        ({"last": "a.png"}, "last: needs image as well"),
        ({"edit": "c.mp4"}, "mask: says where edit is made anew"),
        ({"mask": "a.png"}, "mask: says where edit is made anew"),
        ({"seconds": 1.0}, "seconds: how much extend adds"),
        ({"image": "none.png"}, "none.png"),
        ({"image": "c.mp4"}, "has 20 frames; give a picture"),
        ({"image": "a.png", "last": "a.png", "frames": 1}, "last: a picture has one frame"),
        ({"extend": "c.mp4", "seconds": 0.01}, "is not a frame at 16 fps"),
        ({"extend": "c.mp4", "seconds": -2.0}, "is not a frame at 16 fps"),
        ({"extend": "a.png"}, "to go on from it takes 8"),
        ({"edit": "short.mp4", "mask": "m.png"}, "has 9 frames at 16 fps, and 16 are made"),
        ({"edit": "c.mp4", "mask": "black.png"}, "is black everywhere"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_line(pipeline, tmp_path, monkeypatch, keys, line):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path)
    clip(tmp_path, 20, "c.mp4")
    clip(tmp_path, 9, "short.mp4")
    masked(tmp_path).rename("m.png")
    Image.fromarray(np.zeros((32, 32), np.uint8)).save("black.png")
    with pytest.raises(UserError, match=line) as error:
        pipeline.plan(ClipRequest(prompt=PROMPT, **keys))
    assert "\n" not in str(error.value)


def test_a_release_of_text_alone_says_so(tiny_release, tmp_path):
    with pytest.raises(UserError, match="image: tiny makes clips of text alone"):
        Pipeline(tiny_release).plan(ClipRequest(prompt=PROMPT, image=str(picture(tmp_path))))


def test_files_are_named_with_what_is_in_them(tmp_path):
    path = picture(tmp_path)
    given = Given(image=str(path))
    assert Given.again(given.described) == given
    assert read_source(given, Pipeline(Release.load()).release.bucket(), 8).first is not None
