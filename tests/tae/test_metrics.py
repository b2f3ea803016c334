"""PSNR and SSIM against closed forms and torchmetrics; the seam measure on made-up borders."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from kinoflow.tae.codec.metrics import MAX_PSNR, QualityMeter, psnr, ssim


def pictures(frames: int = 3, height: int = 24, width: int = 31, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(frames, 3, height, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("offset", "decibel"), [(0.1, 20.0), (0.01, 40.0), (1.0, 0.0)])
def test_psnr_of_a_constant_offset(offset, decibel):
    source = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    values = psnr(source + offset, source)
    torch.testing.assert_close(values, torch.full((2,), decibel, dtype=torch.float64))


def test_psnr_is_per_frame_and_finite():
    source = pictures()
    other = source.clone()
    other[1] = 1 - other[1]
    values = psnr(other, source)
    assert values[0] == values[2] == pytest.approx(MAX_PSNR)
    assert values[1] < 20


@pytest.mark.parametrize(("height", "width"), [(24, 31), (6, 11), (64, 12)])
def test_ssim_equals_torchmetrics(height, width):
    source = pictures(4, height, width)
    noisy = (source + 0.2 * pictures(4, height, width, seed=1)).clamp(0, 1)
    expected = structural_similarity_index_measure(noisy, source, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(noisy, source), expected, rtol=1e-9, atol=1e-12)


def test_ssim_of_constant_pictures():
    """Without variance only the luminance term is left (eq. 6 of the paper)."""
    x, y, c1 = 0.3, 0.5, 0.01**2
    shape = (1, 3, 16, 16)
    value = ssim(torch.full(shape, x, dtype=torch.float64), torch.full(shape, y, dtype=torch.float64))
    assert value.item() == pytest.approx((2 * x * y + c1) / (x * x + y * y + c1))


@pytest.mark.parametrize("side", [1, 2, 5, 10])
def test_ssim_of_tiny_pictures(side):
    source = pictures(1, side, side)
    assert ssim(source, source).item() == pytest.approx(1)
    assert ssim(1 - source, source).item() < 1


def clip(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 16, 20, 3), np.uint8)


def test_meter_does_not_depend_on_chunks():
    source, restored = clip(37), clip(37, seed=1)
    whole, parts = QualityMeter(16), QualityMeter(16)
    whole.update(restored, source)
    for start in range(0, 37, 5):
        parts.update(restored[start : start + 5], source[start : start + 5])
    assert whole.result() == parts.result()


def test_meter_means_are_means_over_frames():
    source, restored = clip(5), clip(5, seed=1)
    meter = QualityMeter(4)
    meter.update(restored, source)
    quality = meter.result()
    as_pictures = [torch.from_numpy(c).permute(0, 3, 1, 2) / 255 for c in (restored, source)]
    assert quality.psnr_by_frame == pytest.approx(psnr(*as_pictures).tolist(), rel=1e-5)
    assert quality.psnr == pytest.approx(math.fsum(quality.psnr_by_frame) / 5)
    assert quality.ssim == pytest.approx(ssim(*as_pictures).mean().item(), rel=1e-5)


def test_seam_sees_a_step_at_tile_borders_only():
    """The error moves by 1 level a frame, and by 5 where a tile of 8 begins."""
    levels = np.cumsum([0] + [5 if frame % 8 == 0 else 1 for frame in range(1, 32)])
    source = np.zeros((32, 4, 4, 3), np.uint8)
    meter = QualityMeter(8)
    meter.update(source + levels[:, None, None, None].astype(np.uint8), source)
    assert meter.result().seam == pytest.approx(5)


def test_seam_does_not_see_motion_of_the_clip():
    """What moves in the source and the reconstruction alike is no seam."""
    moving, error = clip(32) // 2, np.arange(32, dtype=np.uint8)[:, None, None, None]
    meter = QualityMeter(8)
    meter.update(moving + error, moving)
    assert meter.result().seam == pytest.approx(1)


def test_no_seam_in_one_tile():
    meter = QualityMeter(32)
    meter.update(clip(32), clip(32, seed=1))
    assert meter.result().seam is None


def test_nothing_measured():
    with pytest.raises(ValueError, match="no frame"):
        QualityMeter(32).result()
