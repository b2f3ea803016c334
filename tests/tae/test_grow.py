"""A grown decoder is the old one until it is trained."""

from dataclasses import replace

import pytest
import torch

from tae.grow import Growth, grown
from tests.tae.toys import MINI, random_tae

EACH = [Growth(blocks=2), Growth(detail_channels=16), Growth(blocks=1, detail_channels=12, detail_blocks=1)]


@pytest.mark.parametrize("growth", EACH, ids=str)
def test_a_grown_decoder_gives_what_the_old_one_gave_and_all_of_it_learns(growth):
    """The first step moves the zeros, the second what lies before them."""
    old = random_tae(MINI)
    new = grown(old, growth)
    latent = torch.randn(1, MINI.latent_channels, 2, 2, 3, dtype=torch.float64)
    target = old.decode(latent, 13)
    torch.testing.assert_close(new.decode(latent, 13), target)
    assert torch.equal(new.encode(target).mean, old.encode(target).mean)

    start = {name: value.clone() for name, value in new.decoder.named_parameters()}
    optimizer = torch.optim.SGD(new.decoder.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        (new.decode(latent, 13) - 1).square().mean().backward()
        optimizer.step()
    still = [name for name, value in new.decoder.named_parameters() if torch.equal(value, start[name])]
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
    with pytest.raises(ValueError, match=r"grow\.blocks"):
        Growth(blocks=-1)
