"""DeepSpeed's engine behind a few verbs: start, backward, update, fragments, averaged, save and load."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

from kinoflow.configs.errors import UserError
from kinoflow.train.run import launch
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.ema import EMA, Fragment
from kinoflow.train.run.optimizer import adamw, whole_shape
from kinoflow.train.run.processes import Processes, device_of
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
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    if dist.get_world_size() % sequence:
        raise UserError(
            f"parallel.sequence: {sequence} does not divide the {dist.get_world_size()} processes"
        )
    return Processes(rank=dist.get_rank(), size=dist.get_world_size(), device=device, sequence=sequence)


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
        self._grad_clip = config.optimizer.grad_clip
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
        # Offloaded masters, and the average with them, stay in host memory.
        self._home = torch.device("cpu") if config.deepspeed.offload != "none" else processes.device
        wrapped = deepspeed.initialize(
            model=self._module,
            optimizer=adamw(self._module, config.optimizer),
            config=deepspeed_settings(config, processes),
        )
        self.deepspeed: Any = wrapped[0]
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

    def update(self, lr: float) -> Parts:
        """One optimizer step with the gradients since the last; the global norm they had before clipping.

        In fp16 also the loss scale, and whether the step was skipped: then a gradient had overflown.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        norm = self._clip() if self.stage == 0 else None
        self.deepspeed.step()
        self._micro_batches = 0
        figures: Parts = {"grad_norm": self.deepspeed.get_global_grad_norm() if norm is None else norm}
        if not self._scaled:
            return figures
        applied = self.deepspeed.was_step_applied()
        scale: Parts = {"loss_scale": self.deepspeed.optimizer.loss_scale, "skipped": float(not applied)}
        return figures | scale if applied else scale

    def _clip(self) -> Tensor:
        """Clip here, as torch does: DeepSpeed's stage 0 would not report the norm."""
        parameters = list(self.model.parameters())
        if self._grad_clip > 0:
            return nn.utils.clip_grad_norm_(parameters, self._grad_clip)
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def save(self, folder: Path, tag: str) -> None:
        """Write folder/tag; every rank writes its own shards."""
        self.deepspeed.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        """Take over what save wrote, under the same number of ranks and ZeRO stage."""
        self.deepspeed.load_checkpoint(str(folder), tag=tag)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def fragments(self) -> list[Fragment]:
        """The fp32 masters of this rank."""
        found = (self._fragment(name, parameter) for name, parameter in self._trained())
        return [fragment for fragment in found if fragment is not None]

    def _fragment(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        shape = whole_shape(parameter)
        if self.stage == 0:
            return Fragment(name=name, shape=shape, start=0, read=lambda: parameter.data)
        if self.stage < 3:
            return _flat_fragment(name, parameter)
        part = safe_get_local_fp32_param(parameter).numel()
        start = self.processes.rank * part
        kept = min(part, prod(shape) - start)  # the last part is padded
        if kept <= 0:
            return None

        def read() -> Tensor:
            """What is offloaded comes as a copy on the device."""
            return safe_get_local_fp32_param(parameter).detach()[:kept].to(self._home)

        return Fragment(name=name, shape=shape, start=start, read=read)

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


def _flat_fragment(name: str, parameter: Any) -> Fragment | None:
    """What this rank optimizes of a parameter under ZeRO-1 and 2, None where it is all elsewhere.

    DeepSpeed's public access to a rank's own part (deepspeed.utils.safe_get_local_fp32_param) is for ZeRO-3
    alone, and the one to the whole parameter sends it around: the mapping behind both is read here.
    """
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    start, shape = mapping.lp_fragment_address.start, tuple(parameter.shape)
    return Fragment(name=name, shape=shape, start=start, read=lambda: parameter._hp_mapping.hp_fragment.data)
