"""Sizes in words, memory counted before it is used, and plans that stay within a budget."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kinoflow.configs.errors import UserError
from kinoflow.tae import TAE, TAEConfig
from kinoflow.tae.tiles.blend import SpatialTiling
from kinoflow.tae.tiles.halo import SpatialHalo
from kinoflow.tae.tiles.memory import parse_bytes, peak_bytes, ran_out, weight_bytes
from kinoflow.tae.tiles.plan import TilingRequest, choose, next_smaller
from tests.tae.toys import MINI

GIB, MIB = 2**30, 2**20
# The paper's layout with what keeps tiles from agreeing: attention and group norms.
SMALL = TAEConfig(channels=32, encoder_blocks=(1, 0, 0, 0), decoder_blocks=(0, 0, 0, 1))
SHIPPED = Path(__file__).parents[2] / "sample" / "mini" / "tae"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * GIB),
        ("500MB", 500_000_000),
        ("1.5 GiB", 3 * GIB // 2),
        (" .5gib ", GIB // 2),
        ("1048576", MIB),
        ("12 kB", 12_000),
        ("2TiB", 2048 * GIB),
        ("3b", 3),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "8", "8.", "GiB", "8 GiBs", "-1GiB", "0GiB", "0.1B", "1e9", "8,5GB", "nan", "8G"]
)
def test_what_is_no_size(text):
    if text in {"8", "8."}:
        assert parse_bytes(text) == 8
        return
    with pytest.raises(UserError, match=r"memory: .* is not a size; write it as 8GiB"):
        parse_bytes(text)


def test_out_of_memory_is_told_from_other_failures():
    said = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory: you tried to allocate"
    assert all(
        map(ran_out, (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(said)))
    )
    assert not any(map(ran_out, (RuntimeError("shapes do not match"), ValueError("not enough memory"))))
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**62, dtype=torch.uint8)
    assert ran_out(failure.value)


def test_count_of_a_model_of_one_layer():
    """By hand: a chain of three tensors of which two are alive at a time."""
    from kinoflow.tae.tiles.memory import _LiveBytes

    with _LiveBytes() as live, torch.no_grad():
        x = torch.empty(1000, device="meta")
        x = x + 1
        x = x.view(10, 100)[2:].clone()
        del x
        torch.empty(10, device="meta")
    assert live.peak == 8000


def test_memory_grows_with_the_tile():
    whole = peak_bytes(MINI, "decode", (4, 16, 16))
    assert whole > 3 * 4 * 32 * 128 * 128  # more than the pixels alone
    for shape in ((8, 16, 16), (4, 32, 16), (4, 16, 32)):
        assert 1.8 * whole < peak_bytes(MINI, "decode", shape) < 2.1 * whole
    half = peak_bytes(MINI, "decode", (4, 16, 16), torch.bfloat16)
    assert 0.45 * whole < half < 0.55 * whole


def test_larger_chunks_on_a_device_that_streams_them_take_more():
    wide = dataclasses.replace(MINI, channels=64)
    on_cpu, on_gpu = (peak_bytes(wide, "decode", (16, 32, 32), on=kind) for kind in ("cpu", "cuda"))
    assert on_cpu < 0.8 * on_gpu


def test_weights_are_counted():
    assert weight_bytes(MINI) == sum(p.nbytes for p in TAE(MINI).parameters())


# VmHWM, not ru_maxrss: that one begins at what the parent held when it started the process.
MEASURE = """
import json, re, sys, torch
from pathlib import Path
from kinoflow.tae import TAE, accelerate
from kinoflow.tae.tiles.memory import peak_bytes

def most():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(2)
tae = accelerate(TAE.from_pretrained(sys.argv[1]))
runs = {
    "encode": lambda *shape: tae.encode(torch.zeros(1, 3, *shape)).mean,
    "decode": lambda *shape: tae.decode(torch.zeros(1, 16, *shape), shape[0] * 8),
}
figures = {}
for part, (few, shape) in json.loads(sys.argv[2]).items():
    with torch.inference_mode():
        counted = peak_bytes(tae.config, part, tuple(shape))
        runs[part](*few)
        Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from what is held now
        before = most()
        runs[part](*shape)
    figures[part] = {"counted": counted, "measured": most() - before}
print(json.dumps(figures))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
def test_count_against_what_the_process_takes():
    """Within a factor of 1.5 above and 1.25 below; blocks go back to the system when they are freed."""
    shapes = {"encode": ((8, 8, 8), (48, 96, 128)), "decode": ((1, 1, 1), (6, 12, 16))}
    command = [sys.executable, "-c", MEASURE, str(SHIPPED), json.dumps(shapes)]
    settings = {"OMP_NUM_THREADS": "2", "MALLOC_MMAP_THRESHOLD_": str(2**16), "PATH": ""}
    done = subprocess.run(
        command,
        cwd=SHIPPED.parents[2],
        env=settings,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for part, figures in json.loads(done.stdout).items():
        assert figures["counted"] > 30 * MIB, "too little to be told from what else a process takes"
        assert 1 / 1.25 < figures["measured"] / figures["counted"] < 1.5, part


def request(**changes) -> TilingRequest:
    base = TilingRequest(config=MINI, part="decode", mode="halo", cells=(24, 40))
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize("mode", ["halo", "blend"])
@pytest.mark.parametrize("part", ["encode", "decode"])
def test_plans_fit_and_a_larger_budget_never_costs_more(mode, part):
    wanted = request(mode=mode, part=part, frame_bytes=1, cells=(12, 20))
    least = next_in_budget(wanted)
    costs = []
    for budget in (least, 2 * least, 4 * least, 16 * least, 1000 * least):
        plan = choose(wanted, budget)
        assert plan.bytes <= budget
        costs.append(plan.cost)
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]
    assert choose(wanted, 1000 * least).space is None


def next_in_budget(wanted: TilingRequest) -> int:
    """The smallest budget that works, from the message that says so."""
    with pytest.raises(UserError, match=r"memory: 1MiB is too little for frames of 160x96; give") as told:
        choose(wanted, MIB)
    return int(str(told.value).split()[-3].removesuffix("MiB")) * MIB


def test_the_message_names_a_budget_that_works():
    wanted = request(cells=(12, 20))
    least = next_in_budget(wanted)
    assert choose(wanted, least).bytes <= least
    with pytest.raises(UserError):
        choose(wanted, least - MIB)


@pytest.mark.parametrize("part", ["encode", "decode"])
@pytest.mark.parametrize(("mode", "cells"), [("halo", (24, 40)), ("blend", (36, 64))])
def test_each_plan_after_a_failure_has_smaller_tiles(part, mode, cells):
    wanted = request(part=part, mode=mode, cells=cells)
    plan = choose(wanted, 1000 * GIB)
    seen = [plan]
    while (smaller := next_smaller(wanted, seen[-1])) is not None:
        assert smaller.positions < seen[-1].positions
        seen.append(smaller)
    assert len(seen) > 5
    assert seen[-1].positions < seen[0].positions / 20


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, SpatialHalo),
        ({"mode": "blend"}, SpatialTiling),
        ({"config": SMALL}, SpatialTiling),
        ({"config": dataclasses.replace(SMALL, norm="rms", attention=False)}, SpatialHalo),
        ({"config": dataclasses.replace(SMALL, norm="rms")}, SpatialTiling),
    ],
)
def test_tiles_that_cannot_agree_in_space_are_blended(changes, kind):
    assert isinstance(choose(request(most_cells=30, **changes), 1000 * GIB).space, kind)


def test_a_limit_in_pixels_holds_whatever_the_budget():
    space = choose(request(most_cells=17), 1000 * GIB).space
    assert isinstance(space, SpatialHalo)
    assert space.tile == 17
    assert choose(request(cells=(9, 16), most_cells=17), 1000 * GIB).space is None
