"""The counted context against a model: what lies outside changes nothing, what lies at its edge does."""

import pytest
import torch
from torch import Tensor

from kinoflow.tae import TAEConfig
from kinoflow.tae.tiles.context import Halo, context, exact_in_space
from tests.tae.toys import CONFIGS, MINI, random_tae


def touched(change: Tensor, axis: int) -> tuple[int, int]:
    """First and last position along an axis of b c t h w where something is not zero."""
    others = [dim for dim in range(5) if dim != axis + 2]
    positions = change.abs().amax(dim=others).nonzero().flatten().tolist()
    return positions[0], positions[-1]


def cells(axis: int, needed: Halo) -> list[int]:
    """A latent grid of 3 cells, but along `axis` long enough for a cell with all of its halo."""
    sides = [2, 2, 2]
    sides[axis] = needed.before + needed.after + 3
    return sides


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_encoder_context_is_what_gradients_reach(name, axis):
    model, needed = random_tae(CONFIGS[name]), context(CONFIGS[name]).encoder[axis]
    factors = model.config.factors
    sides = cells(axis, needed)
    video = torch.randn(1, 3, *(s * f for s, f in zip(sides, factors, strict=True)), dtype=torch.float64)
    video.requires_grad_()
    position = needed.before + 1
    model.encode(video).mean.select(axis + 2, position).square().sum().backward()
    assert video.grad is not None
    first, last = touched(video.grad, axis)
    assert position - first // factors[axis] == needed.before
    assert last // factors[axis] - position == needed.after


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoder_context_is_what_gradients_reach(name, axis):
    model, needed = random_tae(CONFIGS[name]), context(CONFIGS[name]).decoder[axis]
    factor, sides = model.config.factors[axis], cells(axis, needed)
    latent = torch.randn(1, model.config.latent_channels, *sides, dtype=torch.float64, requires_grad=True)
    position = needed.before + 1
    pixels = model.decode(latent, sides[0] * model.config.factors[0])
    pixels.narrow(axis + 2, position * factor, factor).square().sum().backward()
    assert latent.grad is not None
    assert touched(latent.grad, axis) == (position - needed.before, position + needed.after)


def test_the_movie_gen_layout_sees_far():
    """Counted by hand."""
    reach = context(TAEConfig())
    # Decoder, in latent frames: 1 + 4 + 6, (1 + 6) / 2, (1 + 6) / 4, (1 + 6 + 1) / 8 = 17.25.
    assert reach.decoder[0] == Halo(before=18, after=18)
    # Encoder, in frames: 1 + 4 + 1, (4 + 1) * 2, (4 + 1) * 4, (4 + 4 + 1) * 8 = 108; a latent has 8 of them.
    assert reach.encoder[0] == Halo(before=14, after=13)


@pytest.mark.parametrize(
    ("norm", "attention", "exact"),
    [("rms", False, True), ("group", False, False), ("rms", True, False), ("group", True, False)],
)
def test_what_can_be_exact_in_space(norm, attention, exact):
    assert exact_in_space(TAEConfig(norm=norm, attention=attention)) == exact


def test_a_limit_cuts_only_what_is_longer():
    reach = context(MINI)
    assert reach.limited(99, 99) == reach
    assert reach.limited(1, 99).encoder[0] == Halo(before=1, after=1)
    assert reach.limited(1, 99).encoder[1:] == reach.encoder[1:]
    assert reach.limited(99, 1).decoder == (reach.decoder[0], *[Halo(before=1, after=1)] * 2)


def test_a_negative_halo_is_refused():
    with pytest.raises(ValueError, match="halo: -1 before"):
        Halo(before=-1, after=0)
