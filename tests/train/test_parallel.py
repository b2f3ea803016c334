"""Sequence parallelism, recomputation, compilation and ZeRO-3 from the meta device against plain runs."""

import copy

import pytest
import torch

from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import load
from kinoflow.dit_video import VideoDiT
from kinoflow.dit_video.parallel import ParallelConfig, parallelize
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.optimizer import adamw
from tests.dit_video.test_model import CONFIG, build, latent, text
from tests.train.parallel_jobs import KERNELS, ONE_BLOCK, config, loss, result
from tests.train.plain import plain
from tests.train.test_zero import COMMON, lines
from tests.train.toys import Toy

SOURCES = ["model=dit", "dit.width=32", "dit.depth=2", "dit.heads=4", "dit.ffn=48", "dit.latent_channels=4",
           "dit.text_widths=[6,5]", "dit.max_tokens=[3,4,4]", "seed=7", "deepspeed.zero_stage=3",
           "deepspeed.persistent=0", "optimizer.grad_clip=0"]  # fmt: skip
SHARDED = {
    "plain": [],
    "checkpointed": ["parallel.checkpoint_every=1"],
    "sequence": ["parallel.sequence=2", "parallel.checkpoint_every=2"],
    "compiled": ["parallel.compile=true"],
    "compiled_checkpointed": ["parallel.compile=true", "parallel.checkpoint_every=1"],
}


@pytest.fixture(scope="module")
def spread(start_job, tmp_path_factory):
    """What two and four processes found, by their number."""
    found = {}
    for size in (2, 4):
        folder = tmp_path_factory.mktemp("sequence")
        job = start_job("sequence", str(folder), size=size)
        assert job.wait() == [0] * size, job.text()
        found[size] = torch.load(folder / "sequence.pt")
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("every", [0, 1], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [2, 4])
def test_processes_that_share_a_clip_equal_one(spread, size, kernel, every, packed):
    velocities, gradients = spread[size][kernel, every, packed]
    expected, plain = result(build(config(kernel)), packed=packed)
    torch.testing.assert_close(velocities, expected)
    assert set(gradients) == set(plain)
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, f"{name} has no gradient to compare"
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_blocks_equal_kept_ones(every):
    plain, model = result(build()), build()
    calls = []
    for block in model.blocks:
        block.ffn.register_forward_hook(lambda *_: calls.append(1))
    parallelize(model, ParallelConfig(checkpoint_every=every), None)
    found = result(model)
    assert len(calls) == CONFIG.depth + CONFIG.depth // every
    assert torch.equal(found[0], plain[0])
    for name, gradient in plain[1].items():
        assert torch.equal(found[1][name], gradient)
    assert list(model.state_dict()) == list(build().state_dict())


@pytest.mark.parametrize("every", [0, 1], ids=["kept", "recomputed"])
def test_compiled_blocks_equal_plain_ones(compiled, every):
    """In one graph a block."""
    velocities, gradients, breaks, graphs = compiled[every]
    expected, plain = result(build(ONE_BLOCK))
    torch.testing.assert_close(velocities, expected)
    for name, gradient in plain.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)
    assert breaks == {}
    assert graphs >= 1


@pytest.fixture(scope="module")
def compiled(start_job, tmp_path_factory):
    """In a process of its own: the compiler cannot see through the type checks of the tests."""
    folder = tmp_path_factory.mktemp("compiled")
    job = start_job("compiled", str(folder))
    assert job.wait() == [0], job.text()
    return torch.load(folder / "compiled.pt")


@pytest.fixture(scope="module")
def shards(start_job, tmp_path_factory):
    folders, jobs = {}, []
    for case, own in SHARDED.items():
        folders[case] = tmp_path_factory.mktemp(case)
        jobs.append(start_job("sharded", str(folders[case]), [*SOURCES, *own], size=2))
        assert jobs[-1].wait() == [0, 0], jobs[-1].text()
    return {case: [torch.load(folder / f"{rank}.pt") for rank in (0, 1)] for case, folder in folders.items()}


def whole(shards, moment):
    """Parameters put together from the fragments of all ranks."""
    found = {}
    for rank in shards:
        for name, shape, start, master in rank[moment]:
            value = found.setdefault(name, torch.full(shape, torch.nan))
            value.view(-1)[start : start + master.numel()] = master.view(-1)
    return found


def unsharded() -> VideoDiT:
    settings = load(RunConfig, SOURCES)
    torch.manual_seed(settings.seed)
    torch.randn(11)  # nothing that was drawn before matters
    model = VideoDiT(settings.dit)
    model.init_weights()
    return model


@pytest.mark.parametrize("case", SHARDED)
def test_shards_from_the_meta_device_start_like_the_whole_model(shards, case):
    found = whole(shards[case], 0)
    expected = dict(unsharded().named_parameters())
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value.detach()), name
    assert all(len(rank[0]) > 0 for rank in shards[case])


def test_one_process_fills_one_block_at_a_time(shards):
    """Where all of a model fits nowhere, it must not be there while it starts."""
    first, second = (rank[2] for rank in shards["plain"])
    sizes = {name: value.numel() for name, value in unsharded().named_parameters()}
    assert set(first) == set(sizes) and not second
    largest = max(
        sum(size for name, size in sizes.items() if name.startswith(f"blocks.{i}.")) for i in (0, 1)
    )
    assert max(first.values()) <= largest < sum(sizes.values()) / 2


@pytest.mark.parametrize("case", [case for case in SHARDED if case.startswith("compiled")])
def test_no_gathering_lies_inside_of_a_compiled_block(shards, case):
    for *_, (breaks, graphs) in shards[case]:
        assert breaks == {} and graphs >= 1


@pytest.mark.parametrize("case", SHARDED)
def test_shards_train_like_the_whole_model(shards, case):
    model = unsharded()
    optimizer = adamw(model, load(RunConfig, [*SOURCES, "optimizer.lr=0.01"]).optimizer)
    replicas = (0,) if case == "sequence" else (0, 1)
    for step in range(3):
        optimizer.zero_grad()
        sum(loss(model, replica, step).total for replica in replicas).div(len(replicas)).backward()
        optimizer.step()
    found = whole(shards[case], 1)
    for name, value in model.named_parameters():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-3, atol=2e-4, msg=name)


def test_each_parameter_has_values_of_its_own():
    model = unsharded()
    first, second = (block.attention.qkv.weight for block in model.blocks)
    assert not torch.equal(first, second)
    assert first.std().item() == pytest.approx(32**-0.5, rel=0.1)
    other = copy.deepcopy(model)
    torch.manual_seed(8)
    other.init_weights()
    assert not torch.equal(other.embed.weight, model.embed.weight)


def test_what_cannot_be_spread_is_named():
    with pytest.raises(UserError, match=r"parallel\.sequence: 3, but the group has 1"):
        parallelize(build(), ParallelConfig(sequence=3), None)
    with pytest.raises(UserError, match=r"parallel\.sequence: 0 is too small"):
        load(RunConfig, ["model=dit", "parallel.sequence=0"])
    with pytest.raises(UserError, match=r"parallel\.checkpoint_every"):
        load(RunConfig, ["model=dit", "parallel.checkpoint_every=-1"])
    with pytest.raises(UserError, match=r"parallel\.checkpoint_every: only model: dit and mmdit are spread"):
        load(RunConfig, ["model=tae", "parallel.checkpoint_every=1"])
    with pytest.raises(UserError, match=r"parallel\.compile: only model: dit, mmdit and tae are spread"):
        load(RunConfig, ["model=judge", "parallel.compile=true"])
    load(RunConfig, ["model=tae", "parallel.compile=true"])


def test_processes_that_do_not_divide_are_refused(start_job, tmp_path):
    job = start_job("sharded", str(tmp_path), [*SOURCES, "parallel.sequence=2"])
    assert job.wait() == [1]
    assert "parallel.sequence: 2 does not divide the 1 processes" in job.text()


def test_neighbours_see_the_same_clips_and_count_them_once(start_job, tmp_path):
    """The loop with two processes on one replica is the plain loop on the whole batch."""
    own = ["model=dit", "parallel.sequence=2", "deepspeed.zero_stage=2", f"run={tmp_path}"]
    settings = load(RunConfig, COMMON)
    job = start_job("toy", [*COMMON, *own], False, size=2)
    assert job.wait() == [0, 0], job.text()
    logged = lines(tmp_path)
    assert [line["loss"] for line in logged] == pytest.approx(plain(Toy(settings), settings).losses, rel=1e-5)
    rate = 8 / (logged[-1]["seconds"] - logged[-2]["seconds"])  # a batch of 8 a line
    assert logged[-1]["samples_per_second"] == pytest.approx(rate, rel=0.2)


def test_text_stays_whole_on_each_process():
    """A context computed before the model is spread serves it after: nothing of the text is split."""
    model, (x, time) = build(), latent()
    context = model.encode_condition(text(2))
    parallelize(model, ParallelConfig(checkpoint_every=2), None)
    torch.testing.assert_close(model(x, time, context), build()(x, time, text(2)))
