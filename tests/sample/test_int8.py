"""`--dtype int8`: nearly the frames of fp32, in less memory, and made again."""

import json
from pathlib import Path

import numpy as np
import torch

from kinoflow.sample.__main__ import main
from kinoflow.sample.picture import read_frames
from kinoflow.sample.pipeline import Pipeline


def test_the_shipped_release_loses_nothing():
    """Its backbone comes in 8 bits with scales of the same rows: only kernels round otherwise, or do not."""
    asked = {"prompt": "a red star on a gray background", "frames": 1, "steps": 8, "latent": True}
    exact, held = (Pipeline.from_pretrained(device="cpu", dtype=dtype) for dtype in ("fp32", "int8"))
    one, other = exact(**asked, best_of=1), held(**asked, best_of=1)
    torch.testing.assert_close(other.latent, one.latent, rtol=0, atol=1e-2)
    assert np.abs(one.frames.astype(int) - other.frames).mean() < 0.1
    assert held.bytes()["backbone"] < 0.4 * exact.bytes()["backbone"]
    assert held.dtype == torch.int8 and other.metadata["dtype"] == "int8"


def test_a_clip_of_it_is_made_again(run, tiny_release, capsys):
    words = ["a ring", "--frames", "1", "--json"]
    code, out, _ = run(*words, "--dtype", "int8", "--out", "x.png")
    assert (code, json.loads(out)["clips"][0]["dtype"]) == (0, "int8")
    assert main(["again", "x.png", "--weights", str(tiny_release.folder)]) == 0
    assert capsys.readouterr().out == "x.png: equal, to the byte\n"
    assert run(*words, "--out", "y.png")[0] == 0
    assert not np.array_equal(read_frames(Path("x.png")), read_frames(Path("y.png")))
