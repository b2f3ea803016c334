"""What malloc is told, seen in the pages that a process is given."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource, torch
from tae.chunks import keep_pages

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def use():
    blocks = [torch.empty(20 << 18).fill_(1.0) for _ in range(6)]  # of 20 MiB

keep_pages()
use()
before = faults()
use()
print(faults() - before)
"""


def pages(**variables: str) -> int:
    """Pages that the same 120 MiB take when they are asked for again."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        cwd=Path(__file__).parents[2],
        env={name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="a setting of glibc"
)
def test_pages_are_kept_unless_the_environment_says_otherwise():
    assert pages() < 0.5 * pages(MALLOC_MMAP_THRESHOLD_=str(2**16))
