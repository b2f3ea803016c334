"""DeepSpeed's engine behind a few verbs: start, backward, update, fragments, averaged, pieces and load."""

import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param

from kinoflow.configs import launch
from kinoflow.configs.devices import device_of
from kinoflow.configs.errors import UserError
from kinoflow.train.run.clipping import Clipping
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.ema import EMA, Fragment
from kinoflow.train.run.masters import Masters
from kinoflow.train.run.optimizer import adamw, whole_shape
from kinoflow.train.run.processes import Processes
from kinoflow.train.run.shards import Piece, Shards
from kinoflow.train.run.spread import deepspeed_settings
from kinoflow.train.run.task import Loss, Parts

# Of the module and what `Engine.backward` was given; None where the loss rests.
LossFunction = Callable[..., Loss | None]


def start(threads: int | None = None, sequence: int = 1) -> Processes:
    """Join the process group that the launcher describes; alone, make one of one process.

    Raises:
        UserError: the processes do not divide into groups of `sequence`, or the launcher is unclear.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Without this DeepSpeed compiles C++ for a minute to go around gloo between processes of one machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if threads is not None:
        torch.set_num_threads(threads)
    me = launch.current()
    os.environ.update(me.variables())  # DeepSpeed reads them
    device = device_of(me.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=launch.meeting(me.size), rank=me.rank, world_size=me.size)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    if dist.get_world_size() % sequence:
        raise UserError(
            f"parallel.sequence: {sequence} does not divide the {dist.get_world_size()} processes"
        )
    control = dist.new_group(backend="gloo") if backend == "nccl" and dist.get_world_size() > 1 else None
    assert not isinstance(control, int), "this process is in the group of all"
    return Processes(rank=dist.get_rank(), size=dist.get_world_size(), device=device, sequence=sequence,
                     control=control)  # fmt: skip


def stop() -> None:
    """Leave the process group, so that the interpreter exits without warnings."""
    if dist.is_initialized():
        dist.destroy_process_group()


class _Loss(nn.Module):
    """What DeepSpeed wraps: a whole loss as one forward, so that its hooks see every submodule call."""

    def __init__(self, model: nn.Module, loss: LossFunction, mixed: torch.autocast) -> None:
        super().__init__()
        self.model = model
        self._loss = loss
        self._mixed = mixed
        self.found: Loss | None = None

    def forward(self, *inputs: Any) -> Tensor | None:
        with self._mixed:
            result = self._loss(self.model, *inputs)
        if result is None:
            return None
        parts: Parts = {}
        for key, value in result.parts.items():
            parts[key] = value.detach() if isinstance(value, Tensor) else value
        self.found = Loss(total=result.total.detach(), parts=parts, output=result.output)
        return result.total


class Engine:
    """One module, its loss and its optimizer under ZeRO; parameters are named as the module names them."""

    def __init__(self, model: nn.Module, loss: LossFunction, config: RunConfig, processes: Processes) -> None:
        self.model = model
        self.processes = processes
        self._clipping = Clipping(config.optimizer)
        # Low weights meet fp32 batches: autocast brings them together, and keeps losses in fp32.
        low = config.deepspeed.low
        self._scaled = low is torch.float16
        accelerator: Any = get_accelerator()
        if self._scaled and not accelerator.is_fp16_supported():
            raise UserError(f"deepspeed.precision: no fp16 on this {processes.device.type}; use bf16 or fp32")
        self._mixed = torch.autocast(processes.device.type, dtype=low, enabled=low is not torch.float32)
        self._module = _Loss(model, loss, self._mixed)
        self._micro_batches = 0
        self.stage = config.deepspeed.zero_stage
        wrapped = deepspeed.initialize(
            model=self._module,
            optimizer=adamw(self._module, config.optimizer),
            config=deepspeed_settings(config, processes),
        )
        self.deepspeed: Any = wrapped[0]
        # Offloaded masters, and the average with them, stay in host memory.
        home = torch.device("cpu") if config.deepspeed.offload != "none" else processes.device
        optimizer = self.deepspeed.optimizer
        self._masters = Masters(model, optimizer, stage=self.stage, rank=processes.rank, home=home)
        if self.stage == 0 and processes.size == 1:
            self.deepspeed.enable_backward_allreduce = False  # it would flatten and copy every gradient

    def backward(self, *inputs: Any) -> Loss | None:
        """Add the gradients of a micro-batch; this rank's loss, cut from the graph, or None when it rests."""
        if self._micro_batches > 0:
            self.deepspeed.step()  # within an accumulation it only counts
        loss = self.deepspeed(*inputs)
        if loss is None:
            return None
        self.deepspeed.backward(loss)
        self._micro_batches += 1
        found, self._module.found = self._module.found, None
        return found

    @property
    def working(self) -> bool:
        """Whether there are gradients since the last step."""
        return self._micro_batches > 0

    def update(self, lr: float) -> Parts:
        """One optimizer step with the gradients since the last; the global norm they had before clipping.

        Where that is no finite number the step is skipped, on all ranks alike: `skipped` is then 1, and there
        is no norm. In fp16 that is how the loss scale, which is told as well, finds its place.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        bound, norm = self._clipping.bound, None
        if self.stage == 0:
            norm = self._clip(bound)
        elif self._clipping.adaptive:
            self.deepspeed.optimizer.clip_grad = bound
        self.deepspeed.step()
        self._micro_batches = 0
        if norm is None:
            applied, norm = self.deepspeed.was_step_applied(), self.deepspeed.get_global_grad_norm()
        else:
            applied = bool(norm.isfinite())
        figures: dict[str, Any] = {"skipped": float(not applied)}
        if self._scaled:
            figures["loss_scale"] = self.deepspeed.optimizer.loss_scale
        if not applied:
            return figures
        if self._clipping.adaptive:
            self._clipping.saw(float(norm))
            figures["clip_bound"] = bound
        return figures | {"grad_norm": norm}

    def _clip(self, bound: float) -> Tensor:
        """Clip here, as torch does: DeepSpeed's stage 0 would not report the norm, nor look at it."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not norm.isfinite():
            for parameter in self.model.parameters():
                parameter.grad = None  # AdamW leaves alone what has none
        elif bound > 0:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), bound, norm)
        return norm

    def pieces(self) -> dict[str, Piece]:
        """What this process keeps of masters and optimizer, copied to host memory."""
        return self._masters.pieces()

    def counters(self) -> dict[str, float]:
        """The optimizer's own counts and the norm's, equal on every process."""
        return self._masters.counters() | self._clipping.counters()

    def load(self, shards: Shards, counters: dict[str, float]) -> None:
        """Take over what `pieces` and `counters` gave to a checkpoint; every process must enter together."""
        self._masters.load(shards, counters)
        self._clipping.load(counters)
        if self.stage > 0:
            self._write(lambda _, parameter: _whole_master(parameter))

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Those of all that is trained, wherever it is kept."""
        return {name: list(whole_shape(parameter)) for name, parameter in self._trained()}

    def rest(self, leave_out: Collection[str] = ()) -> dict[str, Tensor]:
        """Buffers and other frozen parameters, copied to host memory; every process must enter together."""
        found = self._rest(leave_out)
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in found}

    @torch.no_grad()
    def load_rest(self, saved: dict[str, Tensor], leave_out: Collection[str] = ()) -> None:
        """Take over what `rest` gave; every process must enter together."""
        for name, value in self._rest(leave_out):
            value.copy_(saved[name])

    def _rest(self, leave_out: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """One at a time; ZeRO-3 keeps what is done to a parameter before the next one is asked for."""
        parameters = dict(self.model.named_parameters())
        for name, value in self.model.state_dict().items():
            if name not in parameters:
                yield name, value
        for name, parameter in parameters.items():
            if not parameter.requires_grad and name not in leave_out:
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    yield name, parameter.data

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def fragments(self) -> list[Fragment]:
        """The fp32 masters of this rank."""
        return self._masters.fragments()

    @contextmanager
    def averaged(self, ema: EMA) -> Iterator[nn.Module]:
        """The model with averaged weights and in eval mode; every rank must enter together."""
        training = self.model.training
        # Without ZeRO the weights are their own masters; else what is computed with is a cast of the masters.
        kept = {name: p.data.clone() for name, p in self._trained()} if self.stage == 0 else {}
        own = {f.name: (f.start, value) for f, value in zip(ema.fragments, ema.values, strict=True)}
        self._write(lambda name, parameter: self._whole(own.get(name), parameter))
        self.model.eval()
        try:
            # Samples have shapes of their own: not worth a compilation.
            with torch.no_grad(), self._mixed, torch.compiler.set_stance("force_eager"):
                yield self.model
        finally:
            self._write(lambda name, p: kept[name] if self.stage == 0 else _whole_master(p))
            self.model.train(training)

    @torch.no_grad()
    def _write(self, value: Callable[[str, nn.Parameter], Tensor]) -> None:
        """Give every trained parameter its whole value; under ZeRO-3 each rank keeps its part of it."""
        for name, parameter in self._trained():
            whole = value(name, parameter)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(whole)

    def _whole(self, own: tuple[int, Tensor] | None, parameter: nn.Parameter) -> Float[Tensor, "..."]:
        """A full parameter from the pieces of all ranks; own is this rank's first element and values."""
        shape = whole_shape(parameter)
        whole = torch.zeros(prod(shape), device=self.processes.device)
        if own is not None:
            begin, value = own
            whole[begin : begin + value.numel()] = value.reshape(-1)
        if self.stage > 0 and self.processes.size > 1:
            dist.all_reduce(whole)
        return whole.view(shape)


def _whole_master(parameter: nn.Parameter) -> Tensor:
    """The fp32 master of a parameter under ZeRO, from all ranks."""
    master = safe_get_full_fp32_param(parameter)
    assert master is not None, "ZeRO keeps a master of whatever is trained"
    return master
