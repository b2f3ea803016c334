"""Weights in 8 bits: within half a level of the real ones, and a layer that computes with them."""

import pytest
import torch
from torch import nn

from kinoflow.configs.errors import UserError
from kinoflow.dit_video.quantized import Int8Linear, computed_in, hold, quantize
from kinoflow.dit_video.unet import UNet, UNetConfig
from kinoflow.dit_video.video_dit import DiTConfig, VideoDiT


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_layer_is_the_linear_one_of_the_nearest_levels(bias, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(24, 10, bias=bias)
    with torch.no_grad():
        layer.weight[3] *= 100
        layer.weight[4] = 0
    held = Int8Linear(layer)
    weight = held.weight.double() * held.scale.double()[:, None]
    level = layer.weight.detach().double().abs().amax(1, keepdim=True) / 127
    assert ((weight - layer.weight.double()).abs() <= level * 0.5 * (1 + 1e-5)).all()
    assert held.weight.abs().amax(1).tolist() == [127, 127, 127, 127, 0, *[127] * 5]
    x = torch.randn(2, 5, 24, dtype=dtype)
    expected = x.double() @ weight.T + (layer.bias.double() if bias else 0)
    found = held(x)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol={2: 0.5, 4: 1e-4, 8: 1e-5}[dtype.itemsize]
    )


def model():
    torch.manual_seed(0)
    config = DiTConfig(
        width=32, depth=2, heads=2, ffn=48, latent_channels=4, text_widths=(8,), max_tokens=(4, 4, 4)
    )
    dit = VideoDiT(config)
    dit.init_weights()
    return dit.eval()


def test_every_layer_of_the_blocks_is_held_in_a_quarter_and_moves_like_any():
    plain, held = model(), quantize(model())
    linear = [name for name, layer in plain.blocks.named_modules() if type(layer) is nn.Linear]
    assert linear == [name for name, layer in held.blocks.named_modules() if isinstance(layer, Int8Linear)]
    everywhere = [layer for layer in held.modules() if isinstance(layer, Int8Linear)]
    assert len(everywhere) == len(linear)
    for name in linear:
        sizes = [model.blocks.get_submodule(name).weight.nbytes for model in (held, plain)]
        assert 4 * sizes[0] == sizes[1]
    held = held.to(torch.bfloat16)
    assert {layer.weight.dtype for layer in held.modules() if isinstance(layer, Int8Linear)} == {torch.int8}
    assert {parameter.dtype for parameter in held.parameters()} == {torch.bfloat16}


def test_what_a_device_computes_in():
    assert computed_in(torch.int8, "cpu") == torch.float32
    assert computed_in(torch.int8, "meta") == torch.bfloat16
    assert computed_in(torch.float16, "meta") == torch.float16
    held = hold(model(), "meta", torch.int8)
    assert {parameter.dtype for parameter in held.parameters()} == {torch.bfloat16}
    assert next(hold(model()).parameters()).dtype == torch.float32


def test_a_unet_is_refused():
    with pytest.raises(UserError, match="dtype: int8 is for transformers"):
        quantize(UNet(UNetConfig(channels=(8, 16), classes=2, text_widths=(), width=8)))
