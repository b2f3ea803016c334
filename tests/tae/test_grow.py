"""A grown autoencoder is the old one until it is trained."""

from dataclasses import replace

import pytest
import torch

from kinoflow.tae.model.grow import Growth, grown
from tests.tae.toys import MINI, random_tae

EACH = [
    Growth(encoder_blocks=1),
    Growth(decoder_blocks=2),
    Growth(detail_channels=16),
    Growth(encoder_blocks=2, decoder_blocks=1, detail_channels=12, detail_blocks=1),
]


@pytest.mark.parametrize("growth", EACH, ids=str)
def test_what_has_grown_gives_what_the_old_one_gave_and_all_of_it_learns(growth):
    """The first step moves the zeros, the second what lies before them."""
    old = random_tae(MINI)
    new = grown(old, growth)
    clip = torch.rand(1, 3, 13, 16, 24, dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(new(clip).video, old(clip).video)
    torch.testing.assert_close(new.encode(clip).logvar, old.encode(clip).logvar)

    start = {name: value.detach().clone() for name, value in new.named_parameters()}
    optimizer = torch.optim.SGD(new.parameters(), lr=1e-3)
    noise = torch.randn(1, MINI.latent_channels, 2, 2, 3, dtype=torch.float64)
    for _ in range(2):
        optimizer.zero_grad()
        (new(clip, noise).video - 1).square().mean().backward()
        optimizer.step()
    still = [name for name, value in new.named_parameters() if torch.equal(value, start[name])]
    assert still == []


def test_no_growth_is_a_copy():
    old = random_tae(MINI)
    new = grown(old, Growth())
    assert new.config == MINI
    assert all(torch.equal(value, old.state_dict()[name]) for name, value in new.state_dict().items())


def test_what_cannot_grow_is_named():
    detailed = random_tae(replace(MINI, detail_channels=12))
    with pytest.raises(ValueError, match="has a detail level"):
        grown(detailed, Growth(detail_channels=12))
    with pytest.raises(ValueError, match="use 12 or more"):
        grown(random_tae(MINI), Growth(detail_channels=8))
    with pytest.raises(ValueError, match=r"grow\.decoder_blocks"):
        Growth(decoder_blocks=-1)
