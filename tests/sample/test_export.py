"""A release as diffusers loads it makes the frames of the command; what cannot be exported is one line."""

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import diffusers.utils.dynamic_modules_utils
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_utils
from huggingface_hub.utils import filter_repo_objects

from kinoflow.conditioning.checkpoints import TextConfig
from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import dump
from kinoflow.sample.__main__ import main
from kinoflow.sample.picture import read_frames
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.release import Release

PROMPT = 'a red star, a sign says "KITE"'


@pytest.fixture(autouse=True)
def modules(tmp_path_factory, monkeypatch):
    """diffusers copies a folder's code into one place for all, and other tests run beside this one."""
    place = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", place)
    monkeypatch.syspath_prepend(place)


def load(folder, **more):
    pipe = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def exported(whole_release_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "out"
    assert main(["export-diffusers", str(whole_release_folder), str(out), "--json"]) == 0
    return out


@pytest.fixture
def pipe(exported):
    return load(exported)


def ours(folder, prompt=PROMPT, **settings):
    return Pipeline.from_pretrained(folder, device="cpu")(prompt, steps=2, **settings)


def bytes_of(pictures):
    return np.stack([np.asarray(picture) for picture in pictures])


def test_the_shipped_release_gives_the_commands_frames(tmp_path, capsys):
    assert main(["export-diffusers", "mini", str(tmp_path / "out")]) == 0
    assert "out: kinoflow-mini for diffusers\n" in capsys.readouterr().out
    prompt = "a red star on a gray background"
    command = [prompt, "--frames", "1", "--steps", "2", "--seed", "7", "--out", str(tmp_path / "a.png")]
    assert main([*command, "--device", "cpu", "--best-of", "1"]) == 0
    for way in ({}, {"custom_pipeline": str(tmp_path / "out")}, {"custom_pipeline": "pipeline"}):
        made = load(tmp_path / "out", **way)(
            prompt, num_frames=1, num_inference_steps=2, generator=torch.Generator().manual_seed(7),
            output_type="pil",
        )  # fmt: skip
        assert np.array_equal(bytes_of(made.frames[0]), read_frames(tmp_path / "a.png"))


def test_what_diffusers_fetches_from_the_hub_is_enough(exported, tmp_path, monkeypatch):
    names = [path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()]
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names], sha="0" * 40)

    def fetch(repo, filename, **_):
        target = tmp_path / "hub" / filename
        target.parent.mkdir(parents=True, exist_ok=True)
        return shutil.copyfile(exported / filename, target)

    def snapshot(repo, allow_patterns, ignore_patterns, **_):
        for name in filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            fetch(repo, name)
        return tmp_path / "hub"

    for module in (pipeline_utils, diffusers.utils.dynamic_modules_utils):
        monkeypatch.setattr(module, "model_info", lambda *_, **__: info)
        monkeypatch.setattr(module, "hf_hub_download", fetch)
    monkeypatch.setattr(
        pipeline_utils, "_resolve_revision", lambda *_, revision, **__: revision, raising=False
    )
    monkeypatch.setattr(pipeline_utils, "snapshot_download", snapshot)
    made = load("somebody/release")(PROMPT, seed=3, num_inference_steps=2, output_type="pil")
    assert np.array_equal(bytes_of(made.frames[0]), ours(exported, seed=3).frames)
    assert not (tmp_path / "hub" / "kinoflow.yaml").exists()  # it is in model_index.json


def test_it_is_a_release_as_before(exported, whole_release_folder, tmp_path):
    one, other = Release.load(exported), Release.load(whole_release_folder)
    assert (one.config, one.weights_hash) == (other.config, other.weights_hash)
    assert not list(exported.parent.glob(".*"))
    listed = {path.name for path in (exported / "dit").iterdir()}
    assert listed == {"config.json", "model.safetensors", "kinoflow_dit.py"}


def test_every_setting_means_what_it_means_to_us(pipe, exported):
    expected = ours(
        exported, seed=5, width=48, height=32, fps=Fraction(24000, 1001), negative="snow", guidance=3.0,
        solver="heun",
    )  # fmt: skip
    settings = {"height": 32, "width": 48, "num_frames": 40, "fps": "24000/1001", "guidance_scale": 3.0}
    asked = settings | {"negative_prompt": "snow", "solver": "heun", "num_inference_steps": 2, "seed": 5}
    found = pipe(PROMPT, **asked)
    assert found.frames.shape == (1, 40, 32, 48, 3) and found.frames.dtype == np.float32
    assert np.array_equal(np.round(found.frames[0] * 255), expected.frames)
    (tensor,) = pipe(PROMPT, **asked, output_type="pt", return_dict=False)
    assert torch.equal(tensor.permute(0, 1, 3, 4, 2), torch.from_numpy(found.frames))
    latent = Pipeline.from_pretrained(exported, device="cpu")(
        PROMPT, seed=5, width=48, negative="snow", guidance=3.0, solver="heun", steps=2, latent=True
    ).latent
    assert torch.equal(pipe(PROMPT, **asked, output_type="latent").frames, latent)


def test_generators_and_seeds(pipe, exported):
    def made(prompt=PROMPT, **more):
        more = {"num_inference_steps": 2, "num_frames": 16, "output_type": "pil"} | more
        return [bytes_of(video) for video in pipe(prompt, **more).frames]

    first, second = ours(exported, seed=3).frames, ours(exported, seed=4).frames
    generator = torch.Generator().manual_seed(3)
    (fresh,), (later,) = made(generator=generator), made(generator=generator)
    assert np.array_equal(fresh, first) and not np.array_equal(later, first)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    for found in (made(generator=generators, num_videos_per_prompt=2), made([PROMPT, PROMPT], seed=3)):
        assert np.array_equal(found[0], first) and np.array_equal(found[1], second)
    torch.manual_seed(3)
    (default,), (other,) = made(), made()
    assert np.array_equal(default, first) and not np.array_equal(other, first)


def test_callbacks_are_called_after_each_step_and_may_end_it(pipe):
    seen = []

    def callback(owner, step, time, tensors):
        seen.append((step, float(time), tensors))
        if step == 1:
            raise StopIteration

    with pytest.raises(StopIteration):
        pipe(PROMPT, num_inference_steps=4, solver="heun", callback_on_step_end=callback)
    assert [step for step, *_ in seen] == [0, 1]
    assert seen[0][1] == 0.0 < seen[1][1] and seen[0][2] == {}


def test_numbers_are_those_of_the_transformer_alone(exported):
    pipe = load(exported, dtype=torch.bfloat16)
    assert (pipe.dit.dtype, pipe.tae.dtype, pipe.text.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    expected = Pipeline.from_pretrained(exported, device="cpu", dtype="bf16")(PROMPT, seed=3, steps=2)
    made = pipe(PROMPT, seed=3, num_inference_steps=2, output_type="pil")
    assert np.array_equal(bytes_of(made.frames[0]), expected.frames)
    pipe.to(torch.float32)
    assert pipe.dit.dtype == torch.float32
    pipe.to("meta", torch.bfloat16)
    assert {part.device.type for part in (pipe.dit, pipe.tae, pipe.text)} == {"meta"}
    assert (pipe.dit.dtype, pipe.tae.dtype, pipe.text.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_encoders_that_lie_elsewhere_come_along(whole_release_folder, tmp_path):
    release = Path(shutil.copytree(whole_release_folder, tmp_path / "release"))
    shutil.move(release / "text" / "ul2", tmp_path / "elsewhere")
    text = TextConfig(ul2=str(tmp_path / "elsewhere"))
    config = replace(Release.load(whole_release_folder).config, text=text)
    dump(config, release / "kinoflow.yaml")
    assert main(["export-diffusers", str(release), str(tmp_path / "out")]) == 0
    expected = ours(release, seed=3).frames
    shutil.rmtree(tmp_path / "elsewhere")
    shutil.rmtree(release)
    made = load(tmp_path / "out")(PROMPT, seed=3, num_inference_steps=2, output_type="pil")
    assert np.array_equal(bytes_of(made.frames[0]), expected)
    assert np.array_equal(ours(tmp_path / "out", seed=3).frames, expected)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"callback_on_step_end_tensor_inputs": ["latents"]},
            "callback_on_step_end_tensor_inputs: a callback",
        ),
        ({"output_type": "gif"}, "output_type: 'gif'; use one of pil, np, pt, latent"),
        ({"seed": 1, "generator": torch.Generator()}, "seed: given beside a generator"),
        ({"generator": [torch.Generator()] * 2}, "generator: 2 for 1 videos"),
        ({"num_frames": 17}, "frames 17: tiny makes no such clips"),
        ({"negative_prompt": "snow", "guidance_scale": 1.0}, "negative: guidance_scale 1"),
    ],
)
def test_what_cannot_be_made_is_one_line(pipe, asked, said):
    with pytest.raises(UserError, match=said):
        pipe(PROMPT, **asked)


def test_saving_is_refused(pipe, tmp_path):
    with pytest.raises(UserError, match="save_pretrained: copy the folder"):
        pipe.save_pretrained(str(tmp_path / "x"))


def test_what_cannot_be_exported_is_one_line(whole_release_folder, tmp_path, capsys, monkeypatch):
    def refused(release, out=tmp_path / "new"):
        code = main(["export-diffusers", str(release), str(out)])
        said = capsys.readouterr()
        assert (code, said.out, said.err.count("\n")) == (2, "", 1)
        assert not (tmp_path / "new").exists()
        return said.err

    assert f"{tmp_path}: is there already" in refused(whole_release_folder, tmp_path)
    assert "no such folder" in refused(tmp_path / "gone")
    release = Path(shutil.copytree(whole_release_folder, tmp_path / "release"))
    card = Release.load(release).config
    dump(replace(card, classes=("a", "b")), release / "kinoflow.yaml")
    assert "a release of classes or pixels; give one" in refused(release)
    dump(card, release / "kinoflow.yaml")
    (release / "text" / "ul2" / "config.json").unlink()
    assert "config.json: missing" in refused(release)
    monkeypatch.setattr(shutil, "copytree", lambda *_: (_ for _ in ()).throw(OSError(28, "full", "x")))
    assert "the disk is full" in refused(whole_release_folder)
    assert not list(tmp_path.glob(".*"))


def test_the_index_says_what_diffusers_asks(exported):
    index = json.loads((exported / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "KinoflowPipeline"]
    for part in ("dit", "tae", "text"):
        module, name = index[part]
        assert f"import {name}\n" in (exported / part / f"{module}.py").read_text()
