"""Clips made larger: what the backbone is shown, windows, the command, Python, and what is refused."""

import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from kinoflow.configs.errors import UserError
from kinoflow.configs.pretrained import save_pretrained
from kinoflow.configs.schema import dump
from kinoflow.data.video import probe, read, write
from kinoflow.dit_video.video_dit import VideoDiT
from kinoflow.sample import hub
from kinoflow.sample.__main__ import main
from kinoflow.sample.again import main as again
from kinoflow.sample.card import CARD_NAME
from kinoflow.sample.enlarge import main as enlarge
from kinoflow.sample.generate import Sampling
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.release import UPSAMPLER, Release, lent
from kinoflow.sample.request import ClipRequest
from kinoflow.sample.upsample import UpsampleConfig, shown_small
from kinoflow.tae.model.tae import TAE
from tests.sample.conftest import HashEncoder, tiny_dit
from tests.shaken import shake

PROMPT = "a red star moves left"


@pytest.fixture(scope="module")
def upsampler_folder(tiny_release_folder, tmp_path_factory):
    """From 16x16 and 32x32 pixels to twice as many, in windows of four frames."""
    folder = Path(shutil.copytree(tiny_release_folder, tmp_path_factory.mktemp("upsampler") / "release"))
    card = replace(
        Release.load(folder).config,
        name="larger",
        buckets=("4x64x64@16", "1x32x32@16"),
        default_bucket="4x64x64@16",
        sampling=Sampling(guidance_scale=1.0, num_steps=3),
        upsample=UpsampleConfig(factor=2, overlap=1),
    )
    dump(card, folder / CARD_NAME)
    torch.manual_seed(8)
    dit = VideoDiT(replace(tiny_dit().config, known=True))
    dit.init_weights()
    shutil.rmtree(folder / "dit")
    save_pretrained(folder / "dit", config=dit.config, state=shake(dit).state_dict())
    return folder


@pytest.fixture(autouse=True)
def hashed(monkeypatch):
    monkeypatch.setattr(Release, "encoder", lambda self, text_cache=None, device="cpu": HashEncoder())


@pytest.fixture
def upsampler(upsampler_folder):
    return Pipeline(Release.load(upsampler_folder))


def clip(folder, count=6, side=32, name="small.mp4", fps=16):
    rng = np.random.default_rng(count)
    base = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    write(folder / name, np.stack([np.roll(base, i, axis=1) for i in range(count)]), fps=Fraction(fps), crf=0)
    return folder / name


def test_each_frame_is_shown_enlarged_and_encoded_alone(upsampler, tmp_path):
    """Against the frames one by one; between pixel centres bilinear is the mean of ¾ and ¼."""
    small = read(clip(tmp_path))
    tae = upsampler.decoder
    assert isinstance(tae, TAE)
    known = shown_small(small, tae, 64, 64)
    pixels = torch.from_numpy(small[2:3]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    large = torch.nn.functional.interpolate(pixels[:, :, 0], (64, 64), mode="bilinear")[:, :, None]
    row = 0.75 * pixels[0, :, 0, 0, 0] + 0.25 * pixels[0, :, 0, 0, 1]
    assert torch.allclose(large[0, :, 0, 0, 1], row, atol=1e-6)
    with torch.no_grad():
        want = tae.normalize(tae.encode(large).mean)
    assert known.latent.shape == (1, 4, 6, 8, 8)
    assert torch.allclose(known.latent[:, :, 2:3], want, atol=1e-5)
    assert known.shown.all() and not known.kept.any()


def test_a_clip_becomes_larger_and_keeps_its_frames_and_rate(upsampler, tmp_path):
    told = []
    path = clip(tmp_path, fps=24)
    video = upsampler(upsample=path, progress=told.append)
    assert video.frames.shape == (6, 64, 64, 3) and video.fps == 24
    plan = upsampler.plan(ClipRequest(prompt="", upsample=str(path)))
    assert sum(told) == plan.num_steps == 3 + 6
    assert np.array_equal(video.frames, upsampler(upsample=path).frames)
    assert not np.array_equal(video.frames, upsampler(upsample=path, seed=1).frames)
    other = clip(tmp_path, 6, name="other.mp4", fps=24)
    write(other, 255 - read(path), fps=Fraction(24), crf=0)
    assert not np.array_equal(video.frames, upsampler(upsample=other).frames), "it sees the clip"


def test_one_window_is_no_window(upsampler, tmp_path):
    """Four frames fit at once; of seven the windows cover all, and one frame of each is shared."""
    plan = upsampler.plan(ClipRequest(prompt=PROMPT, upsample=str(clip(tmp_path, 4))))
    assert plan.windows is None
    alone = upsampler.latent(plan)
    longer = upsampler.plan(ClipRequest(prompt=PROMPT, upsample=str(clip(tmp_path, 7, name="b.mp4"))))
    assert longer.windows is not None and longer.windows.spans(7) == [(0, 4), (3, 7)]
    assert torch.equal(upsampler.latent(replace(plan, windows=longer.windows)), alone)
    assert upsampler.latent(longer).shape == (1, 4, 7, 8, 8)


def test_a_picture_becomes_larger(upsampler, upsampler_folder, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save("a.png")
    assert main(["upsample", "a.png", "b.png", "--weights", str(upsampler_folder)]) == 0
    with Image.open("b.png") as image:
        assert image.size == (32, 32)
    assert again(["b.png", "--weights", str(upsampler_folder)]) == 0


def test_the_command_makes_a_clip_larger_and_again_makes_it_equal(
    upsampler_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path, release = clip(tmp_path), ["--weights", str(upsampler_folder)]
    assert main(["upsample", str(path), "out.mp4", *release, "--steps", "2"]) == 0
    info = probe("out.mp4")
    assert (info.width, info.height, info.frames) == (64, 64, 6)
    assert info.metadata["upsample"] == str(path) and "prompt" not in info.metadata
    assert again(["out.mp4", *release]) == 0, capsys.readouterr()
    clip(tmp_path, 5)
    with pytest.raises(UserError, match="has changed since the clip was made"):
        again(["out.mp4", *release])


def test_a_clip_is_made_and_then_made_larger(tiny_release_folder, upsampler_folder, tmp_path, monkeypatch):
    """As by hand: the first release's frames, then the upsampler's."""
    monkeypatch.chdir(tmp_path)
    words = ["--weights", str(tiny_release_folder), "--upsample", str(upsampler_folder)]
    assert main([PROMPT, *words, "--steps", "2", "--out", "a.mp4", "--crf", "0"]) == 0
    pipeline = Pipeline.from_pretrained(tiny_release_folder, upsample=upsampler_folder, device="cpu")
    told = []
    video = pipeline(PROMPT, steps=2, progress=told.append)
    assert video.frames.shape == (16, 64, 64, 3)
    plan = pipeline.plan(ClipRequest(prompt=PROMPT, steps=2))
    assert sum(told) == plan.num_steps == 2 + 3 + 16 and plan.size == (64, 64)
    small = Pipeline(Release.load(tiny_release_folder))(PROMPT, steps=2)
    np.save("small.npy", small.frames)
    assert pipeline.upsampler is not None
    known = shown_small(small.frames, pipeline.upsampler.decoder, 64, 64)
    assert known.latent.shape[2] == 16
    written = probe("a.mp4").metadata
    assert written["upsampler"] == "larger" and written["upsampler_steps"] == "3"
    assert written["upsampler_weights"] == Release.load(upsampler_folder).weights_hash
    assert again(["a.mp4", *words]) == 0
    with pytest.raises(UserError, match=r"a\.mp4: larger made it larger; name just that in --upsample"):
        again(["a.mp4", "--weights", str(tiny_release_folder)])


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({}, "weights: larger is an upsampler and makes clips larger"),
        ({"upsample": "none.mp4"}, "none.mp4"),
        ({"upsample": "wide.mp4"}, "wide.mp4: 48x48 pixels, and larger takes 32x32, 16x16; bring it"),
        (
            {"upsample": "small.mp4", "frames": 8},
            "frames: an upsampler makes of small.mp4 6 frames of 64x64 at",
        ),
        ({"upsample": "small.mp4", "image": "a.png"}, "upsample: not beside image"),
        ({"upsample": "small.mp4", "seconds": 1.0}, "seconds: how much extend adds"),
        ({"upsample": "small.mp4", "best_of": 2}, "best_of: an upsampler makes a clip once"),
    ],
)
def test_what_cannot_be_made_larger_is_said_in_one_line(upsampler, tmp_path, monkeypatch, keys, line):
    monkeypatch.chdir(tmp_path)
    clip(tmp_path)
    clip(tmp_path, 2, 48, "wide.mp4")
    with pytest.raises(UserError, match=line) as error:
        upsampler.plan(ClipRequest(prompt=PROMPT, **keys))
    assert "\n" not in str(error.value)


def test_a_release_that_makes_clips_of_prompts_makes_none_larger(
    tiny_release_folder, upsampler_folder, tmp_path
):
    plain = Release.load(tiny_release_folder)
    with pytest.raises(UserError, match="upsample: tiny makes clips of prompts and none larger"):
        Pipeline(plain).plan(ClipRequest(prompt=PROMPT, upsample=str(clip(tmp_path))))
    with pytest.raises(UserError, match="upsample: tiny makes clips of prompts, and has no upsampler"):
        Pipeline(plain, upsampler=Pipeline(plain))
    larger = Pipeline(plain, upsampler=Pipeline(Release.load(upsampler_folder)))
    with pytest.raises(UserError, match="upsample: tiny makes clips of prompts, and has no upsampler"):
        enlarge([str(clip(tmp_path)), str(tmp_path / "x.mp4"), "--weights", str(tiny_release_folder)])
    with pytest.raises(UserError, match="upsample: 48x32 pixels, and larger takes 32x32, 16x16"):
        larger.plan(ClipRequest(prompt=PROMPT, width=48))


def test_settings_of_an_upsampler_are_checked():
    for keys, line in (
        ({"factor": 1}, "upsample.factor: 1 is not 0"),
        ({"overlap": -1}, "upsample.overlap: -1"),
    ):
        with pytest.raises(UserError, match=line):
            UpsampleConfig(**keys)


@pytest.fixture(scope="module")
def whole(tiny_release_folder, upsampler_folder, tmp_path_factory):
    """A release that has an upsampler of its own, which has neither autoencoder nor text encoders."""
    folder = Path(shutil.copytree(tiny_release_folder, tmp_path_factory.mktemp("whole") / "release"))
    own = Path(shutil.copytree(upsampler_folder, folder / UPSAMPLER))
    for part in lent(own, own):
        shutil.rmtree(own / part)
    return folder


def test_an_upsampler_takes_what_it_lacks_from_the_release_around_it(whole, upsampler_folder, tmp_path):
    own, alone = Release.load(whole / UPSAMPLER), Release.load(upsampler_folder)
    assert sorted(path.name for path in own.folder.iterdir()) == ["dit", CARD_NAME]
    assert own.weights_hash == alone.weights_hash and own.vocabulary == alone.vocabulary
    path = clip(tmp_path)
    assert np.array_equal(*(Pipeline(each)(upsample=path).frames for each in (own, alone)))
    moved = shutil.copytree(whole / UPSAMPLER, tmp_path / "moved")
    with pytest.raises(UserError, match="moved: has no tae/; an upsampler takes it and text/"):
        Release.load(moved)


def test_the_release_own_is_named_by_no_name(whole, tiny_release_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, weights = clip(tmp_path), ["--weights", str(whole)]
    assert main(["upsample", str(path), "a.mp4", *weights]) == 0
    assert main(["upsample", str(path), "b.mp4", "--weights", str(whole / UPSAMPLER)]) == 0
    assert np.array_equal(read("a.mp4"), read("b.mp4"))
    assert main([PROMPT, *weights, "--upsample", "--out", "c.mp4"]) == 0
    assert main([PROMPT, *weights, "--upsample", str(whole / UPSAMPLER), "--out", "d.mp4"]) == 0
    assert np.array_equal(read("c.mp4"), read("d.mp4"))
    capsys.readouterr()
    assert again(["a.mp4", *weights]) == again(["c.mp4", *weights, "--upsample"]) == 0
    assert capsys.readouterr().out.count("equal, to the byte") == 2
    with pytest.raises(UserError, match=r"upsample: .* has no upsampler of its own; name one"):
        Pipeline.from_pretrained(tiny_release_folder, upsample=UPSAMPLER)


def test_the_hub_gets_the_upsampler_with_the_release(whole):
    found = {str(path.relative_to(whole)) for path in hub._files(whole)}
    assert {f"upsampler/{CARD_NAME}", "upsampler/dit/model.safetensors", "dit/model.safetensors"} <= found
