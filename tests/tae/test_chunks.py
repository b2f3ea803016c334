"""Streams hold what they must, and malloc keeps pages: seen in what is alive and in what the kernel gives."""

import ctypes
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from kinoflow.tae import TAE, TAEConfig
from kinoflow.tae.model import chunks
from kinoflow.tae.model.chunks import fork, gather
from kinoflow.tae.tiles.memory import _LiveBytes

FAULTS = """
import resource, torch
from kinoflow.tae.cpu.heap import keep_pages, pages_given_back

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def use(mebibytes=20):
    blocks = [torch.empty(mebibytes << 18).fill_(1.0) for _ in range(6)]

def taken():
    before = faults()
    use(19)  # a little less: whether an aligned block fits again just where one was depends on its neighbours
    return faults() - before

keep_pages()
use()
kept = taken()
with pages_given_back():
    use()
print(kept, taken())
"""
GLIBC = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="settings of glibc"
)


def pages(**variables: str) -> tuple[int, int]:
    """Pages that 114 MiB take after 120 MiB were asked for and freed, and after they were given back too."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        cwd=Path(__file__).parents[2],
        env={name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables,
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
    )
    kept, given_back = map(int, done.stdout.split())
    return kept, given_back


@GLIBC
def test_pages_are_kept_until_they_are_given_back_unless_the_environment_says_otherwise():
    kept, given_back = pages()
    assert kept < 0.5 * given_back
    assert kept < 0.5 * pages(MALLOC_MMAP_THRESHOLD_=str(2**16))[0]


def test_gather_is_the_first_frames_of_the_joined_chunks_and_asks_for_no_more():
    whole = torch.arange(24.0).view(1, 2, 12, 1, 1)
    source = iter(whole.split([5, 4, 3], dim=2))
    assert torch.equal(gather(source, 7), whole[:, :, :7])
    assert torch.equal(next(source), whole[:, :, 9:])
    assert torch.equal(gather(whole.split(5, dim=2), 12), whole)


def test_gather_says_where_chunks_end_too_early():
    with pytest.raises(ValueError, match="frames: the chunks end after 2 of 3"):
        gather(torch.zeros(1, 1, 2, 1, 1).split(1, dim=2), 3)


def test_fork_gives_the_chunks_twice_and_holds_only_the_lag():
    """Weak references tell what is alive: a chunk that both have given is gone."""
    made: list[weakref.ref[torch.Tensor]] = []

    def source():
        for i in range(10):
            chunk = torch.full((1,), float(i))
            made.append(weakref.ref(chunk))
            yield chunk
            del chunk

    first, second = fork(source())
    for i in range(3):
        assert next(first).item() == i
    for i in range(3, 10):
        assert next(second).item() == i - 3
        assert next(first).item() == i
        # Three wait for the second; the first holds the last one until it is asked for the next.
        assert sum(ref() is not None for ref in made) <= 4
    assert [chunk.item() for chunk in second] == [7, 8, 9]
    assert next(first, None) is None and next(second, None) is None


def test_fork_says_so_when_the_second_goes_ahead():
    _, second = fork(torch.zeros(2, 1).unbind())
    with pytest.raises(RuntimeError, match="before the first"):
        next(second)


def test_a_long_clip_takes_hardly_more_memory_than_a_short_one(monkeypatch):
    """What is alive at once while frames stream through grows with the output, and with nothing else."""
    config = TAEConfig(channels=32, multipliers=(1, 1), strides=((2, 2, 2),), encoder_blocks=(1, 1),
                       decoder_blocks=(1, 1), latent_channels=4, attention=False)  # fmt: skip
    model = TAE(config).eval()
    model.init_weights()
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 1)
    peaks = []
    for frames in (12, 72):
        video = torch.zeros(1, 3, frames, 16, 16)
        with _LiveBytes() as live, torch.no_grad():
            latent = model.encode(video).mean
            model.decode(latent, frames)
        peaks.append(live.peak - 2 * video.nbytes)
    assert peaks[1] < 1.5 * peaks[0]
