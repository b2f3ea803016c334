"""The autoencoder compiled, in one graph, and on other devices, against the plain one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kinoflow.tae import TAE
from tests.tae.compiling import CASES

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "sample" / "mini" / "tae"
ON_A_CPU = [name for name in CASES if name != "gpu"]


def compiled(*names: str) -> dict[str, str]:
    """What went wrong in these cases of compiling.py."""
    words = [sys.executable, "-m", "tests.tae.compiling", *names]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def problems() -> dict[str, str]:
    return compiled(*ON_A_CPU)


@pytest.mark.parametrize("name", ON_A_CPU)
def test_one_graph_gives_the_same_numbers(problems: dict[str, str], name: str) -> None:
    """Traced whole, without the C++ compiler that the default backend needs."""
    assert problems.get(name) is None, problems[name]


@pytest.mark.gpu
def test_compiled_on_a_gpu():
    assert compiled("gpu") == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_gives_the_numbers_of_the_cpu(dtype):
    tae = TAE.from_pretrained(WEIGHTS)
    clip = torch.rand(1, 3, 9, 32, 40) * 2 - 1
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    with torch.inference_mode():
        latent = tae.encode(clip).mean
        back = tae.decode(latent, 9)
        there = tae.to("cuda", dtype)
        close = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(there.encode(clip.to("cuda", dtype)).mean.float().cpu(), latent, **close)
        torch.testing.assert_close(there.decode(latent.to("cuda", dtype), 9).float().cpu(), back, **close)


def test_a_model_is_the_same_after_saving(tmp_path):
    tae = TAE.from_pretrained(WEIGHTS)
    tae.save_pretrained(tmp_path / "copy")
    again = TAE.from_pretrained(tmp_path / "copy")
    clip = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    with torch.inference_mode():
        assert torch.equal(tae.encode(clip).mean, again.encode(clip).mean)
    assert again.config == tae.config
