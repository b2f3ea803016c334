"""The U-Net against a plain loop over its parts, and its starting values."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.conditioning.labels import Labels
from kinoflow.configs.errors import UserError
from kinoflow.dit_video.layers import sinusoids
from kinoflow.dit_video.unet import UNet, UNetConfig
from tests.reference import attend
from tests.shaken import shake

CONFIG = UNetConfig(
    latent_channels=2, channels=(8, 12, 16), layers=2, width=10, classes=3, attention_levels=(1, 2), heads=2,
    groups=2, attention="math",
)  # fmt: skip
OF_TEXT = replace(CONFIG, classes=0, text_widths=(6, 5))


def build(config: UNetConfig = CONFIG, *, trained: bool = True) -> UNet:
    """A model in float64; `trained` shakes what starts at zero so that every path carries signal."""
    torch.manual_seed(0)
    model = UNet(config)
    model.init_weights()
    return (shake(model) if trained else model).double()


def latent(batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 2, 1, 8, 12, generator=generator, dtype=torch.float64)
    return x, torch.rand(batch, generator=generator, dtype=torch.float64)


def labels(*index: int) -> Labels:
    return Labels(index=torch.tensor(index), classes=3)


def text(batch: int = 3, seed: int = 1) -> tuple[TextEmbedding, ...]:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.tensor([[True] * 4, [True, False, False, False], [True, True, True, False]])[:batch]
    return tuple(
        TextEmbedding(
            hidden=torch.randn(batch, 4, width, generator=generator, dtype=torch.float64), mask=masks
        )
        for width in OF_TEXT.text_widths
    )


# ------------------------------------------------------------- the twin: figure 3 of the notes, step by step


def group_norm(x: Tensor, norm: torch.nn.GroupNorm) -> Tensor:
    grouped = x.unflatten(1, (norm.num_groups, -1)).flatten(2)
    centred = grouped - grouped.mean(2, keepdim=True)
    normal = (centred / (centred.square().mean(2, keepdim=True) + norm.eps).sqrt()).reshape(x.shape)
    return normal * norm.weight[:, None, None] + norm.bias[:, None, None]


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def mlp(x: Tensor, layers: torch.nn.Sequential) -> Tensor:
    return silu(x @ layers[0].weight.T + layers[0].bias) @ layers[2].weight.T + layers[2].bias


def conv(x: Tensor, layer: torch.nn.Conv2d, stride: int = 1) -> Tensor:
    """A 3 x 3 convolution as the sum over its nine taps."""
    padded, (rows, columns) = F.pad(x, (1, 1, 1, 1)), x.shape[2:]
    taps = (
        torch.einsum("bihw,oi->bohw", padded[:, :, i : i + rows, j : j + columns], layer.weight[:, :, i, j])
        for i in range(3)
        for j in range(3)
    )
    return (sum(taps) + layer.bias[:, None, None])[:, :, ::stride, ::stride]


def residual(x: Tensor, layer, time: Tensor, vector: Tensor | None) -> Tensor:
    h = conv(silu(group_norm(x, layer.norm1)), layer.conv1)
    h = h + mlp(time, layer.time)[:, :, None, None]
    if vector is not None:
        h = h + mlp(vector, layer.label)[:, :, None, None]
    return x + conv(silu(group_norm(h, layer.norm2)), layer.conv2)


def attention(x: Tensor, layer, states: Tensor | None, mask: Tensor | None) -> Tensor:
    def cells(norm):
        return group_norm(x, norm).flatten(2).transpose(1, 2)

    own = layer.attention
    q, k, v = (cells(layer.norm) @ weight.T for weight in own.qkv.weight.chunk(3))
    x = x + (attend(q, k, v, own) @ own.out.weight.T).transpose(1, 2).unflatten(2, x.shape[2:])
    if states is None:
        return x
    cross = layer.cross_attention
    k, v = (states @ weight.T for weight in cross.key_value.weight.chunk(2))
    answered = attend(cells(layer.cross_norm) @ cross.query.weight.T, k, v, cross, mask)
    return x + (answered @ cross.out.weight.T).transpose(1, 2).unflatten(2, x.shape[2:])


def level(x: Tensor, one, *told) -> Tensor:
    time, vector, states, mask = told
    for i, layer in enumerate(one.layers):
        x = residual(x, layer, time, vector)
        if len(one.attentions):
            x = attention(x, one.attentions[i], states, mask)
    return x


def twin(model: UNet, x: Tensor, time: Tensor, condition) -> Tensor:
    vector = states = mask = None
    if isinstance(condition, Labels):
        vector = model.label.weight[condition.index]
    else:
        states = torch.cat([layer(e.hidden) for layer, e in zip(model.text, condition, strict=True)], dim=1)
        mask = torch.cat([e.mask for e in condition], dim=1)
    told = sinusoids(time, model.config.width).double(), vector, states, mask
    x, across = conv(x[:, :, 0], model.input), []
    for encoder, down in zip(model.encoders, model.down, strict=True):
        across.insert(0, level(x, encoder, *told))
        x = conv(across[0], down, stride=2)
    x = level(x, model.midcoder, *told)
    for decoder, up, skipped in zip(model.decoders, model.up, across, strict=True):
        grown = conv(x, up).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        x = level(grown + skipped, decoder, *told)
    return conv(silu(group_norm(x, model.head_norm)), model.head)[:, :, None]


@pytest.mark.parametrize("config", [CONFIG, OF_TEXT], ids=["labels", "text"])
def test_it_is_the_notes_loop_in_values_and_gradients(config: UNetConfig) -> None:
    model, (x, time) = build(config), latent()
    told = labels(1, 3, 0) if config.classes else text()
    both = [model(x, time, told), twin(model, x, time, told)]
    torch.testing.assert_close(*both)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradients = [torch.autograd.grad((out * weight).sum(), [*model.parameters()]) for out in both]
    for name, one, other in zip(dict(model.named_parameters()), *gradients, strict=True):
        torch.testing.assert_close(one, other, msg=name)
        assert one.abs().max() > 1e-6, f"{name} has no part in it"


def test_sdpa_equals_math() -> None:
    x, time = latent()
    twins = [build(replace(OF_TEXT, attention=kernel)) for kernel in ("math", "sdpa")]
    outputs = [model(x, time, text()) for model in twins]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for (name, one), other in zip(twins[0].named_parameters(), twins[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_velocity_starts_at_zero_and_every_layer_as_the_identity() -> None:
    model, (x, time) = build(trained=False), latent()
    assert torch.equal(model(x, time, labels(0, 1, 2)), torch.zeros_like(x))
    seen = {}
    model.midcoder.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output))
    model(x, time, labels(0, 1, 2))
    assert torch.equal(seen["x"], seen["y"])
    assert seen["x"].abs().max() > 0.1


def test_starting_values_follow_from_seed_and_name() -> None:
    model = build(trained=False)
    alone = torch.empty_like(model.encoders[0].layers[0].conv1.weight, dtype=torch.float32)
    torch.manual_seed(0)
    model.init_parameter("encoders.0.layers.0.conv1.weight", alone)
    assert torch.equal(alone.double(), model.encoders[0].layers[0].conv1.weight)
    assert not torch.equal(model.encoders[0].layers[1].conv1.weight, alone.double())
    assert float(alone.std()) == pytest.approx((8 * 9) ** -0.5, rel=0.1)
    table = build(UNetConfig(classes=400), trained=False).label.weight.detach()
    assert float(table.std()) == pytest.approx(1, abs=0.02)


def test_label_and_time_reach_the_output_and_no_class_is_one_of_its_own() -> None:
    model, (x, time) = build(), latent()
    reference = model(x, time, labels(0, 1, 2))
    other = model(x, time, labels(0, 3, 2))
    assert torch.equal(other[[0, 2]], reference[[0, 2]])
    assert not torch.allclose(other[1], reference[1])
    assert not torch.allclose(model(x, 1 - time, labels(0, 1, 2)), reference)


@pytest.mark.parametrize("config", [CONFIG, OF_TEXT], ids=["labels", "text"])
def test_a_condition_is_encoded_once_to_the_same_effect(config: UNetConfig) -> None:
    model, (x, time) = build(config), latent()
    told = labels(1, 3, 0) if config.classes else text()
    assert torch.equal(model(x, time, model.encode_condition(told)), model(x, time, told))


def test_padding_of_the_text_changes_nothing() -> None:
    model, (x, time) = build(OF_TEXT), latent()
    padded = tuple(
        TextEmbedding(
            hidden=F.pad(e.hidden, (0, 0, 0, 2), value=7.0), mask=F.pad(e.mask, (0, 2), value=False)
        )
        for e in text()
    )
    torch.testing.assert_close(model(x, time, padded), model(x, time, text()))


def test_meta_build_and_reload(tmp_path) -> None:
    with torch.device("meta"):
        meta = UNet(CONFIG)
    assert all(p.is_meta for p in meta.parameters())
    assert meta(latent()[0].float().to("meta"), torch.empty(3, device="meta"), meta_labels()).shape == (
        3,
        2,
        1,
        8,
        12,
    )
    model, (x, time) = build().float(), latent()
    model.save_pretrained(tmp_path)
    again = UNet.from_pretrained(tmp_path)
    assert not again.training and again.config == CONFIG
    told = labels(0, 1, 3)
    assert torch.equal(again(x.float(), time.float(), told), model(x.float(), time.float(), told))


def meta_labels() -> Labels:
    return Labels(index=torch.empty(3, dtype=torch.int64, device="meta"), classes=3)


def test_what_it_cannot_take_is_named() -> None:
    model, (x, time) = build(), latent()
    with pytest.raises(ValueError, match="latent height: 6 is no multiple of 4"):
        model(x[..., :6, :], time, labels(0, 1, 2))
    with pytest.raises(ValueError, match="latent frames: a U-Net takes pictures, 1 frame, not 2"):
        model(x.expand(-1, -1, 2, -1, -1), time, labels(0, 1, 2))
    with pytest.raises(ValueError, match="text: 2 embeddings for 0 encoders"):
        model(x, time, text())
    with pytest.raises(ValueError, match="condition: labels, and this U-Net takes text"):
        build(OF_TEXT)(x, time, labels(0, 1, 2))
    with pytest.raises(UserError, match="label: 4 is no class"):
        model(x, time, labels(0, 4, 2))
    with pytest.raises(ValueError, match="of 9 classes, and the model has 3"):
        model(x, time, Labels(index=torch.tensor([0, 1, 2]), classes=9))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"channels": ()}, "unet: channels, layers"),
        ({"layers": 0}, "unet: channels, layers"),
        ({"width": 7}, r"unet\.width: 7 is no even number"),
        ({"groups": 5}, r"unet\.groups: 5 groups do not divide 8 channels"),
        ({"attention_levels": (3,)}, r"unet\.attention_levels: 3 is no level of 0\.\.2"),
        ({"heads": 5}, r"unet\.heads: 5 heads do not divide the 12 channels of level 1"),
        ({"classes": 0}, r"unet\.classes: a U-Net takes labels or text"),
        ({"text_widths": (4,)}, r"unet\.classes: a U-Net takes labels or text"),
        (
            {"classes": 0, "text_widths": (4,), "attention_levels": ()},
            r"unet\.attention_levels: attention reads",
        ),
    ],
)
def test_shapes_that_cannot_be_name_their_key(changes, said) -> None:
    with pytest.raises(ValueError, match=said):
        replace(CONFIG, **changes)
