"""The perceptual term on random weights of the file's layout, and what a wrong file says."""

from pathlib import Path

import pytest
import torch

from kinoflow.configs.errors import UserError
from kinoflow.tae.training.perceptual import _STAGES, PerceptualDistance, _pool


def random_file(path: Path) -> Path:
    """A file with the names and shapes of the package's, and positive heads."""
    generator = torch.Generator().manual_seed(0)
    stored, layer, width = {}, 0, 3
    for i, stage in enumerate(_STAGES):
        if i:
            stored[f"net.slice{i + 1}.{layer + 1}.filt"] = torch.ones(width, 1, 3, 3)
            layer += 2
        for out in stage:
            stored[f"net.slice{i + 1}.{layer}.weight"] = (
                torch.randn(out, width, 3, 3, generator=generator) / width
            )
            stored[f"net.slice{i + 1}.{layer}.bias"] = torch.zeros(out)
            layer, width = layer + 2, out
        stored[f"lin{i}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    stored |= {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    torch.save(stored, path)
    return path


@pytest.fixture(scope="module")
def distance(tmp_path_factory: pytest.TempPathFactory) -> PerceptualDistance:
    return PerceptualDistance.from_file(str(random_file(tmp_path_factory.mktemp("lpips") / "vgg.pth")))


def test_equal_clips_are_at_zero_and_noise_moves_them_apart(distance: PerceptualDistance) -> None:
    clip = torch.rand(1, 3, 2, 32, 32) * 2 - 1
    noise = torch.randn_like(clip)
    assert float(distance(clip, clip)) == 0
    near, far = (float(distance(clip + sigma * noise, clip)) for sigma in (0.05, 0.5))
    assert 0 < near < far


def test_gradient_reaches_the_video_and_neither_target_nor_trunk(distance: PerceptualDistance) -> None:
    clip, target = (torch.rand(1, 3, 1, 32, 32, requires_grad=True) for _ in range(2))
    distance(clip, target).backward()
    assert clip.grad is not None
    assert float(clip.grad.abs().sum()) > 0
    assert target.grad is None
    assert all(parameter.grad is None for parameter in distance.parameters())


def test_pooling_of_a_constant_is_the_constant_at_half_size() -> None:
    assert torch.allclose(_pool(torch.full((1, 2, 16, 16), 3.0)), torch.full((1, 2, 8, 8), 3.0))


def test_small_frames_and_wrong_files_are_named(distance: PerceptualDistance, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="32 pixels"):
        distance(torch.zeros(1, 3, 1, 16, 16), torch.zeros(1, 3, 1, 16, 16))
    with pytest.raises(UserError, match="nowhere"):
        PerceptualDistance.from_file(str(tmp_path / "nowhere.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match=r"text\.pth"):
        PerceptualDistance.from_file(str(tmp_path / "text.pth"))
