"""Training MFU of configs/models/dit_1b.yaml on a CUDA device: `python tests/bench/dit_training.py`, JSON.

bf16, each block compiled, AdamW; clips of 1,024, 8,192 and 73,728 tokens (the last with every block computed
again), about 16,384 tokens a step and one clip at least; with sdpa, xformers and flex. The FLOPs are three
times those of a forward: what is computed again counts for nothing.
"""

import json
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import load
from kinoflow.dit_video import DiTConfig, VideoDiT
from kinoflow.dit_video.attention.kernels import KernelName
from kinoflow.dit_video.parallel import ParallelConfig, parallelize
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.log import peak_flops

SIZES = {1024: (4, 32, 32), 8192: (32, 32, 32), 73728: (32, 96, 96)}  # tokens: latent frames, height, width


def training(kernel: KernelName, tokens: int, repeats: int = 5) -> dict[str, Any]:
    """Tokens/s and MFU of optimizer steps of dit_1b on clips of so many tokens, on the CUDA device."""
    size = SIZES[tokens]
    config = load(RunConfig, ["configs/models/dit_1b.yaml"]).dit
    config = replace(config, attention=kernel, max_tokens=(size[0], size[1] // 2, size[2] // 2))
    clips = max(1, 16384 // tokens)
    shape, lengths = (clips, config.latent_channels, *size), (96, 16, 16)
    flops = 3 * forward_flops(replace(config, attention="math"), shape, lengths)
    model = VideoDiT(config).to("cuda", torch.bfloat16)
    model.init_weights()
    again = 1 if tokens > 16384 else 0
    parallelize(model, ParallelConfig(compile=True, checkpoint_every=again), None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    latent, time_, texts = batch(config, shape, lengths, torch.device("cuda"))

    def step() -> None:
        model(latent, time_, texts).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    times = []
    for _ in range(repeats + 1):  # the first compiles
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[1:])
    peak = peak_flops(torch.device("cuda"))
    return {"device": torch.cuda.get_device_name(), "seconds": seconds,
            "tokens_per_second": clips * tokens / seconds,
            "flops": flops, "mfu": flops / seconds / peak if peak else None,
            "peak_memory_bytes": torch.cuda.max_memory_allocated()}  # fmt: skip


def batch(
    config: DiTConfig, shape: tuple[int, ...], lengths: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, list[TextEmbedding]]:
    like = {"device": device, "dtype": torch.bfloat16}
    texts = [
        TextEmbedding(
            hidden=torch.randn(shape[0], length, width, **like),
            mask=torch.ones(shape[0], length, dtype=torch.bool, device=device),
        )
        for length, width in zip(lengths, config.text_widths, strict=True)
    ]
    return torch.randn(shape, **like), torch.rand(shape[0], **like), texts


def forward_flops(config: DiTConfig, shape: tuple[int, ...], lengths: tuple[int, ...]) -> int:
    """Counted on the meta device, where it costs nothing."""
    with torch.device("meta"):
        model = VideoDiT(config).to(torch.bfloat16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*batch(config, shape, lengths, torch.device("meta")))
    return counter.get_total_flops()


def on_cuda() -> dict[str, Any]:
    """The training figures of each kernel and length; what one lacks, in its place."""
    found: dict[str, Any] = {}
    for tokens in SIZES:
        for kernel in ("sdpa", "xformers", "flex"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                found[f"{kernel}_{tokens}"] = training(kernel, tokens)
            except (UserError, torch.OutOfMemoryError) as error:
                found[f"{kernel}_{tokens}"] = {"unavailable": str(error).splitlines()[0]}
    return found


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("nothing to measure: torch sees no CUDA device")
        sys.exit()
    print(json.dumps(on_cuda()))
