"""`kinoflow train plan`: every figure of a run before a cluster is rented."""

from dataclasses import dataclass
from typing import Any

from kinoflow.train.plan.advice import misfits, too_fast, too_large
from kinoflow.train.plan.config import PlanConfig, PlanInputs
from kinoflow.train.plan.planner import Memory, Planner
from kinoflow.train.plan.text import EncoderSize
from kinoflow.train.plan.workload import Clip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that the command prints."""

    model: str
    inputs: PlanInputs
    encoders: tuple[EncoderSize, ...]
    precomputation: dict[str, float]
    clips: tuple[Clip, ...]
    parameters: dict[str, int]
    flops: dict[str, Any]
    memory: Memory
    time: dict[str, float]
    smallest: dict[str, dict[str, Any] | None]
    warnings: list[str]


def plan(config: PlanConfig) -> Plan:
    """Every figure for the run as it is configured.

    Raises:
        UserError: a model without a plan, buckets or text widths that cannot be.
    """
    planner = Planner(config)
    inputs = planner.inputs
    memory = planner.memory(inputs)
    flops = planner.flops(inputs)
    time = planner.time(inputs, flops)
    smallest = {
        "as_configured": planner.smallest([inputs]),
        "any_settings": planner.smallest(planner.settings()),
    }
    return Plan(
        model=config.model,
        inputs=inputs,
        encoders=planner.encoders,
        precomputation=planner.precomputation(inputs),
        clips=planner.work.clips,
        parameters=planner.work.parameters,
        flops=flops,
        memory=memory,
        time=time,
        smallest=smallest,
        warnings=[
            *planner.work.problems(),
            *misfits(planner),
            *too_large(planner, memory),
            *too_fast(inputs, time["hardware_utilization"]),
        ],
    )
