"""How fast the shipped release runs: `python tests/bench/release.py [--json] [--device cuda]`.

Warm, median of five.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from kinoflow.configs.devices import parse_device
from kinoflow.sample.release import Release

REPEATS = 5


def median_seconds(call: Callable[[], object]) -> float:
    """Median time of a call after one that warms up."""
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


@torch.inference_mode()
def main(arguments: list[str]) -> None:
    """Time text encoding, one guided velocity, encoding and decoding at the default bucket."""
    options = parse(arguments)
    release, device = Release.load(), parse_device(options.device)
    bucket = release.bucket()
    dit, tae, encoder = release.backbone(device), release.tae(device), release.encoder(device=device)
    video = torch.rand(1, 3, bucket.frames, bucket.height, bucket.width, device=device) * 2 - 1
    latent = tae.encode(video).mean
    text = encoder(["a red star moves left on a gray background"] * 2, bucket.fps)
    context, both, time_ = (
        dit.encode_condition(text),
        torch.cat((latent, latent)),
        torch.full((2,), 0.5, device=device),
    )
    seconds = {
        "prompt": median_seconds(lambda: encoder(["a red star moves left"], bucket.fps)),
        "guided_velocity": median_seconds(lambda: dit(both, time_, context)),
        "encode": median_seconds(lambda: tae.encode(video)),
        "decode": median_seconds(lambda: tae.decode(latent, bucket.frames)),
    }
    figures = {
        "clip": str(bucket),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
    }
    print(json.dumps(figures) if options.json else "\n".join(f"{k:16} {v:.4f} s" for k, v in seconds.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
