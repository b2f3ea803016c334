"""Sequence parallelism, recomputation and compilation of a backbone, applied from outside by `parallelize`.

Ulysses (Jacobs et al. 2023): each process of a group holds a part of the tokens everywhere in the trunk,
except inside self-attention, where it holds all tokens of a part of the heads. Text is on every process.

The loss is computed by every process of the group on the whole output. A parameter's gradient is then the
mean over the group, as in data parallelism, so that the optimizer needs to know nothing of this.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn import Dropout, Module
from torch.utils.checkpoint import checkpoint

from kinoflow.configs.errors import UserError
from kinoflow.dit_video.attention.kernels import Kernel, Shard, uncompiled
from kinoflow.dit_video.joint import JointBlock
from kinoflow.dit_video.layers import Block, Layout
from kinoflow.dit_video.mmdit import MMDiT
from kinoflow.dit_video.video_dit import DiTConfig, TextContext, VideoDiT

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Trunk = Callable[..., Tensor]
_GRAPHS = 64


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the backbone is spread over processes and its memory and time are traded."""

    sequence: int = 1
    """Processes that share the tokens of each clip."""
    checkpoint_every: int = 0
    """Of so many blocks one is computed again on the way back: 1 is all, 0 none."""
    compile: bool = False
    """Compile each block."""

    def __post_init__(self) -> None:
        if self.sequence < 1:
            raise UserError(f"parallel.sequence: {self.sequence} is too small, the least is 1")
        if self.checkpoint_every < 0:
            raise UserError(
                f"parallel.checkpoint_every: {self.checkpoint_every} is negative; 0 keeps all activations"
            )


def parallelize(
    model: VideoDiT | MMDiT, config: ParallelConfig, group: "ProcessGroup | None", *, gathered: bool = False
) -> None:
    """Apply what config asks for, in the one order that works: exchange, compile, recompute.

    `group` holds the `config.sequence` processes that share a clip; None where each has its own. `gathered`
    says that ZeRO-3 shards the weights: it then brings them together for a whole block, around its call, so
    that no hook lies inside of what is compiled.

    Raises:
        UserError: the group has another size, the heads do not divide among it, or the model has no exchange.
    """
    if config.sequence > 1:
        if not isinstance(model, VideoDiT):
            raise UserError("parallel.sequence: only model: dit shares a clip's tokens; set it to 1")
        _spread_sequence(model, config, group)
    if gathered:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, [Block, JointBlock])
        # It lets go of a block's weights when the gradient of its input is there. Where all before the
        # first block is frozen (beside adapters) there would be none, and it would do so too early.
        model.embed.register_forward_hook(_differentiable)
        if isinstance(model, VideoDiT):
            model.separate_text = False
    if config.compile:
        # Graphs of one code object, which all blocks share: with and without gradients, of each bucket, of a
        # student and its teacher. Beyond the limit blocks run as they are, with no more than a warning.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    for index, block in enumerate(model.blocks):
        if config.compile:
            block.forward = torch.compile(block.forward)
        if config.checkpoint_every and index % config.checkpoint_every == 0:
            # Around the compiled block, which an exchange splits into several graphs.
            drops = any(isinstance(module, Dropout) for module in block.modules())  # in adapters
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=drops)


def shares_tokens(config: object, size: int) -> str | None:
    """Why so many processes cannot share the tokens of a backbone's clips; None where they can."""
    if not isinstance(config, DiTConfig):
        return "only a dit/ shares a clip's tokens"
    return f"{size} does not divide dit.heads={config.heads}" if config.heads % size else None


@contextmanager
def tokens_shared(model: VideoDiT, group: "ProcessGroup") -> Iterator[None]:
    """Within it the group's processes share each clip's tokens, as `parallelize` has it for training.

    All of them call the model at the same time, with the same input, and get the same output. It is for
    sampling: there are no gradients, and the exchange is torch's, which does without DeepSpeed.

    Raises:
        UserError: the heads do not divide among the group.
    """
    problem = shares_tokens(model.config, dist.get_world_size(group))
    if problem is not None:
        raise UserError(f"processes: {problem}")
    attentions: list[Any] = [block.attention for block in model.blocks]
    kernels = [attention.kernel for attention in attentions]
    try:
        for attention, kernel in zip(attentions, kernels, strict=True):
            attention.kernel = _between_swaps(kernel, group)
        model.trunk = partial(_sharded_trunk, model.trunk, group)
        yield
    finally:
        del model.trunk  # the class's is below it
        for attention, kernel in zip(attentions, kernels, strict=True):
            attention.kernel = kernel


def _between_swaps(kernel: Kernel, group: "ProcessGroup") -> Kernel:
    """Attention of all tokens with this process's share of the heads; its own tokens go in and come out."""

    def exchange(query: Tensor, key: Tensor, value: Tensor, who: Any) -> Tensor:
        assert isinstance(who, Shard)
        q, k, v = (_swap(x, group, scatter=1, gather=2)[:, :, : who.length] for x in (query, key, value))
        attended = kernel(q, k, v, None)
        padding = query.shape[2] * dist.get_world_size(group) - who.length
        return _swap(F.pad(attended, (0, 0, 0, padding)), group, scatter=2, gather=1)

    return exchange


def _swap(x: Tensor, group: "ProcessGroup", *, scatter: int, gather: int) -> Tensor:
    """Each process gives the others their parts of one axis, and joins what it gets along another."""
    parts = torch.stack(x.chunk(dist.get_world_size(group), dim=scatter))
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return torch.cat(received.unbind(), dim=gather)


def _differentiable(_: Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _spread_sequence(model: VideoDiT, config: ParallelConfig, group: "ProcessGroup | None") -> None:
    size = 1 if group is None else dist.get_world_size(group)
    if group is None or size != config.sequence:
        raise UserError(f"parallel.sequence: {config.sequence}, but the group has {size} processes")
    if model.config.heads % size:
        raise UserError(f"parallel.sequence: {size} does not divide dit.heads={model.config.heads}")
    for block in model.blocks:
        attention: Any = block.attention
        attention.kernel = _exchanged(attention.kernel, group)
    model.trunk = partial(_sharded_trunk, model.trunk, group)


def _exchanged(kernel: Kernel, group: "ProcessGroup") -> Kernel:
    """The kernel between two all-to-alls: it sees the whole sequence and 1 / size of the heads.

    The sequence is padded to a multiple of the size; the padding is at the end and the kernel never sees it.
    """
    from deepspeed.sequence.layer import DistributedAttention

    def whole(query: Tensor, key: Tensor, value: Tensor, shard: Shard) -> Tensor:
        q, k, v = (x[:, : shard.length].transpose(1, 2) for x in (query, key, value))
        attended = kernel(q, k, v, None).transpose(1, 2)
        return F.pad(attended, (0, 0, 0, 0, 0, query.shape[1] - shard.length))

    attention = DistributedAttention(whole, group, scatter_idx=2, gather_idx=1)  # pyright: ignore[reportArgumentType]

    # Compiled, DeepSpeed's exchange would lose its gradient without a word.
    @uncompiled
    def exchange(query: Tensor, key: Tensor, value: Tensor, who: Any) -> Tensor:
        assert isinstance(who, Shard)
        parts = (x.transpose(1, 2).contiguous() for x in (query, key, value))
        return attention(*parts, 0, None, who).transpose(1, 2)

    return exchange


def _sharded_trunk(
    trunk: Trunk,
    group: "ProcessGroup",
    x: Float[Tensor, "b l d"],
    positions: Float[Tensor, "1 l d"],
    *,
    modulation: Float[Tensor, "b 6 d"],
    context: TextContext,
    layout: Layout,
) -> Float[Tensor, "b l d"]:
    """The trunk on this process's tokens; the whole sequence goes in and comes out."""
    assert layout.clips is None
    length, size = x.shape[1], dist.get_world_size(group)
    part = -(-length // size)
    padding = (0, 0, 0, part * size - length)
    own = Layout(clips=Shard(length), text=context.seen(part))
    shards = (_Split.apply(F.pad(whole, padding), group) for whole in (x, positions))
    mine = trunk(*shards, modulation=modulation, context=context, layout=own)
    return _Gather.apply(mine, group)[:, :length]


class _Split(torch.autograd.Function):
    """This process's part of a sequence that all have. Back: the parts of all, over their number."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: "ProcessGroup") -> Tensor:
        ctx.group = group
        return whole.chunk(dist.get_world_size(group), dim=1)[dist.get_rank(group)].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _join(grads[0], ctx.group) / dist.get_world_size(ctx.group), None


class _Gather(torch.autograd.Function):
    """The sequence from the parts of all. Back: this process's part, times their number."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: "ProcessGroup") -> Tensor:
        ctx.group = group
        return _join(part, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        size, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        return grads[0].chunk(size, dim=1)[rank] * size, None


def _join(part: Tensor, group: "ProcessGroup") -> Tensor:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=1)
