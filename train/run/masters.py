"""The fp32 masters of what is trained, and AdamW's states of them, as ZeRO leaves them to this process."""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from kinoflow.train.run.ema import Fragment
from kinoflow.train.run.optimizer import whole_shape
from kinoflow.train.run.shards import Piece, Shards

_MASTER, _STATES = "master", ("exp_avg", "exp_avg_sq")
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of fp16's losses


@dataclass(frozen=True, kw_only=True)
class _Own:
    """A parameter, and the first element and the end of what this process keeps of it."""

    name: str
    parameter: Any
    shape: tuple[int, ...]
    start: int
    end: int


class Masters:
    """What a checkpoint holds of an optimizer, by parameter: no process needs to know how others cut it.

    `optimizer` is DeepSpeed's at `stage` 1 to 3, torch's own at 0. `home` is where offloaded states stay.
    """

    def __init__(
        self, model: nn.Module, optimizer: Any, *, stage: int, rank: int, home: torch.device
    ) -> None:
        self._optimizer, self._stage, self._rank, self._home = optimizer, stage, rank, home
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._base: torch.optim.Optimizer = optimizer.optimizer if stage > 0 else optimizer
        self._own = [own for own in map(self._part, self._parameters) if own.start < own.end]

    def fragments(self) -> list[Fragment]:
        """The masters of this process."""
        return [
            Fragment(name=own.name, shape=own.shape, start=own.start, read=partial(self._get, own, _MASTER))
            for own in self._own
        ]

    def pieces(self) -> dict[str, Piece]:
        """Masters and states of this process, copied to host memory."""
        found = {}
        for own in self._own:
            for kind in (_MASTER, *(_STATES if self._base.state else ())):
                value = self._get(own, kind).detach().to("cpu", copy=True).reshape(-1)
                found[f"{kind}/{own.name}"] = Piece(shape=own.shape, start=own.start, value=value)
        return found

    def counters(self) -> dict[str, float]:
        """What is one for all parameters: the steps that were applied, and the scale of fp16's losses."""
        steps = [float(state["step"]) for state in self._base.state.values()]
        scaler = getattr(self._optimizer, "loss_scaler", None)
        scale = {key: getattr(scaler, key) for key in _SCALE if hasattr(scaler, key)}
        return {"step": max(steps, default=0.0), **scale}

    def load(self, shards: Shards, counters: dict[str, float]) -> None:
        """Take over what `pieces` and `counters` gave, of any number of processes and at any stage."""
        kinds = [_MASTER]
        if counters["step"] > 0:
            self._begin(counters["step"])
            kinds += _STATES
        for kind in kinds:  # one after another: each is as large as all of this process's masters
            found = shards.parts({f"{kind}/{own.name}": (own.start, own.end) for own in self._own})
            for own in self._own:
                self._set(own, kind, found[f"{kind}/{own.name}"])
        for key in _SCALE:
            if key in counters and hasattr(getattr(self._optimizer, "loss_scaler", None), key):
                setattr(self._optimizer.loss_scaler, key, counters[key])

    def _begin(self, step: float) -> None:
        """Make the states, which a fresh optimizer has not before its first step."""
        for flat in self._flat():
            zeros = {kind: torch.zeros_like(flat, memory_format=torch.preserve_format) for kind in _STATES}
            where = flat.device
            self._base.state[flat] = {"step": torch.tensor(step, dtype=torch.float32, device=where), **zeros}

    def _flat(self) -> list[Tensor]:
        """What torch's AdamW steps on."""
        if self._stage == 0:
            return list(self._parameters.values())
        if self._stage == 3:
            return self._optimizer.fp32_partitioned_groups_flat
        return self._optimizer.single_partition_of_fp32_groups

    def _part(self, name: str) -> _Own:
        parameter: Any = self._parameters[name]
        shape = whole_shape(parameter)
        start, end = 0, prod(shape)
        if self._stage == 3:
            part = safe_get_local_fp32_param(parameter).numel()
            start, end = self._rank * part, min((self._rank + 1) * part, end)  # the last part is padded
        elif self._stage > 0:
            # DeepSpeed's public access to a process's own part (safe_get_local_fp32_param) is for ZeRO-3
            # alone, and the one to the whole parameter sends it around: the mapping of both is read here.
            address = parameter._hp_mapping and parameter._hp_mapping.lp_fragment_address
            start, end = (address.start, address.start + address.numel) if address else (0, 0)
        return _Own(name=name, parameter=parameter, shape=shape, start=start, end=end)

    def _get(self, own: _Own, kind: str) -> Tensor:
        """This process's elements: the tensor itself, or a copy where ZeRO-3 offloads it."""
        parameter = own.parameter
        if self._stage == 0:
            return parameter.data if kind == _MASTER else self._base.state[parameter][kind]
        if self._stage < 3:
            # Not by DeepSpeed's own view of the states: it links them once, after the first group's first
            # step, when the others have none.
            mapping = parameter._hp_mapping
            if kind == _MASTER:
                return mapping.hp_fragment.data
            address, flat = mapping.hp_fragment_address, self._flat()[mapping.param_group_index]
            return self._base.state[flat][kind].narrow(0, address.start, address.numel)
        return self._local(parameter, kind)[: own.end - own.start].to(self._home)

    def _set(self, own: _Own, kind: str, value: Tensor) -> None:
        if self._stage < 3:
            there = self._get(own, kind)
            there.copy_(value.view(there.shape))
            return
        whole = self._local(own.parameter, kind).clone()
        whole[: value.numel()] = value
        if kind == _MASTER:
            safe_set_local_fp32_param(own.parameter, whole)
        else:
            safe_set_local_optimizer_state(own.parameter, whole, kind)

    @staticmethod
    def _local(parameter: Any, kind: str) -> Tensor:
        """This process's part under ZeRO-3, with its padding."""
        if kind == _MASTER:
            return safe_get_local_fp32_param(parameter).detach()
        return safe_get_local_optimizer_state(parameter, kind).detach()
