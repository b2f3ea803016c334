"""Inflation: a one-frame clip goes through the temporal autoencoder as the picture through diffusers' one."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import load
from kinoflow.tae.__main__ import main
from kinoflow.tae.model.inflate import OLD_NAMES, inflate
from kinoflow.tae.model.tae import TAE
from kinoflow.train.run.config import RunConfig

LEVELS = 3
STABLE_DIFFUSION = {"latent_channels": 4, "scaling_factor": 0.18215}
FLUX = {
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def image_autoencoder(layout: dict[str, object], folder: Path) -> AutoencoderKL:
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
        **layout,
    )
    for parameter in model.parameters():  # norms and biases start at one and zero, where errors hide
        torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else parameter.data.add_(
            0.3 * torch.randn_like(parameter)
        )
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("layout", [STABLE_DIFFUSION, FLUX], ids=["sd", "flux"])
@torch.no_grad()
def test_one_frame_is_treated_as_the_picture(layout: dict[str, object], tmp_path: Path) -> None:
    image, tae = image_autoencoder(layout, tmp_path), inflate(tmp_path)
    picture = torch.rand(2, 3, 16, 24) * 2 - 1
    theirs = image.encode(picture).latent_dist
    ours = tae.encode(picture[:, :, None])
    torch.testing.assert_close(ours.mean[:, :, 0], theirs.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.logvar[:, :, 0], theirs.logvar, atol=1e-4, rtol=1e-4)
    latent = torch.randn_like(theirs.mean)
    decoded = tae.decode(latent[:, :, None], 1)[:, :, 0]
    torch.testing.assert_close(decoded, image.decode(latent).sample, atol=1e-4, rtol=1e-4)
    seen = (latent - layout.get("shift_factor", 0.0)) * layout["scaling_factor"]
    torch.testing.assert_close(tae.normalize(latent[:, :, None])[:, :, 0], seen)


@torch.no_grad()
def test_every_frame_of_a_still_clip_is_the_picture(tmp_path: Path) -> None:
    image, tae = image_autoencoder(FLUX, tmp_path), inflate(tmp_path)
    picture = torch.rand(1, 3, 16, 16) * 2 - 1
    means = tae.encode(picture[:, :, None].expand(-1, -1, 9, -1, -1)).mean
    expected = image.encode(picture).latent_dist.mean[:, :, None].expand_as(means)
    torch.testing.assert_close(means, expected, atol=1e-4, rtol=1e-4)


def test_the_names_of_older_weights_are_known(tmp_path: Path) -> None:
    image_autoencoder(STABLE_DIFFUSION, tmp_path)
    expected = inflate(tmp_path).state_dict()
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for old, new in OLD_NAMES.items():
        names = [name for name in state if f".attentions.0.{new}." in name]
        assert names
        for name in names:
            tensor = state.pop(name)
            tensor = tensor[..., None, None].contiguous() if tensor.ndim > 1 else tensor
            state[name.replace(f".{new}.", f".{old}.")] = tensor
    save_file(state, file)
    for name, tensor in inflate(tmp_path).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_command_writes_what_training_starts_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image_autoencoder(FLUX, tmp_path / "image")
    assert main(["inflate", str(tmp_path / "image"), str(tmp_path / "start"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    model = TAE.from_pretrained(tmp_path / "start" / "tae")
    run = load(RunConfig, [str(tmp_path / "start" / "tae.yaml")])
    assert (run.model, run.tae) == ("tae", model.config)
    assert figures["parameters"] == sum(p.numel() for p in model.parameters())
    for name, tensor in inflate(tmp_path / "image").state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("act_fn", "gelu", "act_fn"),
        ("norm_num_groups", 16, "norm_num_groups"),
        ("down_block_types", ["AttnDownEncoderBlock2D"] * LEVELS, "down_block_types"),
        ("block_out_channels", [32, 48, 64], "block_out_channels"),
        ("_class_name", "AutoencoderTiny", "_class_name"),
        ("latent_channels", 8, "decoder.conv_in"),
    ],
)
def test_what_cannot_be_inflated_is_named(key: str, value: object, message: str, tmp_path: Path) -> None:
    image_autoencoder(FLUX, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=message):
        inflate(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    image_autoencoder(FLUX, tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="diffusion_pytorch_model"):
        inflate(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        inflate(tmp_path / "nothing")
