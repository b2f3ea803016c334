"""What would go wrong on a cluster, and the keys that put it right."""

from collections.abc import Iterator
from dataclasses import replace

from kinoflow.train.plan.config import PlanInputs
from kinoflow.train.plan.memory import GIB
from kinoflow.train.plan.planner import Memory, Planner
from kinoflow.train.plan.workload import divisors

# Fields of PlanInputs that a run sets -> their keys.
KEYS = {"checkpoint_every": "parallel.checkpoint_every", "sequence": "parallel.sequence",
        "zero_stage": "deepspeed.zero_stage", "accumulation": "deepspeed.accumulation",
        "offload": "deepspeed.offload", "gpus": "cluster.gpus"}  # fmt: skip


def misfits(planner: Planner) -> Iterator[str]:
    """Numbers that do not go into each other."""
    inputs, is_dit = planner.inputs, planner.config.model == "dit"
    gpus, node, degree = inputs.gpus, inputs.gpus_per_node, inputs.sequence
    key = "parallel.sequence"
    if gpus > node and gpus % node:
        yield f"cluster.gpus: {gpus} are no whole nodes of {node}"
    if gpus % degree:
        yield f"{key}: {degree} does not divide cluster.gpus={gpus}"
    heads = planner.config.dit.heads
    if is_dit and heads % degree:
        yield f"{key}: {degree} does not divide dit.heads={heads}; take one of {list(divisors(heads))}"
    if degree > node:
        yield (
            f"{key}: {degree} GPUs are more than a node of {node}: attention talks over the network, and "
            "the MFU will be less"
        )
    for size in sorted({clip.batch_size for clip in planner.work.clips}):
        if size % inputs.slices:
            fitting = min(divisors(size), key=lambda slices: abs(slices - inputs.slices))
            yield (
                f"data.batch_size: {size} does not divide into {inputs.slices} slices, that is "
                f"gpus / sequence x accumulation; {fitting} would do"
            )


def too_fast(inputs: PlanInputs, utilization: float) -> Iterator[str]:
    """One line when the hardware would have to do more than it can."""
    if utilization > 1:
        most = f"{inputs.mfu / utilization:.2f}"
        yield f"cluster.mfu: {inputs.mfu} is {utilization:.0%} of the GPUs; what is recomputed leaves {most}"


def too_large(planner: Planner, memory: Memory) -> Iterator[str]:
    """One line when a GPU does not hold the run, with the first remedy found."""
    inputs = planner.inputs
    if memory.peak <= inputs.budget:
        return
    remedy = next(remedies(planner), None)
    if remedy is None:
        advice = "no setting of this batch fits; take smaller buckets"
    else:
        changed = {key: getattr(remedy, key) for key in KEYS if getattr(remedy, key) != getattr(inputs, key)}
        words = " ".join(f"{KEYS[key]}={value}" for key, value in changed.items())
        advice = f"set {words}, which takes {planner.memory(remedy).peak / GIB:.1f} GiB"
    largest = max(memory.kinds, key=lambda kind: memory.kinds[kind])
    yield (f"memory: {memory.clip} needs {memory.peak / GIB:.1f} GiB of {inputs.budget / GIB:.1f} GiB "
           f"(memory_gib - reserve_gib), most of it for {largest}; {advice}")  # fmt: skip


def remedies(planner: Planner) -> Iterator[PlanInputs]:
    """Settings that fit: with one key changed, then with several on as many GPUs, then with more GPUs."""
    for changed in (*_single_changes(planner), *planner.settings()):
        divides = not any(clip.batch_size % changed.slices for clip in planner.work.clips)
        if divides and changed.gpus % changed.sequence == 0 and planner.fits(changed):
            yield changed
    smallest = planner.smallest([planner.inputs])
    if smallest is not None:
        yield replace(planner.inputs, gpus=smallest["gpus"], accumulation=smallest["accumulation"])


def _single_changes(planner: Planner) -> Iterator[PlanInputs]:
    inputs = planner.inputs
    if planner.work.depth:
        yield replace(inputs, checkpoint_every=1)
    for stage in range(inputs.zero_stage + 1, 4):
        yield replace(inputs, zero_stage=stage)
    for slices in divisors(planner.common_batch):
        if slices > inputs.slices and slices % (inputs.slices // inputs.accumulation) == 0:
            yield replace(inputs, accumulation=slices * inputs.accumulation // inputs.slices)
    for degree in planner.work.splits:
        if degree > inputs.sequence:
            yield replace(inputs, sequence=degree)
    if inputs.zero_stage > 0:
        yield replace(inputs, offload="optimizer")
    if inputs.zero_stage == 3:
        yield replace(inputs, offload="parameters")
