"""Attention in blocks against `math`: values, gradients, compiled, by autocast; and when `sdpa` takes it."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kinoflow.dit_video.attention import blockwise
from kinoflow.dit_video.attention.blockwise import blockwise_attention
from kinoflow.dit_video.attention.kernels import Segments, math_attention, sdpa_attention
from tests.dit_video.test_attention import gradients

OPERATIONS = torch.ops.kinoflow.blockwise_attention, torch.ops.kinoflow.blockwise_attention_backward


def inputs(dtype: torch.dtype = torch.float64, clips: int = 3, queries: int = 13, keys: int = 9) -> list:
    """As the layers give them: heads inside of tokens."""
    return [
        torch.randn(clips, n, 2, 8, dtype=dtype).transpose(1, 2).requires_grad_()
        for n in (queries, keys, keys)
    ]


def mask(clips: int = 3, keys: int = 9) -> torch.Tensor:
    """Of the keys of each clip, "b k"; the operations take it as "b 1 1 k"."""
    return torch.arange(keys) < torch.tensor([keys, 1, keys // 2])[:clips, None]


def errors(kernel, x: list) -> list[float]:
    """Of values and gradients, relative to those of `math` in float64."""
    exact = gradients(math_attention, [t.detach().double().requires_grad_() for t in x], None)
    pairs = zip(gradients(kernel, x, None), exact, strict=True)
    return [((one.double() - other).norm() / other.norm()).item() for one, other in pairs]


@pytest.mark.parametrize("limit", [1, 2 * 9, 2 * 13 * 9 - 1, 2 * 13 * 9, 2 * 2 * 13 * 9, 1 << 20])
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_blocks_of_any_size_equal_math(monkeypatch, limit: int, masked: bool) -> None:
    """Blocks of one query, of some, of a head, of a clip, of two clips, of all."""
    monkeypatch.setattr(blockwise, "BLOCK_SCORES", limit)
    x, who = inputs(), mask() if masked else None
    ours = gradients(blockwise_attention, x, None if who is None else who[:, None, None])
    for one, other in zip(ours, gradients(math_attention, x, who), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("limit", [1, 18, 117, 234, 500, 1 << 20])
def test_blocks_cover_every_score_once_and_keep_to_the_limit(monkeypatch, limit: int) -> None:
    monkeypatch.setattr(blockwise, "BLOCK_SCORES", limit)
    query, key, _ = inputs()
    seen = torch.zeros(3, 2, 13)
    for block in blockwise.blocks(query, key):
        seen[block] += 1
        assert seen[block].numel() <= max(limit // 9, 1)
    assert torch.equal(seen, torch.ones_like(seen))


def test_nothing_asks_nothing() -> None:
    """A run of a packed sequence may be empty."""
    attended, *grads = gradients(blockwise_attention, inputs(queries=0), None)
    assert attended.shape == (3, 2, 0, 8)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_the_memory_is_laid_out_for_the_next_linear_map() -> None:
    for x in gradients(blockwise_attention, inputs(), None):
        assert x.transpose(1, 2).is_contiguous()


def test_torch_finds_the_operations_sound() -> None:
    """Schema, shapes without data, the gradient's registration, and all of it traced."""
    for who in (None, mask()[:, None, None]):
        torch.library.opcheck(OPERATIONS[0].default, (*inputs(), who))
        x = [tensor.detach() for tensor in inputs()]
        torch.library.opcheck(OPERATIONS[1].default, (x[0], *x, who))


def test_compiled_it_is_one_graph_and_equal() -> None:
    """The operation itself: around it the tests check types in a way that cannot be compiled."""
    compiled = torch.compile(OPERATIONS[0], fullgraph=True, backend="aot_eager")
    x, who = inputs(torch.bfloat16), mask()[:, None, None]
    for one, other in zip(gradients(compiled, x, who), gradients(OPERATIONS[0], x, who), strict=True):
        assert torch.equal(one, other)


def taken(*x: torch.Tensor) -> bool:
    """Whether `sdpa` computes these in blocks, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        sdpa_attention(*x).sum().backward()
    counted = counter.get_flop_counts().get("Global", {})
    return OPERATIONS[0] in counted and OPERATIONS[1] in counted


def test_sdpa_takes_it_for_bf16_on_a_cpu() -> None:
    assert taken(*inputs(torch.bfloat16))
    assert not taken(*inputs(torch.float32))
    assert not taken(*(x.detach().to("meta").requires_grad_() for x in inputs(torch.bfloat16)))
    with torch.autocast("cpu", torch.bfloat16):
        assert taken(*inputs(torch.float32))
    with torch.autocast("cpu", torch.float16):
        assert not taken(*inputs(torch.float32))


def test_autocast_gives_what_bf16_inputs_give() -> None:
    x = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        attended = sdpa_attention(*x)
    assert attended.dtype == torch.bfloat16
    assert torch.equal(attended, sdpa_attention(*(t.bfloat16() for t in x)))


def test_packed_bf16_is_each_run_alone() -> None:
    x = inputs(torch.bfloat16, clips=1)
    runs = Segments(queries=(5, 1, 7), keys=(3, 4, 2))
    alone = zip(x[0].split(runs.queries, 2), x[1].split(runs.keys, 2), x[2].split(runs.keys, 2), strict=True)
    assert torch.equal(
        sdpa_attention(*x, runs), torch.cat([blockwise_attention(*run) for run in alone], dim=2)
    )


def test_bf16_is_no_further_from_the_truth_than_math_is() -> None:
    """Scores are rounded to bf16, as those of `math`: .6 % of the values; torch's kernel keeps them: .4 %."""
    x = [torch.randn(1, 4, 256, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    kernels = blockwise_attention, math_attention, F.scaled_dot_product_attention
    for ours, plain, fused in zip(*(errors(kernel, x) for kernel in kernels), strict=True):
        assert ours < 1.1 * plain
        assert ours < 2.5 * fused


def test_many_blocks_of_queries_add_up_in_fp32(monkeypatch) -> None:
    """A key's gradient is a sum over all queries, which bf16 would round 256 times."""
    x = inputs(torch.bfloat16, clips=1, queries=256, keys=32)
    whole = errors(blockwise_attention, x)
    monkeypatch.setattr(blockwise, "BLOCK_SCORES", 32)
    assert all(one < 1.1 * other for one, other in zip(errors(blockwise_attention, x), whole, strict=True))


def test_flops_are_those_of_torchs_kernel() -> None:
    """Two products forward; five back, for the scores are computed again."""
    query, key, value = inputs(torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        sdpa_attention(query, key, value).sum().backward()
    product = 2 * 3 * 2 * 13 * 9 * 8
    assert [counter.get_flop_counts()["Global"][name] for name in OPERATIONS] == [2 * product, 5 * product]
