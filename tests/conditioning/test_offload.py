"""Weights that visit a device block by block: in order, two blocks at most, the same values."""

import weakref

import pytest
import torch
from torch import nn

from kinoflow.conditioning import offload
from kinoflow.conditioning.offload import stream

CPU = torch.device("cpu")


class Block(nn.Module):
    """A linear layer and a buffer, and a part that is called from outside as well."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.part = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("shift", torch.randn(4))
        self.broken = False

    def forward(self, x):
        if self.broken:
            raise RuntimeError("broken")
        return self.part(self.linear(x)) + self.shift


class Copies:
    """What was fetched, in order, and the copies that live."""

    def __init__(self) -> None:
        self.events: list[tuple[str, nn.Module]] = []
        self._seen: list[weakref.ref[torch.Tensor]] = []

    def add(self, tensor: torch.Tensor) -> None:
        self._seen.append(weakref.ref(tensor))

    def __len__(self) -> int:
        living = (seen() for seen in self._seen)
        return len({tensor.untyped_storage().data_ptr() for tensor in living if tensor is not None})


@pytest.fixture
def copies(monkeypatch):
    copies, fetch, arrive = Copies(), offload._Visit.fetch, offload._Visit.arrive

    def fetching(self):
        fetch(self)
        copies.events.append(("fetch", self.block))
        for *_, copy in self.coming:
            copies.add(copy)

    def arriving(self, block, args):
        arrive(self, block, args)
        for module, name, _ in self.originals:  # parameters are new objects around the copies
            copies.add(getattr(module, name))

    monkeypatch.setattr(offload._Visit, "fetch", fetching)
    monkeypatch.setattr(offload._Visit, "arrive", arriving)
    return copies


def run(blocks, x):
    for block in blocks:
        x = block(x)
    return x


@pytest.mark.parametrize(("ahead", "there"), [(False, [1, 1, 1, 1]), (True, [2, 2, 2, 1])])
def test_values_order_and_how_many_are_there(copies, ahead, there):
    blocks, x, tensors = [Block() for _ in range(4)], torch.randn(3, 4), 5
    originals, want, counted = [list(block.parameters()) for block in blocks], run(blocks, x), []
    stream(blocks, lambda: CPU, ahead=ahead)
    for block in blocks:
        block.register_forward_pre_hook(lambda block, _: copies.events.append(("run", block)))
        block.register_forward_pre_hook(lambda *_: counted.append(len(copies) / tensors))
    for _ in range(2):
        copies.events.clear()
        counted.clear()
        assert torch.equal(run(blocks, x), want)
        order = [f"{what} {blocks.index(block)}" for what, block in copies.events]
        if ahead:
            assert order == ["fetch 0", "fetch 1", "run 0", "fetch 2", "run 1", "fetch 3", "run 2", "run 3"]
        else:
            assert order == ["fetch 0", "run 0", "fetch 1", "run 1", "fetch 2", "run 2", "fetch 3", "run 3"]
        assert counted == there and len(copies) == 0
    for block, own in zip(blocks, originals, strict=True):
        assert all(one is other for one, other in zip(block.parameters(), own, strict=True))


def test_a_part_that_is_called_alone_comes_alone_and_within_its_block_not_again(copies):
    events = copies.events
    blocks, x = [Block(), Block()], torch.randn(3, 4)
    want = blocks[1].part(x), run(blocks, x)
    stream(blocks, lambda: CPU, ahead=True, alone=lambda block: (block.part,))
    assert torch.equal(blocks[1].part(x), want[0])
    assert events == [("fetch", blocks[1].part)]
    events.clear()
    assert torch.equal(run(blocks, x), want[1])
    assert events == [("fetch", blocks[0]), ("fetch", blocks[1])]


def test_the_weights_are_on_the_device_while_their_block_runs():
    """The device here is one without values: what a block is given and what it is afterwards tell."""
    block, seen = Block(), []
    stream([block], lambda: torch.device("meta"))
    block.linear.register_forward_pre_hook(
        lambda module, _: seen.append((module.weight.device.type, block.shift.device.type))
    )
    assert block(torch.zeros(3, 4, device="meta")).device.type == "meta"
    assert seen == [("meta", "meta")]
    assert {tensor.device.type for tensor in (*block.parameters(), *block.buffers())} == {"cpu"}


def test_after_an_error_the_originals_are_back():
    blocks, x = [Block(), Block()], torch.randn(3, 4)
    originals, want = [list(block.parameters()) for block in blocks], run(blocks, x)
    stream(blocks, lambda: CPU, ahead=True)
    blocks[0].broken = True
    with pytest.raises(RuntimeError, match="broken"):
        run(blocks, x)
    for block, own in zip(blocks, originals, strict=True):
        assert all(one is other for one, other in zip(block.parameters(), own, strict=True))
    blocks[0].broken = False
    assert torch.equal(run(blocks, x), want)


@pytest.mark.gpu
def test_on_a_gpu_values_are_equal_and_two_blocks_there():
    width, count = 2048, 8
    blocks = [nn.Linear(width, width) for _ in range(count)]
    x, size = torch.randn(64, width, device="cuda"), width * (width + 1) * 4
    there = [nn.Linear(width, width).cuda() for _ in range(count)]
    for own, copy in zip(blocks, there, strict=True):
        copy.load_state_dict(own.state_dict())
    want = run(there, x)
    del there, copy
    for block in blocks:
        for parameter in block.parameters():
            parameter.data = parameter.data.pin_memory()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stream(blocks, lambda: torch.device("cuda"), ahead=True)
    for _ in range(3):
        got = run(blocks, x)
    torch.cuda.synchronize()
    assert torch.equal(got, want)
    assert torch.cuda.max_memory_allocated() - before < 3 * size
