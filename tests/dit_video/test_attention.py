"""Every kernel against `math`: dense, padded and packed, values and gradients; packed against padded."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.configs.errors import UserError
from kinoflow.dit_video import VideoDiT, video_dit
from kinoflow.dit_video.attention import kernels as attention
from kinoflow.dit_video.attention.kernels import Segments, choose, math_attention, packs, sdpa_attention
from tests.dit_video.test_model import CONFIG, build, latent, text

SEGMENTS = Segments(queries=(5, 1, 7), keys=(3, 4, 2))
GPU_KERNELS = ("sdpa", "xformers", "flex", "varlen")


def qkv(queries: int, keys: int, batch: int = 1, **kind) -> list:
    sizes, width = (queries, keys, keys), kind.pop("width", 4)
    kind = {"dtype": torch.float64} | kind
    return [torch.randn(batch, 2, n, width, requires_grad=True, **kind) for n in sizes]


def gradients(kernel, inputs, who) -> tuple[Tensor, ...]:
    attended = kernel(*inputs, who)
    weight = torch.linspace(-1, 1, attended.numel(), dtype=attended.dtype, device=attended.device)
    return (attended, *torch.autograd.grad((attended * weight.view(attended.shape)).sum(), inputs))


def whos() -> dict[str, object]:
    mask = torch.rand(2, 9) > 0.4
    mask[:, 4] = True
    return {"dense": None, "mask": mask, "packed": SEGMENTS}


@pytest.mark.parametrize("kind", ["dense", "mask", "packed"])
def test_sdpa_equals_math(kind) -> None:
    inputs = qkv(13, 9, batch=1 if kind == "packed" else 2)
    who = whos()[kind]
    for one, other in zip(
        gradients(sdpa_attention, inputs, who), gradients(math_attention, inputs, who), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_packed_math_is_each_run_alone() -> None:
    inputs = qkv(13, 9)
    attended = math_attention(*inputs, SEGMENTS)
    runs = zip(
        *(x.split(n, 2) for x, n in zip(inputs, (SEGMENTS[0], *[SEGMENTS[1]] * 2), strict=True)), strict=True
    )
    torch.testing.assert_close(attended, torch.cat([math_attention(*run) for run in runs], dim=2))


def test_xformers_mask_is_the_dense_one() -> None:
    """xFormers cannot run on a CPU, but its block-diagonal bias can be written out there."""
    pytest.importorskip("xformers")
    bias = attention.block_diagonal(SEGMENTS, "cpu").materialize((13, 9))
    assert torch.equal(bias == 0, SEGMENTS.mask(torch.device("cpu"))[0, 0])
    assert set(bias.unique().tolist()) == {0.0, -torch.inf}
    assert attention.block_diagonal(SEGMENTS, "cpu") is attention.block_diagonal(SEGMENTS, "cpu")


def test_xformers_is_asked_in_its_layout(monkeypatch) -> None:
    """ "b l n d" in and out, the bias of the runs between: with its operator written out, all equals math."""
    ops = pytest.importorskip("xformers.ops")

    def written_out(query, key, value, attn_bias=None):
        bias = 0 if attn_bias is None else attn_bias.materialize((query.shape[1], key.shape[1]), query.dtype)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return ((q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v).transpose(1, 2)

    monkeypatch.setattr(ops, "memory_efficient_attention", written_out)
    for who in (None, SEGMENTS):
        inputs = qkv(13, 9)
        for one, other in zip(
            gradients(attention.xformers_attention, inputs, who),
            gradients(math_attention, inputs, who),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("who", [None, SEGMENTS], ids=["dense", "packed"])
def test_flex_equals_math_in_values(monkeypatch, who) -> None:
    """Uncompiled, for the time it takes; torch has no gradient of it on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
    inputs = [x.detach().float() for x in qkv(13, 9)]
    torch.testing.assert_close(attention.flex_attention(*inputs, who), math_attention(*inputs, who))


def test_varlen_is_asked_for_runs(monkeypatch) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def written_out(q, k, v, *runs_and_longest):
        starts_q, starts_k, longest_q, longest_k = runs_and_longest
        runs = Segments(tuple(starts_q.diff().tolist()), tuple(starts_k.diff().tolist()))
        assert (longest_q, longest_k) == (max(runs.queries), max(runs.keys))
        assert starts_q.dtype == starts_k.dtype == torch.int32
        attended = math_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), runs)
        return attended[0].transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", written_out)
    for who, batch in ((None, 2), (SEGMENTS, 1)):
        inputs = qkv(13, 9, batch)
        for one, other in zip(
            gradients(attention.varlen_attention, inputs, who),
            gradients(math_attention, inputs, who),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


def test_a_mask_does_not_reach_a_kernel_that_packs() -> None:
    inputs = qkv(13, 9, batch=2)
    for kernel in (attention.xformers_attention, attention.flex_attention, attention.varlen_attention):
        with pytest.raises(UserError, match="takes packed sequences"):
            kernel(*inputs, whos()["mask"])


def test_a_kernel_that_cannot_run_says_what_is_missing(monkeypatch) -> None:
    assert choose("sdpa") is sdpa_attention
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"dit\.attention: varlen .* needs a CUDA device"):
        choose("varlen")
    monkeypatch.setitem(__import__("sys").modules, "xformers", None)
    monkeypatch.setitem(__import__("sys").modules, "xformers.ops", None)
    with pytest.raises(UserError, match=r"dit\.attention: xformers .* pip install 'kinoflow\[gpu\]'"):
        VideoDiT(replace(CONFIG, attention="xformers"))


def ragged_text() -> tuple[TextEmbedding, ...]:
    """Texts of different lengths, zeros behind them as the encoders leave them."""
    masks = (torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]), torch.tensor([[1, 1, 0], [1, 0, 0]]))
    return tuple(
        TextEmbedding(hidden=e.hidden * mask[..., None], mask=mask.bool())
        for e, mask in zip(text(2), masks, strict=True)
    )


@pytest.mark.parametrize("kernel", ["math", "sdpa"])
def test_packed_text_equals_padded(monkeypatch, kernel) -> None:
    model, (x, time) = build(replace(CONFIG, attention=kernel)), latent()
    results = []
    for packed in (False, True):
        monkeypatch.setattr(video_dit, "packs", lambda _, packed=packed: packed)
        model.zero_grad()
        velocity = model(x, time, ragged_text())
        velocity.square().sum().backward()
        results.append([velocity, *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert model.encode_condition(ragged_text()).lengths == (5, 6)


@pytest.mark.gpu
@pytest.mark.parametrize("who", [None, SEGMENTS], ids=["dense", "packed"])
@pytest.mark.parametrize("name", GPU_KERNELS)
def test_kernels_equal_math_on_a_gpu(name, who) -> None:
    """bf16 kernels against math in fp32: a few thousandths of bf16's own grain."""
    kernel = choose(name)
    inputs = qkv(13, 9, width=64, dtype=torch.bfloat16, device="cuda")
    exact = [x.detach().float().requires_grad_() for x in inputs]
    for one, other in zip(gradients(kernel, inputs, who), gradients(math_attention, exact, who), strict=True):
        torch.testing.assert_close(one.float(), other, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_KERNELS)
def test_models_equal_math_on_a_gpu(name) -> None:
    assert packs(name) == (name != "sdpa")
    results = []
    for kernel in ("math", name):
        config = replace(CONFIG, width=128, heads=2, attention=kernel)
        model = build(config).to("cuda", torch.bfloat16 if kernel != "math" else torch.float32)
        x, time = (each.to(next(model.parameters())) for each in latent())
        texts = [TextEmbedding(hidden=e.hidden.to(x), mask=e.mask.to("cuda")) for e in ragged_text()]
        velocity = model(x, time, texts).float()
        velocity.square().mean().backward()
        results.append([velocity.detach(), *(p.grad.float() for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= 0.05 * one.norm()
