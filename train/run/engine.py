"""DeepSpeed behind four verbs: start, step, fragments, averaged. Nothing else touches its engine."""

import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist

from kinoflow.configs.errors import UserError
from kinoflow.dit_video import VideoDiT
from kinoflow.dit_video.parallel import parallelize
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.ema import EMA, Fragment
from kinoflow.train.run.optimizer import adamw
from kinoflow.train.run.processes import World
from kinoflow.train.run.task import Parts

LossFunction = Callable[[nn.Module, Any, int], tuple[Tensor, Parts] | None]


def start(threads: int | None = None, sequence: int = 1) -> World:
    """Join the process group that torchrun, deepspeed or srun describe; alone, make one of one process.

    Raises:
        UserError: the processes do not divide into groups of `sequence`.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Without this DeepSpeed compiles C++ for a minute to go around gloo between processes of one machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if threads is not None:
        torch.set_num_threads(threads)
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        slurm = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
        os.environ.update({name: os.environ[source] for name, source in slurm.items()})
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    if dist.get_world_size() % sequence:
        raise UserError(
            f"parallel.sequence: {sequence} does not divide the {dist.get_world_size()} processes"
        )
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=device, sequence=sequence)


def stop() -> None:
    """Leave the process group, so that the interpreter exits without warnings."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Loss(nn.Module):
    """What DeepSpeed wraps: a whole loss as one forward, so that its hooks see every submodule call."""

    def __init__(self, model: nn.Module, loss: LossFunction, mixed: torch.autocast) -> None:
        super().__init__()
        self.model = model
        self._loss = loss
        self._mixed = mixed
        self.parts: Parts = {}

    def forward(self, batch: Any, step: int) -> Tensor | None:
        with self._mixed:
            result = self._loss(self.model, batch, step)
        if result is None:
            return None
        loss, parts = result
        self.parts = {"loss": loss.detach()}
        for key, value in parts.items():
            self.parts[key] = value.detach() if isinstance(value, Tensor) else value
        return loss


class Engine:
    """One module, its loss and its optimizer under ZeRO; parameters are named as the module names them."""

    def __init__(self, model: nn.Module, loss: LossFunction, config: RunConfig, world: World) -> None:
        self.model = model
        self.world = world
        self._grad_clip = config.optimizer.grad_clip
        # bf16 weights meet fp32 batches: autocast brings them together, and keeps losses in fp32.
        bf16 = config.deepspeed.precision == "bf16"
        self._mixed = torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=bf16)
        self._module = _Loss(model, loss, self._mixed)
        self._micro_batches = 0
        self.stage = config.deepspeed.zero_stage
        settings = _deepspeed_config(config, world)
        if isinstance(model, VideoDiT):
            parallelize(model, config.parallel, _sequence_group(world))
            _materialize(model, settings, world, torch.bfloat16 if bf16 else torch.float32)
        wrapped = deepspeed.initialize(
            model=self._module,
            optimizer=adamw(self._module, config.optimizer),
            config=settings,
        )
        self.deepspeed: Any = wrapped[0]
        if self.stage == 0 and world.size == 1:
            self.deepspeed.enable_backward_allreduce = False  # it would flatten and copy every gradient

    def backward(self, batch: Any, step: int) -> Parts | None:
        """Add the gradients of a micro-batch; this rank's figures, or None when the loss rests."""
        if self._micro_batches > 0:
            self.deepspeed.step()  # within an accumulation it only counts
        loss = self.deepspeed(batch, step)
        if loss is None:
            return None
        self.deepspeed.backward(loss)
        self._micro_batches += 1
        return self._module.parts

    def update(self, lr: float) -> Tensor | float:
        """One optimizer step with the gradients since the last; the global norm they had before clipping."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        norm = self._clip() if self.stage == 0 else None
        self.deepspeed.step()
        self._micro_batches = 0
        return norm if norm is not None else self.deepspeed.get_global_grad_norm()

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

    def fragments(self) -> list[Fragment]:
        """The fp32 masters of this rank."""
        found = (self._fragment(name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        return [fragment for fragment in found if fragment is not None]

    def _fragment(self, name: str, parameter: Any) -> Fragment | None:
        if self.stage == 0:
            return Fragment(name=name, shape=tuple(parameter.shape), start=0, master=parameter.data)
        if self.stage == 3:
            shape, part = tuple(parameter.ds_shape), parameter.ds_tensor.numel()
            begin = self.world.rank * part
            kept = min(part, parameter.ds_numel - begin)  # the last part is padded
            if kept <= 0:
                return None
            optimizer = self.deepspeed.optimizer
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            master = optimizer.fp32_partitioned_groups_flat[group].data.narrow(0, offset, kept)
            return Fragment(name=name, shape=shape, start=begin, master=master)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        address = mapping.lp_fragment_address
        return Fragment(
            name=name, shape=tuple(parameter.shape), start=address.start, master=mapping.hp_fragment.data
        )

    @contextmanager
    def averaged(self, ema: EMA) -> Iterator[nn.Module]:
        """The model with averaged weights and in eval mode; every rank must enter together."""
        training = self.model.training
        saved = {name: self._stored(parameter).clone() for name, parameter in self.model.named_parameters()}
        self._place_average(ema)
        self._refresh()
        self.model.eval()
        try:
            # Samples have shapes of their own: not worth a compilation.
            with torch.no_grad(), self._mixed, torch.compiler.set_stance("force_eager"):
                yield self.model
        finally:
            for name, parameter in self.model.named_parameters():
                self._stored(parameter).copy_(saved[name])
            self._refresh()
            self.model.train(training)

    def _stored(self, parameter: Any) -> Tensor:
        """Where this rank keeps a parameter between steps: under ZeRO-3 its own partition."""
        return parameter.ds_tensor.data if self.stage == 3 else parameter.data

    @torch.no_grad()
    def _place_average(self, ema: EMA) -> None:
        own = {f.name: (f.start, value) for f, value in zip(ema.fragments, ema.values, strict=True)}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.stage < 3:
                parameter.data.copy_(self._whole(own.get(name), parameter))
            elif name in own:
                value = own[name][1]
                self._stored(parameter).view(-1)[: value.numel()].copy_(value)

    def _refresh(self) -> None:
        """ZeRO-3 keeps small parameters gathered: gather them anew from the changed partitions."""
        persistent = self.deepspeed.optimizer.persistent_parameters if self.stage == 3 else []
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def _whole(self, own: tuple[int, Tensor] | None, parameter: nn.Parameter) -> Float[Tensor, "..."]:
        """A full parameter from the pieces of all ranks; own is this rank's first element and values."""
        whole = torch.zeros(parameter.numel(), device=parameter.device)
        if own is not None:
            begin, value = own
            whole[begin : begin + value.numel()] = value.reshape(-1)
        if self.stage > 0 and self.world.size > 1:
            dist.all_reduce(whole)
        return whole.view(parameter.shape)


def _sequence_group(world: World) -> dist.ProcessGroup | None:
    """This rank's neighbours that share its clips, None where there are none; every rank calls it."""
    starts = range(0, world.size, world.sequence) if world.sequence > 1 else ()
    groups = [dist.new_group(list(range(start, start + world.sequence))) for start in starts]
    own = groups[world.replica] if groups else None
    assert not isinstance(own, int), "this rank is in its own group"
    return own


def _materialize(model: VideoDiT, settings: dict[str, Any], world: World, dtype: torch.dtype) -> None:
    """Give a model on the meta device its starting values and under ZeRO-3 keep this rank's part of them.

    One block at a time, so that the whole model is never in one place.
    """
    units = [*model.blocks, *(child for child in model.children() if child is not model.blocks), model]
    names = {parameter: name for name, parameter in model.named_parameters()}
    for unit in units:
        todo = [parameter for parameter in unit.parameters() if parameter.is_meta]
        for parameter in todo:
            value = torch.empty(parameter.shape, device=world.device)
            model.init_parameter(names[parameter], value)
            # A parameter cannot leave the meta device by assignment to its data.
            torch.utils.swap_tensors(parameter, nn.Parameter(value.to(dtype)))
        if todo:
            deepspeed.zero.Init(module=unit, config_dict_or_path=settings)


def _deepspeed_config(config: RunConfig, world: World) -> dict[str, Any]:
    choice = config.deepspeed
    slices = world.size * choice.accumulation
    zero: dict[str, Any] = {"stage": choice.zero_stage, "overlap_comm": world.device.type == "cuda"}
    if choice.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if choice.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": max(config.data.batch_size // slices, 1),
        "gradient_accumulation_steps": choice.accumulation,
        "gradient_clipping": config.optimizer.grad_clip if choice.zero_stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": choice.precision == "bf16" and choice.zero_stage > 0},
        "checkpoint": {"tag_validation": "Ignore"},
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": None,
    }
