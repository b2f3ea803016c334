"""Stable Diffusion 3 and 3.5 as released: ours and diffusers' pipeline on the same tiny folder."""

import json
import shutil
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kinoflow.conditioning.embedding import TruncatedPromptWarning
from kinoflow.configs.errors import UserError
from kinoflow.sample.__main__ import main
from kinoflow.sample.generate import Sampling, decode_latent, null_condition, sample_latent
from kinoflow.sample.stable_diffusion import StableDiffusion, open_release
from tests.sample.stable_diffusion import pipeline

PROMPT = "a red star, spinning"
KINDS = ("3", "3.5 medium")


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """Diffusers' pipeline and the folder it was written into."""
    folder = tmp_path_factory.mktemp("sd") / "tiny-sd3"
    return pipeline(request.param, folder), folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd") / "tiny-sd3"
    pipeline("3", folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder, where it refuses; gives the line that says why."""
    monkeypatch.chdir(tmp_path)

    def command(folder, *options):
        assert main([PROMPT, "--weights", str(folder), *options]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return command


def theirs(pipe, prompt: str = PROMPT, *, output: str = "latent", **more):
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(5))
    options = {"num_inference_steps": 8, "guidance_scale": 5.0, "height": 64, "width": 64} | more
    dtype = pipe.transformer.dtype
    return pipe(prompt, latents=noise.to(dtype), output_type=output, **options).images


def ours(folder, prompt: str = PROMPT, *, dtype=torch.float32, negative=None, **more):
    release = open_release(folder, dtype=dtype)
    encoder, tae = release.encoder(), release.tae()
    sampling = replace(release.config.sampling, num_steps=8, **more)
    text, null = encoder([prompt], Fraction(1)), null_condition(encoder, negative, Fraction(1))
    shape = tae.config.latent_shape(1, 64, 64)
    return sample_latent(release.backbone(dtype=dtype), text, null, shape, seed=5, sampling=sampling), tae


def test_the_same_noise_becomes_the_same_picture(both):
    pipe, folder = both
    latent, tae = ours(folder)
    torch.testing.assert_close(latent[:, :, 0], theirs(pipe), atol=1e-4, rtol=0)
    (picture,) = theirs(pipe, output="np")
    frames = decode_latent(tae, latent, 1)[0, 0].numpy()
    assert np.abs(frames - 255 * picture).max() <= 1
    assert frames.std() > 5


def test_a_negative_prompt_and_no_guidance(both):
    pipe, folder = both
    latent, _ = ours(folder, negative="blue ring")
    torch.testing.assert_close(latent[:, :, 0], theirs(pipe, negative_prompt="blue ring"), atol=1e-4, rtol=0)
    latent, _ = ours(folder, guidance_scale=1.0)
    torch.testing.assert_close(latent[:, :, 0], theirs(pipe, guidance_scale=1.0), atol=1e-4, rtol=0)


def test_bf16_is_as_near_as_diffusers_in_bf16(both):
    pipe, folder = both
    exact = theirs(pipe)
    low = type(pipe).from_pretrained(folder, dtype=torch.bfloat16)
    low.set_progress_bar_config(disable=True)
    expected, (latent, _) = theirs(low).float(), ours(folder, dtype=torch.bfloat16)

    def error(found):
        return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    assert 0 < error(latent[:, :, 0]) <= 1.5 * error(expected) < 0.1


@pytest.mark.parametrize("prompts", [[PROMPT, ""], ['a blue ring "KITE"']])
def test_the_text_is_what_encode_prompt_gives(both, prompts):
    pipe, folder = both
    (found,) = open_release(folder).encoder()(prompts, Fraction(1))
    states, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    torch.testing.assert_close(found.hidden, states, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.pooled, pooled, atol=1e-6, rtol=1e-5)
    assert found.hidden.shape == (len(prompts), 77 + 256, 40) and found.mask.all()


def test_without_t5_its_states_are_zero(tmp_path):
    pipe = pipeline("3", tmp_path, with_t5=False)
    (found,) = open_release(tmp_path).encoder()([PROMPT], Fraction(1))
    states, _, _, _ = pipe.encode_prompt([PROMPT], None, None, do_classifier_free_guidance=False)
    torch.testing.assert_close(found.hidden, states, atol=2e-5, rtol=0)
    assert not found.hidden[:, 77:].any()
    latent, _ = ours(tmp_path)
    torch.testing.assert_close(latent[:, :, 0], theirs(pipe), atol=1e-4, rtol=0)


def test_long_prompts_are_cut_as_theirs_with_a_warning(both):
    pipe, folder = both
    prompt = "a red star " * 40
    with warnings.catch_warnings(record=True, category=TruncatedPromptWarning) as caught:
        warnings.simplefilter("always")
        (found,) = open_release(folder).encoder()([prompt], Fraction(1))
    said = [str(warning.message).partition(":")[0] for warning in caught]
    assert said == [f"{name} reads at most {n} tokens" for name, n in (("clip_l", 77), ("clip_g", 77))]
    states, _, pooled, _ = pipe.encode_prompt([prompt], None, None, do_classifier_free_guidance=False)
    torch.testing.assert_close(found.hidden, states, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.pooled, pooled, atol=1e-6, rtol=1e-5)


def test_the_command_writes_the_picture_with_its_metadata(both, tmp_path, monkeypatch, capsys):
    pipe, folder = both
    monkeypatch.chdir(tmp_path)
    assert main([PROMPT, "--weights", str(folder), "--seed", "5", "--steps", "8", "--json"]) == 0
    (clip,) = json.loads(capsys.readouterr().out)["clips"]
    assert clip["path"] == "a-red-star-spinning-5.png"
    with Image.open(clip["path"]) as image:
        picture, info = np.asarray(image).astype(int), image.info
    assert np.abs(picture - 255 * theirs(pipe, output="np")[0]).max() <= 1
    expected = {"prompt": PROMPT, "seed": "5", "steps": "8", "guidance": "5.0", "solver": "euler",
                "schedule": "stable-diffusion-3", "shift": "3.0", "clip": "1x64x64@1",
                "release": "tiny-sd3"}  # fmt: skip
    assert expected.items() <= info.items()
    assert main([PROMPT, "--weights", str(folder), "--steps", "2", "--size", "48x72", "--out", "b.png"]) == 0
    with Image.open("b.png") as image:
        assert image.size == (48, 72)


def test_the_defaults_are_the_papers(whole):
    release = open_release(whole)
    assert isinstance(release, StableDiffusion)
    assert release.config.sampling == Sampling(
        guidance_scale=5.0, num_steps=50, schedule="stable-diffusion-3", shift=3.0, solver="euler"
    )
    assert str(release.bucket()) == "1x64x64@1"


def test_the_hash_knows_every_part(copy):
    before = open_release(copy).weights_hash
    for file in sorted(copy.glob("*/*.safetensors")):
        kept = file.read_bytes()
        file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert open_release(copy).weights_hash != before, file
        file.write_bytes(kept)
    assert open_release(copy).weights_hash == before


@pytest.mark.parametrize(
    "part",
    [
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "text_encoder_3/model.safetensors",
        "tokenizer_3/tokenizer_config.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_missing_part_is_named(copy, part, refused):
    (copy / part).unlink()
    error = refused(copy)
    assert f"{copy / part}: missing" in error
    assert ("to go without T5" in error) == part.startswith("text_encoder_3")


def _rewrite(file: Path, **changed) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


@pytest.mark.parametrize(
    ("file", "changed", "message"),
    [
        (
            "model_index.json",
            {"_class_name": "FluxPipeline"},
            "a FluxPipeline; give a StableDiffusion3Pipeline",
        ),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "without use_dynamic_shifting"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "FlowMatchEulerDiscrete"),
        ("transformer/config.json", {"joint_attention_dim": 48}, "text states 48 wide"),
        ("text_encoder/config.json", {"architectures": ["CLIPModel"]}, "holds a CLIPModel"),
    ],
)
def test_other_families_and_kinds_are_named(copy, file, changed, message, refused):
    _rewrite(copy / file, **changed)
    assert message in refused(copy, "--steps", "1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "16"], "frames: 16"),
        (["--fps", "16"], "fps: "),
        (["--size", "60"], "size: height 60; tiny-sd3 makes multiples of 8 up to 96"),
        (["--size", "104x64"], "size: width 104"),
        (["--lora", "somewhere"], "lora: "),
        (["--text-cache", "cache"], "text-cache: "),
    ],
)
def test_options_that_mean_nothing_to_it_are_refused(whole, options, message, refused):
    assert message in refused(whole, *options)


def test_folders_and_ids_that_are_none(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_release(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"kinoflow\.yaml: missing"):
        open_release(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        open_release(tmp_path)
