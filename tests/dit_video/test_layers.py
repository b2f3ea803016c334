"""The layers against plain twins, in float64, and the fast norm in every dtype."""

import pytest
import torch

from kinoflow.dit_video.attention.kernels import sdpa_attention
from kinoflow.dit_video.layers import Block, Layout, RMSNorm
from tests import reference


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 4, 8)])
def test_rms_norm_equals_its_formula(gain, shape) -> None:
    norm = RMSNorm(shape[-1], gain=gain).double()
    if norm.weight is not None:
        torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64)
    inputs = [x, *norm.parameters()]
    for result, expected in zip(
        (norm(x), *torch.autograd.grad((norm(x) * weight).sum(), inputs)),
        (
            reference.rms_norm(x, norm.weight),
            *torch.autograd.grad((reference.rms_norm(x, norm.weight) * weight).sum(), inputs),
        ),
        strict=True,
    ):
        torch.testing.assert_close(result, expected)
    assert torch.autograd.gradcheck(norm, (x,))


def test_rms_norm_of_zeros_and_of_strided_input() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    RMSNorm(8, gain=False)(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    wide = torch.randn(3, 5, 16)
    torch.testing.assert_close(RMSNorm(8, gain=False)(wide[..., 8:]), reference.rms_norm(wide[..., 8:]))


def test_rms_norm_in_bf16_is_within_its_grain() -> None:
    x = torch.randn(64, 256).bfloat16()
    exact = reference.rms_norm(x.double())
    error = (RMSNorm(256, gain=False)(x).double() - exact).abs() / exact.abs().clamp(min=1e-2)
    assert error.max() <= 3 * 2**-8


def test_a_block_equals_its_formulas() -> None:
    torch.manual_seed(3)
    layer = Block(16, 4, 24, True, sdpa_attention).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x, positions = (torch.randn(n, 6, 16, dtype=torch.float64, requires_grad=True) for n in (2, 1))
    modulation = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    states = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 5, [True, True, False, False, True]])
    inputs = [x, positions, modulation, states, *layer.parameters()]
    fast = layer(
        x,
        positions,
        modulation,
        layer.cross_attention.keys_values(states),
        Layout(clips=None, text=mask),
    )
    plain = reference.block(layer, x, positions, modulation, states=states, mask=mask)
    torch.testing.assert_close(fast, plain)
    weight = torch.randn_like(fast)
    for one, other in zip(
        torch.autograd.grad((fast * weight).sum(), inputs),
        torch.autograd.grad((plain * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
