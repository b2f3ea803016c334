"""Position tables that grow between stages."""

from dataclasses import replace

import pytest
import torch

from kinoflow.dit_video import VideoDiT
from kinoflow.dit_video.layers import stretch
from tests.dit_video.test_model import CONFIG, build, latent, text


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_old_rows_are_kept_at_the_matching_places(factor) -> None:
    table = torch.randn(5, 3)
    assert torch.equal(stretch(table, 5 * factor)[::factor], table)


def test_a_single_frame_becomes_every_frame() -> None:
    table = torch.randn(1, 3)
    assert torch.equal(stretch(table, 32), table.expand(32, 3))


@pytest.mark.parametrize("length", [4, 5, 7, 13])
def test_a_line_stays_a_line_to_the_end(length) -> None:
    """Interpolation and what lies behind the last row, at whole and broken factors."""
    line = torch.arange(4.0, dtype=torch.float64)[:, None] * torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    expected = torch.arange(length, dtype=torch.float64)[:, None] * 4 / length * torch.tensor([[1.0, -2.0]])
    torch.testing.assert_close(stretch(line, length), expected.double())
    assert len(stretch(torch.randn(4, 2), length).unique(dim=0)) == length


def continued(before: VideoDiT, max_tokens: tuple[int, int, int]) -> VideoDiT:
    """The model of a later stage, from the weights of the one before."""
    model = VideoDiT(replace(before.config, max_tokens=max_tokens)).to(before.head.weight.dtype)
    state = before.state_dict()
    for name, parameter in model.named_parameters():
        model.continue_parameter(name, parameter, state[name])
    return model


def test_grown_positions_of_the_small_grid() -> None:
    """From 256 to 768 pixels and from images to clips: each old place, in every frame."""
    before = VideoDiT(replace(CONFIG, max_tokens=(1, 4, 5)))
    before.init_weights()
    small = before.positions(1, 4, 5).reshape(1, 4, 5, -1)
    after = continued(before, (32, 12, 15)).positions(32, 12, 15).reshape(32, 12, 15, -1)
    torch.testing.assert_close(after[:, ::3, ::3], small.expand(32, -1, -1, -1))


def test_a_grown_model_keeps_its_velocity_where_nothing_grew(tmp_path) -> None:
    """Longer time: an image sees what it saw; and the grown model is saved and read as such."""
    model, (x, time) = build(), latent()
    image = x[:, :, :1]
    grown = continued(model, (9, *CONFIG.max_tokens[1:]))
    torch.testing.assert_close(grown(image, time, text(2)), model(image, time, text(2)))
    grown.float().save_pretrained(tmp_path)
    again = VideoDiT.from_pretrained(tmp_path)
    assert again.config.max_tokens == (9, 4, 4)
    assert torch.equal(again.positions.time, grown.positions.time)
