"""Our autoencoders beside diffusers': `python tests/bench/tae.py [--json]`.

One clip, one dtype, one number of threads; released configurations, random weights; warm, median of a few
calls. Each model runs in a process of its own, so that its memory is its own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[0] = str(ROOT)  # not this folder, where this file would pass for the package that it measures

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from kinoflow.configs.schema import load  # noqa: E402
from kinoflow.tae import TAE, accelerate  # noqa: E402
from kinoflow.train.run.config import RunConfig  # noqa: E402

OURS = ("tae_movie_gen", "tae_fast", "tae_mini")
# diffusers' defaults of each class are the released configuration (Cosmos: CV8x8x8).
PEERS = {
    "wan": "AutoencoderKLWan",
    "hunyuan": "AutoencoderKLHunyuanVideo",
    "cogvideox": "AutoencoderKLCogVideoX",
    "ltx": "AutoencoderKLLTXVideo",
    "cosmos": "AutoencoderKLCosmos",
}
# (ours, peer, how many times as fast encoding and decoding together shall be)
TARGETS = (("tae_movie_gen", "wan", 1.8), ("tae_movie_gen", "hunyuan", 3.5), ("tae_fast", "cosmos", 1.2))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEAK = "peak"

Figures = dict[str, Any]


def build(name: str) -> nn.Module:
    """A model at its released configuration; tae_mini with its weights, the others with random ones."""
    torch.manual_seed(0)
    if name == "tae_mini":
        return TAE.from_pretrained(ROOT / "sample" / "mini" / "tae")
    if name in PEERS:
        import diffusers

        return getattr(diffusers, PEERS[name])()
    model = TAE(load(RunConfig, [str(ROOT / "configs" / "models" / f"{name}.yaml")]).tae)
    model.init_weights()
    return model.to(memory_format=torch.channels_last_3d)


def calls(model: nn.Module, video: Tensor) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    """Encode the clip to its latent, and decode a latent."""
    if isinstance(model, TAE):
        return lambda: model.encode(video).mean, lambda latent: model.decode(latent, video.shape[2])

    def encode() -> Tensor:
        return model.encode(video).latent_dist.mode()

    return encode, lambda latent: model.decode(latent).sample


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def resident() -> float:
    """Most memory that this process, or on a GPU its tensors, has held so far, in MiB."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.inference_mode()
def measure(name: str, options: argparse.Namespace) -> Figures:
    dtype = DTYPES[options.dtype]
    if name == PEAK:
        return {"flops_per_second": peak(dtype, options.repeats, options.device)}
    model = build(name).to(options.device, dtype).eval()
    if isinstance(model, TAE):
        accelerate(model)
    generator = torch.Generator().manual_seed(0)
    size = (1, 3, options.frames, options.size, options.size)
    video = (torch.rand(size, generator=generator) * 2 - 1).to(options.device, dtype)
    encode, decode = calls(model, video)
    before = resident()
    latent = encode()
    decode(latent)
    memory = resident() - before
    figures: Figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "latent": list(latent.shape),
        "peak_mib": memory,
    }
    for verb, call in (("encode", encode), ("decode", lambda: decode(latent))):
        spent = seconds(call, options.repeats)
        figures[verb] = {
            "seconds": spent,
            "megapixels_per_second": video[:, 0].numel() / spent / 1e6,
            "flops": counted(call),
        }
    return figures


def peak(dtype: torch.dtype, repeats: int, device: str) -> float:
    """Operations a second of a large convolution, the best of a few: what a model can at most run at."""
    like = {"dtype": dtype, "device": device}
    x = torch.randn(8, 512, 64, 64, **like).to(memory_format=torch.channels_last)
    weight = torch.randn(512, 512, 3, 3, **like).to(memory_format=torch.channels_last)

    def convolve() -> Tensor:
        return F.conv2d(x, weight, padding=1)

    flops = counted(convolve)
    return flops / min(seconds(convolve, 1) for _ in range(max(repeats, 3)))


_PASSED = ("dtype", "device", "threads", "repeats", "frames", "size")


def alone(name: str, options: argparse.Namespace) -> Figures:
    """`measure` in a process of its own."""
    passed = [f"--{key}={getattr(options, key)}" for key in _PASSED]
    command = [sys.executable, str(Path(__file__)), "--worker", name, *passed]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compared(models: dict[str, Figures]) -> list[Figures]:
    """Each of ours against each peer: how many times as fast, and what it should be."""
    aims = {(ours, peer): aim for ours, peer, aim in TARGETS}

    def both(name: str) -> float:
        return models[name]["encode"]["seconds"] + models[name]["decode"]["seconds"]

    return [
        {
            "ours": ours,
            "peer": peer,
            "encode": models[peer]["encode"]["seconds"] / models[ours]["encode"]["seconds"],
            "decode": models[peer]["decode"]["seconds"] / models[ours]["decode"]["seconds"],
            "both": both(peer) / both(ours),
            "target": aims.get((ours, peer)),
        }
        for ours in OURS
        for peer in PEERS
        if "encode" in models.get(ours, {}) and "encode" in models.get(peer, {})
    ]


def show(figures: Figures) -> None:
    limit = figures["peak_flops_per_second"]
    console = Console(width=max(Console().width, 110))
    table = Table(box=None)
    heads = ("model", "M parameters", "encode s", "Mpixel/s", "of peak", "decode s", "Mpixel/s", "of peak")
    for head in (*heads, "peak MiB"):
        table.add_column(head, justify="left" if head == "model" else "right")
    for name, model in figures["models"].items():
        cells = []
        if "error" in model:
            continue
        for verb in (model["encode"], model["decode"]):
            cells += [f"{verb['seconds']:.3f}", f"{verb['megapixels_per_second']:.3f}"]
            cells.append(f"{verb['flops'] / verb['seconds'] / limit:.0%}")
        table.add_row(name, f"{model['parameters'] / 1e6:.1f}", *cells, f"{model['peak_mib']:.0f}")
    console.print(table)
    for name, model in figures["models"].items():
        if "error" in model:
            console.print(f"{name} cannot run: {model['error']}")
    for ratio in figures["ratios"]:
        target = "" if ratio["target"] is None else f" (target {ratio['target']})"
        parts = f"encode {ratio['encode']:.2f}, decode {ratio['decode']:.2f}"
        console.print(f"{ratio['ours']} is {ratio['both']:.2f} x {ratio['peer']}: {parts}{target}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5, help="the median of this many calls (default: 5)")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels (default: 128)")
    parser.add_argument("--only", nargs="+", choices=(*OURS, *PEERS), help="these models (default: all)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Measure every model, one process after another."""
    options = parse(arguments)
    if options.worker is not None:
        torch.set_num_threads(options.threads)
        try:
            figures = measure(options.worker, options)
        except RuntimeError as error:  # a peer that lacks a kernel in this dtype; the reason is shown
            figures = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        print(json.dumps(figures))
        return
    models = {name: alone(name, options) for name in options.only or (*OURS, *PEERS)}
    figures = {
        "clip": f"{options.frames}x{options.size}x{options.size}",
        "dtype": options.dtype,
        "device": options.device,
        "threads": options.threads,
        "repeats": options.repeats,
        "peak_flops_per_second": alone(PEAK, options)["flops_per_second"],
        "models": models,
        "ratios": compared(models),
    }
    if options.json:
        print(json.dumps(figures))
    else:
        show(figures)


if __name__ == "__main__":
    main(sys.argv[1:])
