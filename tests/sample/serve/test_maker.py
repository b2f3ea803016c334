"""The server's clips are those of `kinoflow sample`, to the byte."""

import io
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from kinoflow.configs.errors import UserError
from kinoflow.sample.__main__ import main
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.preview import fit_colors
from kinoflow.sample.release import Release
from kinoflow.sample.request import ClipRequest
from kinoflow.sample.serve.app import ServeConfig, create_app
from kinoflow.sample.serve.maker import ReleaseMaker
from tests.sample.serve.fake import until

PROMPT = "a red star moves left"


def maker_of(release: Release) -> ReleaseMaker:
    return ReleaseMaker(Pipeline(release))


def test_the_shipped_release_through_the_server_and_the_command_is_equal(tmp_path):
    quick = ["--steps", "1", "--frames", "1", "--seed", "3", "--negative", "a blue ring"]
    assert main([PROMPT, *quick, "--out", str(tmp_path / "clip.mp4")]) == 0
    app = create_app(maker_of(Release.load()), ServeConfig(folder=tmp_path / "serve"))
    values = {"prompt": PROMPT, "num_inference_steps": 1, "num_frames": 1, "seed": 3}
    with TestClient(app, base_url="http://localhost") as client:
        asked = client.post("/v1/videos", json=values | {"negative_prompt": "a blue ring"}).json()
        until(lambda: client.get(f"/v1/videos/{asked['id']}").json()["status"] == "completed")
        content = client.get(f"/v1/videos/{asked['id']}/content").content
    assert content == (tmp_path / "clip.mp4").read_bytes()


def test_clips_that_are_made_at_the_same_time_are_those_made_alone(run, tiny_release, tmp_path):
    maker = ReleaseMaker(Pipeline(tiny_release), 3)
    app, ids = create_app(maker, ServeConfig(folder=tmp_path / "serve")), {}
    with TestClient(app, base_url="http://localhost") as client:
        for seed in range(5):
            asked = {"prompt": PROMPT, "num_inference_steps": 2, "seed": seed}
            asked |= {"size": "48x32"} if seed == 4 else {}
            ids[seed] = client.post("/v1/videos", json=asked).json()["id"]
        for seed, id in ids.items():
            until(lambda id=id: client.get(f"/v1/videos/{id}").json()["status"] == "completed")
            more = ["--size", "48x32"] if seed == 4 else []
            assert run(PROMPT, "--seed", str(seed), "--out", f"{seed}.mp4", *more)[0] == 0
            content = client.get(f"/v1/videos/{id}/content").content
            assert content == Path(f"{seed}.mp4").read_bytes()


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--guidance", "1"],
        ["--size", "48x32", "--seed", "9"],
        ["--guidance-kind", "apg", "--guidance-rescale", "0.5", "--cache", "0.9"],
    ],
)
def test_all_settings_give_the_commands_bytes(run, tiny_release, tmp_path, more):
    options = {"--guidance": ("guidance", float), "--seed": ("seed", int), "--cache": ("cache", float)}
    options |= {"--guidance-kind": ("guidance_kind", str), "--guidance-rescale": ("guidance_rescale", float)}
    asked = {"prompt": PROMPT, "steps": 2}
    for option, value in zip(more[::2], more[1::2], strict=True):
        if option == "--size":
            asked["width"], asked["height"] = map(int, value.split("x"))
        else:
            name, kind = options[option]
            asked[name] = kind(value)
    assert run(PROMPT, "--out", "clip.mp4", *more)[0] == 0
    maker, shares = maker_of(tiny_release), []
    request = maker.check(ClipRequest(**asked))
    figures = maker.make(request, tmp_path / "served.mp4", shares.append)
    passes = 2 if asked.get("guidance") == 1 else 4
    counts = {"computed": passes, "reused": 0}
    assert figures == {"unknown_words": [], "passes": counts, "kept_seed": request.seed}
    assert (tmp_path / "served.mp4").read_bytes() == (tmp_path / "clip.mp4").read_bytes()
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] == 1


def test_what_is_shown_is_the_middle_of_the_clip_and_changes_nothing(tiny_release, tmp_path):
    maker, shown = maker_of(tiny_release), []
    request = maker.check(ClipRequest(prompt=PROMPT, steps=40))
    maker.make(request, tmp_path / "a.mp4", lambda _: None, shown.append)
    maker.make(request, tmp_path / "b.mp4", lambda _: None)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert len(shown) == 20
    plan, seen = Pipeline(tiny_release).plan(request), []
    pipeline = Pipeline(tiny_release)
    pipeline.flow(plan, pipeline.conditions(plan), seen=seen.append)
    with Image.open(io.BytesIO(shown[-1])) as image:
        assert image.size == (4, 4)
        want = fit_colors(pipeline.decoder)(seen[38])[1]
        assert np.abs(np.asarray(image, int) - want.numpy().astype(int)).max() <= 1


def test_defaults_are_the_releases(tiny_release):
    maker = maker_of(tiny_release)
    assert [str(clip) for clip in maker.clips] == ["16x32x32@16", "1x32x32@16", "40x32x48@24000/1001"]
    filled = maker.check(ClipRequest(prompt="x"))
    assert (filled.frames, filled.width, filled.height, filled.fps) == (16, 32, 32, Fraction(16))
    assert (filled.steps, filled.guidance, filled.cache) == (50, 4.0, 0)
    assert (filled.guidance_kind, filled.guidance_interval, filled.guidance_rescale) == ("cfg", (0, 1), 0)
    assert maker.check(filled) == filled


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"frames": 17}, "makes no such clips"),
        ({"steps": 300}, "num_steps: 300"),
        ({"guidance": float("nan")}, "guidance_scale: nan is not in 0..100"),
        ({"guidance_interval": (0.9, 0.1)}, "guidance_interval: 0.9:0.1 is not two rising times"),
        ({"guidance_rescale": 2.0}, "guidance_rescale: 2.0 is not in 0..1"),
        ({"guidance_kind": "zero-star", "steps": 1}, "num_steps: 1 are too few for guidance_kind zero-star"),
        ({"cache": -1.0}, "cache: -1.0 is not in 0..1"),
        ({"seed": -1}, "seed: -1"),
        ({"seed": 2**63}, "seed: 9223372036854775808"),
        ({"negative": "x", "guidance": 1.0}, "negative: guidance_scale 1 steers away from nothing"),
    ],
)
def test_what_the_release_cannot_make_is_refused(tiny_release, asked, said):
    with pytest.raises(UserError, match=said):
        maker_of(tiny_release).check(ClipRequest(prompt="x", **asked))


def test_what_ends_the_work_leaves_no_file(tiny_release, tmp_path):
    class StopError(Exception):
        pass

    maker = maker_of(tiny_release)
    for last in (0.1, 0.9):  # while sampling, while decoding

        def progress(share, last=last):
            if share >= last:
                raise StopError

        with pytest.raises(StopError):
            maker.make(maker.check(ClipRequest(prompt="x", steps=4)), tmp_path / "clip.mp4", progress)
        assert list(tmp_path.iterdir()) == []
