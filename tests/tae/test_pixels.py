"""Bytes and model values."""

import torch

from kinoflow.tae.model.pixels import from_bytes, to_bytes


def test_every_byte_comes_back_and_channels_move() -> None:
    frames = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 2, 4, 32, 3)
    video = from_bytes(frames)
    assert video.shape == (1, 3, 2, 4, 32)
    assert float(video.min()) == -1
    assert float(video.max()) == 1
    assert torch.equal(video[0, 2, 1, 3, 7], frames[0, 1, 3, 7, 2] / 127.5 - 1)
    assert torch.equal(to_bytes(video), frames)


def test_values_outside_are_clamped() -> None:
    assert to_bytes(torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1, 1)).flatten().tolist() == [0, 128, 255]
