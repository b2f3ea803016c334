"""What a run offers a task that gets its model ready: the neighbours of a process, and values in pieces."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.processes import Processes

# Elements of the buffer that gradients pass through on a CPU. DeepSpeed's own, of 2 GB, is new memory at
# every step, and to map and clear its pages took longer than the copies; a small one is soon used again.
_CPU_BUCKET = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a run is spread over its processes, before DeepSpeed wraps the model."""

    config: RunConfig
    processes: Processes

    @property
    def slices(self) -> int:
        """Into how many equal parts the batch of a step is cut."""
        return self.processes.replicas * self.config.deepspeed.accumulation

    @cached_property
    def group(self) -> dist.ProcessGroup | None:
        """This process and its neighbours that share its clips, None where there are none; all must ask."""
        size, sequence = self.processes.size, self.processes.sequence
        starts = range(0, size, sequence) if sequence > 1 else ()
        groups = [dist.new_group(list(range(start, start + sequence))) for start in starts]
        own = groups[self.processes.replica] if groups else None
        assert not isinstance(own, int), "this process is in its own group"
        return own

    def materialize(
        self, model: nn.Module, units: Iterable[nn.Module], fill: Callable[[str, Tensor], None]
    ) -> None:
        """Give what is on the meta device its values by `fill`, of which ZeRO-3 keeps this process's part.

        One unit of the model at a time, so that the whole is never in one place. ZeRO-3 sends the values of
        process 0 to the others, which do not ask for them.
        """
        import deepspeed

        names = {parameter: name for name, parameter in model.named_parameters()}
        choice = self.config.deepspeed
        for unit in units:
            todo = [parameter for parameter in unit.parameters() if parameter.is_meta]
            for parameter in todo:
                value = torch.empty(parameter.shape, device=self.processes.device)
                if choice.zero_stage < 3 or self.processes.rank == 0:
                    fill(names[parameter], value)
                # A parameter cannot leave the meta device by assignment to its data.
                made = nn.Parameter(value.to(choice.weights), requires_grad=parameter.requires_grad)
                torch.utils.swap_tensors(parameter, made)
            if todo and choice.zero_stage == 3:
                settings = deepspeed_settings(self.config, self.processes)
                deepspeed.zero.Init(module=unit, config_dict_or_path=settings)


def deepspeed_settings(config: RunConfig, processes: Processes) -> dict[str, Any]:
    """The run in DeepSpeed's own words."""
    choice = config.deepspeed
    slices = processes.size * choice.accumulation
    low = choice.weights is not torch.float32
    # At stage 1 DeepSpeed gives fp32 sums of bf16 gradients to a class of its own (BF16_Optimizer), which
    # keeps and reduces all of them on every rank. Its stage 2 keeps a share, and is the code of the others.
    stage = max(choice.zero_stage, 2) if low else choice.zero_stage
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": processes.device.type == "cuda"}
    if processes.device.type == "cpu":
        zero["reduce_bucket_size"] = _CPU_BUCKET
    if choice.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = choice.persistent
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
        "bf16": {"enabled": choice.weights is torch.bfloat16},
        "fp16": {"enabled": choice.weights is torch.float16},  # with a loss scale that adapts
        # Left alone, both are in what the weights are: a sum over many slices would lose the small ones.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "checkpoint": {"tag_validation": "Ignore"},
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": None,
    }
