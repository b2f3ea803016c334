"""The backbone against plain twins, and its starting values."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.conditioning.labels import Labels
from kinoflow.dit_video import DiTConfig, VideoDiT
from kinoflow.dit_video.attention.kernels import math_attention, sdpa_attention
from kinoflow.dit_video.flow.matching import velocity_from_data
from kinoflow.dit_video.flow.paths import SIGMA_MIN
from kinoflow.dit_video.layers import FactorizedPositions, SwiGLU
from tests.shaken import shake

CONFIG = DiTConfig(
    width=32,
    depth=2,
    heads=4,
    ffn=48,
    latent_channels=4,
    text_widths=(6, 5),
    max_tokens=(3, 4, 4),
    attention="math",
)


def build(config: DiTConfig = CONFIG, *, trained: bool = True) -> VideoDiT:
    """A model in float64; `trained` shakes the zero-initialized parts so that every path carries signal."""
    torch.manual_seed(0)
    model = VideoDiT(config)
    model.init_weights()
    return (shake(model) if trained else model).double()


def text(batch: int, lengths: tuple[int, int] = (5, 3), seed: int = 1) -> tuple[TextEmbedding, ...]:
    generator = torch.Generator().manual_seed(seed)
    widths = CONFIG.text_widths
    return tuple(
        TextEmbedding(
            hidden=torch.randn(batch, length, width, generator=generator, dtype=torch.float64),
            mask=torch.ones(batch, length, dtype=torch.bool),
        )
        for length, width in zip(lengths, widths, strict=True)
    )


def latent(batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 4, 2, 6, 8, generator=generator, dtype=torch.float64)
    return x, torch.rand(batch, generator=generator, dtype=torch.float64)


def test_velocity_has_the_latent_shape_and_starts_at_zero() -> None:
    x, time = latent()
    velocity = build(trained=False)(x, time, text(2))
    assert velocity.shape == x.shape
    assert torch.equal(velocity, torch.zeros_like(velocity))


def test_patches_equal_a_strided_convolution() -> None:
    """The embedding is the convolution of the paper, kernel = stride = (1, 2, 2), then flattened."""
    model, (x, _) = build(), latent()
    weight = model.embed.weight.unflatten(1, (4, 1, 2, 2))
    expected = (
        torch.nn.functional.conv3d(x, weight, model.embed.bias, stride=(1, 2, 2)).flatten(2).transpose(1, 2)
    )
    torch.testing.assert_close(model.embed(model._patchify(x)), expected)
    torch.testing.assert_close(model._unpatchify(model._patchify(x), 2, 3, 4), x)


def test_sdpa_equals_math_in_values_and_gradients() -> None:
    x, time = latent()
    twins = [build(replace(CONFIG, attention=kernel)) for kernel in ("math", "sdpa")]
    masked = tuple(TextEmbedding(hidden=e.hidden, mask=torch.rand(e.mask.shape) > 0.3) for e in text(2))
    masked[0].mask[:, 0] = True
    outputs = [model(x, time, masked) for model in twins]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for (name, one), other in zip(twins[0].named_parameters(), twins[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


@pytest.mark.parametrize("kernel", [math_attention, sdpa_attention])
def test_kernels_equal_a_loop(kernel) -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True, False], [True] * 5])
    attended = kernel(q, k, v, mask)
    for b in range(2):
        for n in range(2):
            keys, values = k[b, n][mask[b]], v[b, n][mask[b]]
            expected = torch.stack([((row @ keys.T) / 2).softmax(0) @ values for row in q[b, n]])
            torch.testing.assert_close(attended[b, n], expected)


def test_padding_of_the_text_changes_nothing() -> None:
    model, (x, time) = build(), latent()
    plain = text(2)
    padded = tuple(
        TextEmbedding(
            hidden=torch.nn.functional.pad(e.hidden, (0, 0, 0, 4), value=7.0),
            mask=torch.nn.functional.pad(e.mask, (0, 4), value=False),
        )
        for e in plain
    )
    torch.testing.assert_close(model(x, time, padded), model(x, time, plain))


def test_text_context_is_computed_once_to_the_same_effect() -> None:
    model, (x, time) = build(), latent()
    torch.testing.assert_close(
        model(x, time, model.encode_condition(text(2))), model(x, time, text(2)), rtol=0, atol=0
    )


def test_text_and_time_reach_the_output() -> None:
    model, (x, time) = build(), latent()
    reference = model(x, time, text(2))
    assert not torch.allclose(model(x, time, text(2, seed=9)), reference)
    assert not torch.allclose(model(x, 1 - time, text(2)), reference)


def test_positions_are_factorized_and_bounded() -> None:
    positions = FactorizedPositions(8, (3, 4, 5))
    for table in positions.parameters():
        torch.nn.init.normal_(table)
    grid = positions(2, 3, 4).reshape(2, 3, 4, 8)
    torch.testing.assert_close(grid[1, 2, 3], positions.time[1] + positions.height[2] + positions.width[3])
    with pytest.raises(ValueError, match="height"):
        positions(1, 5, 1)


def test_positions_enter_every_layer() -> None:
    """With all branches closed the trunk adds them depth times."""
    model = build(trained=False)
    seen = {}
    model.head_norm.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    x, time = latent()
    model(x, time, text(2))
    expected = model.embed(model._patchify(x)) + CONFIG.depth * model.positions(2, 3, 4)
    torch.testing.assert_close(seen["x"], expected)


def test_swiglu_is_its_formula() -> None:
    layer = SwiGLU(6, 10).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    gate, up = layer.gate_up.weight[:10], layer.gate_up.weight[10:]
    expected = (x @ gate.T * torch.sigmoid(x @ gate.T) * (x @ up.T)) @ layer.out.weight.T
    torch.testing.assert_close(layer(x), expected)


def test_meta_build_and_reload(tmp_path) -> None:
    with torch.device("meta"):
        meta = VideoDiT(CONFIG)
    assert all(p.is_meta for p in meta.parameters())
    model = build().float()
    model.save_pretrained(tmp_path)
    again = VideoDiT.from_pretrained(tmp_path)
    x, time = latent()
    embeddings = tuple(TextEmbedding(hidden=e.hidden.float(), mask=e.mask) for e in text(2))
    assert torch.equal(again(x.float(), time.float(), embeddings), model(x.float(), time.float(), embeddings))


def test_wrong_sizes_are_named() -> None:
    model, (x, time) = build(), latent()
    with pytest.raises(ValueError, match="latent height"):
        model(x[..., :5, :], time, text(2))
    with pytest.raises(ValueError, match="1 embeddings for 2 encoders"):
        model(x, time, text(2)[:1])
    with pytest.raises(ValueError, match=r"dit\.heads"):
        DiTConfig(width=30, heads=4)


def test_a_head_that_gives_the_data_moves_towards_it() -> None:
    """x + (1 − (1 − σ) t) u is what the head says: the same weights as data and as velocity."""
    x, time = latent()
    time = 0.9 * time
    predicted = build()(x, time, text(2))  # read as data
    velocity = build(replace(CONFIG, predicts="data"))(x, time, text(2))
    t = time[:, None, None, None, None]
    end = (1 - SIGMA_MIN) * x + (1 - (1 - SIGMA_MIN) * t) * velocity
    torch.testing.assert_close(end, predicted)


OF_LABELS = replace(CONFIG, classes=3, text_widths=())


def test_a_model_of_labels_adds_them_to_the_time_and_has_no_cross_attention() -> None:
    """As a model of text whose cross-attention is shut, with the label in its embedding of the time."""
    model, (x, time) = build(OF_LABELS), latent()
    told = Labels(index=torch.tensor([1, 3]), classes=3)
    assert not any("cross" in name for name in model.state_dict())
    of_text = build()
    own = of_text.state_dict()
    of_text.load_state_dict({**own, **{k: v for k, v in model.state_dict().items() if k in own}})
    for block in of_text.blocks:
        torch.nn.init.zeros_(block.cross_attention.out.weight)
    of_text.time.register_forward_hook(lambda _, __, output: output + model.label(told))
    torch.testing.assert_close(model(x, time, told), of_text(x, time, text(2)))
    assert torch.equal(model(x, time, model.encode_condition(told)), model(x, time, told))
    other = model(x, time, Labels(index=torch.tensor([1, 0]), classes=3))
    assert torch.equal(other[0], model(x, time, told)[0])
    assert not torch.allclose(other[1], model(x, time, told)[1])


def test_every_weight_of_a_model_of_labels_is_trained() -> None:
    model, (x, time) = build(OF_LABELS), latent()
    model(x, time, Labels(index=torch.tensor([1, 3]), classes=3)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_labels_and_text_are_not_mixed_up() -> None:
    x, time = latent()
    with pytest.raises(ValueError, match="condition: labels, and this DiT takes text"):
        build()(x, time, Labels(index=torch.tensor([1, 2]), classes=3))
    with pytest.raises(ValueError, match="text: 2 embeddings for 0 encoders"):
        build(OF_LABELS)(x, time, text(2))
    for changes in ({"classes": 3}, {"text_widths": ()}, {"classes": -1}):
        with pytest.raises(ValueError, match=r"dit\.classes: a DiT takes labels or text"):
            replace(CONFIG, **changes)


def test_near_the_data_a_small_error_stays_small() -> None:
    x, _ = latent()
    time = torch.ones(2, dtype=torch.float64)
    near, far = (velocity_from_data(x + error, x, time[:, None, None, None, None]) for error in (0.0, 0.01))
    torch.testing.assert_close(far - near, torch.full_like(x, 0.01 / 0.05))
