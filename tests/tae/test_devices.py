"""The autoencoder compiled, in one graph, and on other devices, against the plain one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kinoflow.tae import TAE

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "sample" / "mini" / "tae"
# In a process of its own: the suite's type checks wrap every function, and Dynamo does not look through them.
COMPILED = """
import sys, torch
from kinoflow.tae import TAE
backend, device = sys.argv[1:]
tae = TAE.from_pretrained("sample/mini/tae").to(device)
encode = torch.compile(lambda clip: tae.encode(clip).mean, fullgraph=True, backend=backend)
decode = torch.compile(tae.decode, fullgraph=True, backend=backend)
torch.manual_seed(0)
with torch.inference_mode():
    for frames in (9, 1):
        clip = torch.rand(1, 3, frames, 32, 40, device=device) * 2 - 1
        latent = tae.encode(clip).mean
        torch.testing.assert_close(encode(clip), latent, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(decode(latent, frames), tae.decode(latent, frames), rtol=1e-3, atol=1e-3)
print("equal")
"""


def compiled(backend: str, device: str) -> str:
    words = [sys.executable, "-c", COMPILED, backend, device]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_one_graph_gives_the_same_numbers():
    """Traced whole, without the C++ compiler that the default backend needs."""
    assert compiled("aot_eager", "cpu") == "equal"


@pytest.mark.gpu
def test_compiled_on_a_gpu():
    assert compiled("inductor", "cuda") == "equal"


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
