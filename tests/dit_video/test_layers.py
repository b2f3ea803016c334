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


def test_rms_norm_in_bf16_rounds_once() -> None:
    """Forward, and backward from the output that is kept; 2^-8 is one rounding, the rest is fp32's."""
    torch.manual_seed(0)
    x = (3 * torch.randn(64, 256)).bfloat16().requires_grad_()
    grad = torch.randn(64, 256).bfloat16()
    exact = reference.rms_norm(x.detach().double())
    y = RMSNorm(256, gain=False)(x)
    torch.testing.assert_close(y.double(), exact, rtol=2**-8 * 1.001, atol=0)
    y.backward(grad)
    inverse = (x.detach().double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    kept, given = y.detach().double(), grad.double()
    gradient = (given - kept * (given * kept).mean(-1, keepdim=True)) * inverse
    torch.testing.assert_close(x.grad.double(), gradient, rtol=2**-8 * 1.001, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 4, 8)])
def test_rms_norm_in_fp32_is_the_plain_sequence_of_passes(shape) -> None:
    """To the last bit, strided or not."""
    x, grad = torch.randn(shape).transpose(0, -2).requires_grad_(), torch.randn(shape).transpose(0, -2)
    norm = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)
    inverse = norm.square().div(shape[-1]).add(1e-6).rsqrt()
    y = RMSNorm(shape[-1], gain=False)(x)
    assert torch.equal(y, x * inverse)
    y.backward(grad)
    mean = torch.linalg.vecdot(grad, y.detach()).unsqueeze(-1) / shape[-1]
    assert torch.equal(x.grad, torch.addcmul(grad, y.detach(), mean, value=-1) * inverse)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_a_gain_leaves_the_dtype(weights, given) -> None:
    norm = RMSNorm(8).to(weights)
    torch.nn.init.ones_(norm.weight)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(torch.randn(3, 8, dtype=given))
    y.sum().backward()
    assert y.dtype == given and norm.weight.grad.dtype == weights


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_kernel_gets_one_dtype_under_autocast(weights) -> None:
    seen = []

    def kernel(*tensors):
        seen.append([tensor.dtype for tensor in tensors[:3]])
        return sdpa_attention(*tensors)

    layer = Block(16, 4, 24, True, kernel)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer = layer.to(weights)
    x, positions, modulation, states = (torch.randn(1, n, 16, dtype=weights) for n in (5, 5, 6, 3))
    with torch.autocast("cpu", torch.bfloat16):
        text = layer.cross_attention.keys_values(states)
        layer(x, positions, modulation, text, Layout(clips=None, text=torch.ones(1, 3, dtype=torch.bool)))
    assert seen == [[torch.bfloat16] * 3] * 2


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
    assert torch.equal(layer(x, positions, modulation, states, Layout(clips=None, text=mask)), fast)
    weight = torch.randn_like(fast)
    for one, other in zip(
        torch.autograd.grad((fast * weight).sum(), inputs),
        torch.autograd.grad((plain * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
