"""An autoencoder with a CPU's fast paths against the plain one, and that only `accelerate` puts them on."""

import copy
import ctypes
import io
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kinoflow.sample.release import Release
from kinoflow.tae import TAE, TAEConfig, accelerate
from kinoflow.tae import __main__ as command
from kinoflow.tae.cpu import heap, scratch, winograd
from kinoflow.tae.model.convolution import SpatialConv, TemporalConv
from kinoflow.train.tasks import precompute

ROOT = Path(__file__).parents[2]
# Wide and large enough for the convolution with half of the products; every kind of layer.
WIDE = TAEConfig(
    channels=96,
    multipliers=(1, 1),
    strides=((2, 2, 2),),
    encoder_blocks=(1, 1),
    decoder_blocks=(1, 1),
    latent_channels=4,
)
FRAMES, SIDE = 5, 32


def build() -> TAE:
    model = TAE(WIDE)
    torch.manual_seed(0)
    model.init_weights()
    return model.to(memory_format=torch.channels_last_3d).eval()


@pytest.fixture
def video() -> Tensor:
    return torch.rand(1, 3, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each fast path was taken."""
    counted: Counter[str] = Counter()
    convolve, take = winograd.conv3x3, scratch.take

    def count(name, call):
        return lambda *given: counted.update([name]) or call(*given)

    monkeypatch.setattr(winograd, "conv3x3", count("convolve", convolve))
    monkeypatch.setattr(scratch, "take", count("take", take))
    return counted


def outputs(model: TAE, video: Tensor) -> tuple[Tensor, Tensor]:
    latent = model.encode(video).mean
    return latent, model.decode(latent, FRAMES)


def put_on(model: TAE) -> list[str]:
    """Layers whose own attributes hold a fast path."""
    return [name for name, layer in model.named_modules() if {"convolve", "concatenate"} & vars(layer).keys()]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_accelerated_is_plain_and_takes_the_fast_paths(video, calls, mode):
    model = build()
    with mode():
        plain = outputs(model, video)
        assert not calls
        assert accelerate(model) is model
        fast = outputs(model, video)
    assert calls["convolve"] > 4 and calls["take"] > 4
    for one, other in zip(fast, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_twice_is_once(video):
    model = accelerate(build())
    layers = put_on(model)
    with torch.no_grad():
        once = outputs(model, video)
        twice = outputs(accelerate(model), video)
    assert put_on(model) == layers
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))


def test_only_layers_that_the_fast_paths_compute_have_them():
    model = build()
    assert not put_on(model)
    accelerate(model)
    wanted = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, TemporalConv) or (type(layer) is SpatialConv and layer.padding == (0, 1, 1))
    ]
    assert put_on(model) == wanted
    assert "encoder.layers.1.temporal" in wanted and "encoder.layers.1.spatial" not in wanted


def test_commands_and_sampling_put_them_on():
    arguments = command._parser().parse_args(["decode", "a.kino", "a.mp4"])
    assert put_on(command._codec(arguments)._tiled._tae)
    assert put_on(Release.load(ROOT / "sample" / "mini").tae())


@pytest.mark.parametrize("compiled", [False, True])
def test_precomputation_puts_them_on_unless_it_compiles(compiled, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precompute.PromptEncoder, "of_release", lambda *_, **__: torch.nn.Identity())
    config = precompute.PrecomputeConfig(release=str(ROOT / "sample" / "mini"), compile=compiled)
    assert bool(put_on(precompute.load_encoders(config).tae)) != compiled


def test_gradients_are_the_plain_ones(video, calls):
    gradients = []
    for model in (build(), accelerate(build())):
        model(video).video.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert not calls
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_under_autocast_nothing_changes(video, calls):
    model = build()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = outputs(model, video)
        fast = outputs(accelerate(model), video)
    assert not calls["convolve"]
    assert all(torch.equal(one, other) for one, other in zip(fast, plain, strict=True))


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float64, torch.device("meta")], ids=str)
def test_on_another_device_or_dtype_nothing_changes(to, monkeypatch):
    monkeypatch.setattr("kinoflow.tae.cpu.accelerate.keep_pages", lambda: pytest.fail("malloc was set"))
    model = build().to(to)
    assert accelerate(model) is model
    assert not put_on(model)


def test_a_model_that_moves_later_computes_as_without(video, calls):
    plain, fast, video = build().double(), accelerate(build()).double(), video.double()
    with torch.no_grad():
        for one, other in zip(outputs(fast, video), outputs(plain, video), strict=True):
            torch.testing.assert_close(one, other)
        assert outputs(fast.to("meta"), video.to("meta"))[1].shape == video.shape
    assert not calls["convolve"]


def test_copies_and_states(video, calls):
    """A copy, deep or through a file, has the fast paths; a state has none and fits either model."""
    plain, fast = build(), accelerate(build())
    stored = io.BytesIO()
    torch.save(fast, stored)
    stored.seek(0)
    with torch.no_grad():
        expected = outputs(fast, video)
        for again in (copy.deepcopy(fast), torch.load(stored, weights_only=False)):
            calls.clear()
            assert all(torch.equal(a, b) for a, b in zip(outputs(again, video), expected, strict=True))
            assert calls["convolve"] and calls["take"]
        for parameter in plain.parameters():
            parameter.add_(0.01)
        fast.load_state_dict(plain.state_dict())
        assert fast.state_dict().keys() == plain.state_dict().keys()
        for one, other in zip(outputs(fast, video), outputs(plain, video), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


class _Watched(dict[str, str]):
    """An environment that tells when it is asked."""

    def __init__(self, asked: list[str]) -> None:
        super().__init__()
        self._asked = asked

    def __iter__(self):
        self._asked.append("all")
        return super().__iter__()

    def __contains__(self, key):
        self._asked.append(str(key))
        return super().__contains__(key)

    def get(self, key, default=None):
        self._asked.append(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self._asked.append(key)
        return super().__getitem__(key)


class _Library(ctypes.CDLL):
    """A C library that writes down what malloc is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def mallopt(self, name: int, value: int) -> None:
        self.told.append((name, value))


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
@torch.no_grad()
def test_a_plain_model_reads_no_environment_and_leaves_malloc_alone(video, monkeypatch):
    model, asked, library = build(), list[str](), _Library()
    for once in (heap.keep_pages, heap._glibc):
        once.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", _Watched(asked))
        patch.setattr(ctypes, "CDLL", lambda _: library)
        outputs(model, video)
        assert not asked and not library.told
        accelerate(model)
        assert asked == ["all"]
        assert sorted(library.told) == [
            (heap.MMAP_THRESHOLD, heap.HEAP_BYTES),
            (heap.TRIM_THRESHOLD, heap.KEPT_BYTES),
        ]
    for once in (heap.keep_pages, heap._glibc):
        once.cache_clear()
