"""The two-stream backbone: beside diffusers' own with the same weights, its kernels, its starting values."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.configs.errors import UserError
from kinoflow.dit_video.attention import kernels
from kinoflow.dit_video.joint import modulated
from kinoflow.dit_video.mmdit import MMDiT, MMDiTConfig
from kinoflow.dit_video.released import read_released, sources
from tests.dit_video.released import KINDS, transformer

CONFIG = MMDiTConfig(
    width=32, depth=3, heads=4, latent_channels=4, text_widths=(6, 5), pooled_width=7, max_tokens=6,
    dual_attention_layers=(1,), attention="math",
)  # fmt: skip


def build(config: MMDiTConfig = CONFIG, *, trained: bool = True) -> MMDiT:
    """A model in float64; `trained` opens its gates."""
    torch.manual_seed(0)
    model = MMDiT(config)
    model.init_weights()
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    return model.double()


def text(batch: int, lengths: tuple[int, int] = (5, 3)) -> tuple[TextEmbedding, ...]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    masks = [torch.ones(batch, length, dtype=torch.bool) for length in lengths]
    return (
        TextEmbedding(hidden=draw(lengths[0], 6), mask=masks[0]),
        TextEmbedding(hidden=draw(lengths[1], 5), mask=masks[1], pooled=draw(7)),
    )


def masked(batch: int) -> tuple[TextEmbedding, ...]:
    """The first text is whole, those behind it are ever shorter."""
    cut = []
    for each in text(batch):
        lengths = each.mask.shape[1] - torch.arange(batch).clamp(max=2)
        mask = torch.arange(each.mask.shape[1]) < lengths[:, None]
        cut.append(replace(each, mask=mask))
    return tuple(cut)


def latent(batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 4, 1, 6, 8, generator=generator, dtype=torch.float64)
    return x, torch.rand(batch, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (8, 20)])
def test_released_weights_give_what_diffusers_gives(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    """Values and all gradients; time runs the other way, and so does the velocity."""
    theirs, ours = transformer(kind, tmp_path), read_released(tmp_path)
    x, states, pooled = torch.randn(2, 16, *size), torch.randn(2, 9, 40), torch.randn(2, 20)
    noise_time = torch.tensor([0.25, 0.875])  # exact in fp32, and so is what is left to 1
    expected = theirs(x, states, pooled, 1000 * noise_time).sample
    one = TextEmbedding(hidden=states, mask=torch.ones(2, 9, dtype=torch.bool), pooled=pooled)
    velocity = ours(x[:, :, None], 1 - noise_time, [one])[:, :, 0]
    torch.testing.assert_close(velocity, -expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(expected)
    (expected * weight).mean().backward()
    (-velocity * weight).mean().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    compared = 0
    for name, source in sources(ours.config).items():
        if name.startswith("positions."):
            continue
        found = ours.get_parameter(name).grad
        assert found is not None, name
        assert found.abs().max() > 0 or "key_norm" in name, name
        wanted = source.make(*(gradients[each] for each in source.names))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        compared += len(source.names)
    unused = [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]
    assert all(re.search(r"blocks.2.attn.(add_q_proj|norm_added_q)", name) for name in unused)
    assert compared + len(unused) == len(gradients)


def test_weights_are_read_from_several_files_and_kept_in_a_dtype(tmp_path: Path) -> None:
    transformer("3", tmp_path / "whole")
    transformer("3").save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    whole, parts = (read_released(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole | parts)
    low = read_released(tmp_path / "whole", torch.bfloat16)
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}


def _change(folder: Path, name: str, value: Tensor | None) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    if value is None:
        del state[name]
    else:
        state[name] = value
    save_file(state, file)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("proj_out.bias", None, "no weight proj_out.bias"),
        ("proj_out.gain", torch.zeros(2), "proj_out.gain is no weight"),
        ("proj_out.bias", torch.zeros(2), r"proj_out.bias is \(2,\) and not \(64,\)"),
        ("pos_embed.pos_embed", torch.randn(1, 144, 32), "not those of a row and of a column"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    name: str, value: Tensor | None, message: str, tmp_path: Path
) -> None:
    transformer("3", tmp_path)
    _change(tmp_path, name, value)
    with pytest.raises(UserError, match=message) as caught:
        read_released(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("_class_name", "FluxTransformer2DModel", "holds a FluxTransformer2DModel"),
        ("qk_norm", "layer_norm", "qk_norm is 'layer_norm'"),
        ("out_channels", 32, "out_channels is 32"),
        ("num_layers", None, "no key 'num_layers'"),
        ("num_attention_heads", "four", "cannot be read"),
    ],
)
def test_a_config_of_another_kind_is_named(key: str, value: object, message: str, tmp_path: Path) -> None:
    transformer("3", tmp_path)
    file = tmp_path / "config.json"
    given = json.loads(file.read_text()) | {key: value}
    file.write_text(json.dumps({name: each for name, each in given.items() if each is not None}))
    with pytest.raises(UserError, match=message) as caught:
        read_released(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_velocity_starts_at_zero() -> None:
    x, time = latent()
    velocity = build(trained=False)(x, time, text(3))
    assert velocity.shape == x.shape
    assert not velocity.any()


def test_a_meta_model_gets_the_same_starting_values() -> None:
    with torch.device("meta"):
        empty = MMDiT(CONFIG)
    assert all(parameter.is_meta for parameter in empty.parameters())
    torch.manual_seed(0)
    for name, value in build(trained=False).named_parameters():
        made = torch.empty(value.shape)
        empty.init_parameter(name, made)
        assert torch.equal(made.double(), value), name
    fixed = {name for name, value in empty.named_parameters() if not value.requires_grad}
    assert fixed == {"positions.rows", "positions.columns"}


def test_sdpa_equals_math_in_values_and_gradients() -> None:
    x, time = latent()
    answers = []
    for kernel in ("math", "sdpa"):
        model = build(replace(CONFIG, attention=kernel))
        velocity = model(x, time, masked(3))
        velocity.square().sum().backward()
        answers.append((velocity, [p.grad for p in model.parameters() if p.requires_grad]))
    for one, other in zip(*[[velocity, *grads] for velocity, grads in answers], strict=True):
        torch.testing.assert_close(one, other)


def test_packed_equals_masked_in_values_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """For kernels without masks the real tokens of all rows are joined; the plain kernel knows both ways."""
    answers = []
    for name in ("math", "varlen"):
        monkeypatch.setitem(kernels._KERNELS, name, kernels.math_attention)
        monkeypatch.setattr(kernels, "_missing", lambda _: None)
        model, (x, time) = build(replace(CONFIG, attention=name)), latent()
        velocity = model(x, time, masked(3))
        velocity.square().sum().backward()
        answers.append([velocity, *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other)


def test_a_single_row_is_modulated_as_one_of_several() -> None:
    """Values and gradients: torch's fused norm beside the one written out."""
    x, shift, scale = (torch.randn(2, length, 6, dtype=torch.float64) for length in (5, 1, 1))
    weight, answers = torch.randn(1, 5, 6, dtype=torch.float64), []
    for rows in (1, 2):
        given = [each[:rows].clone().requires_grad_() for each in (x, shift, scale)]
        found = modulated(*given)[:1]
        (found * weight).sum().backward()
        answers.append([found, *(each.grad[:1] for each in given)])
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other)
    mean, deviation = x.mean(2, keepdim=True), (x.var(2, keepdim=True, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(modulated(x, shift, scale), (x - mean) / deviation * (1 + scale) + shift)


def test_padding_of_the_text_is_never_seen() -> None:
    model, (x, time) = build(), latent()
    texts = masked(3)
    other = [replace(e, hidden=torch.where(e.mask[..., None], e.hidden, 9.0)) for e in texts]
    torch.testing.assert_close(model(x, time, other), model(x, time, texts))
    alone = [
        TextEmbedding(
            hidden=e.hidden[2:][e.mask[2:]][None], mask=e.mask[2:][e.mask[2:]][None],
            pooled=None if e.pooled is None else e.pooled[2:],
        )
        for e in texts
    ]  # fmt: skip
    torch.testing.assert_close(model(x[2:], time[2:], alone), model(x, time, texts)[2:])


def test_text_that_was_encoded_before_gives_the_same() -> None:
    model, (x, time) = build(), latent()
    torch.testing.assert_close(model(x, time, model.encode_condition(text(3))), model(x, time, text(3)))


def test_every_input_matters() -> None:
    model, (x, time), texts = build(), latent(), text(3)
    velocity = model(x, time, texts)
    pooled = replace(texts[1], pooled=2 * texts[1].pooled)
    for other in (
        model(x.flip(3), time, texts).flip(3),  # positions
        model(x, time.flip(0), texts),
        model(x, time, (replace(texts[0], hidden=2 * texts[0].hidden), texts[1])),
        model(x, time, (texts[0], pooled)),
    ):
        assert not torch.allclose(other, velocity, atol=1e-3)


def test_longer_tables_keep_the_earlier_positions() -> None:
    """A grid takes the middle, and there stands what an earlier stage had."""
    earlier, larger = build(), MMDiT(replace(CONFIG, max_tokens=10)).double()
    for name, value in larger.named_parameters():
        larger.continue_parameter(name, value, earlier.get_parameter(name).detach())
    x, time = latent()
    torch.testing.assert_close(larger(x, time, text(3)), earlier(x, time, text(3)))
    assert larger(torch.randn(1, 4, 1, 20, 18).double(), time[:1], text(1)).isfinite().all()
    fresh = build(replace(CONFIG, max_tokens=10), trained=False)
    for name in ("positions.rows", "positions.columns"):
        torch.testing.assert_close(larger.get_parameter(name), fresh.get_parameter(name))


def test_what_it_cannot_take_is_named() -> None:
    model, (x, time) = build(), latent()
    with pytest.raises(UserError, match="frames: 2 latent frames"):
        model(x.expand(-1, -1, 2, -1, -1), time, text(3))
    with pytest.raises(ValueError, match="latent width: 7"):
        model(x[..., :7], time, text(3))
    with pytest.raises(ValueError, match="height: 8 tokens"):
        model(torch.randn(3, 4, 1, 16, 8).double(), time, text(3))
    with pytest.raises(ValueError, match="1 embeddings for 2"):
        model(x, time, text(3)[:1])
    with pytest.raises(ValueError, match="0 values of pooled text"):
        model(x, time, [replace(each, pooled=None) for each in text(3)])
    with pytest.raises(ValueError, match="dual_attention_layers"):
        replace(CONFIG, dual_attention_layers=(3,))
    with pytest.raises(ValueError, match=r"mmdit\.width"):
        replace(CONFIG, heads=5)


def test_a_folder_of_ours_gives_the_model_back(tmp_path: Path) -> None:
    model, (x, time) = build().float(), latent()
    model.save_pretrained(tmp_path)
    again = MMDiT.from_pretrained(tmp_path, attention="sdpa")
    assert again.config == replace(CONFIG, attention="sdpa") and not again.training
    texts = [e.to(torch.empty(0)) for e in text(3)]
    torch.testing.assert_close(again(x.float(), time.float(), texts), model(x.float(), time.float(), texts))
