"""How fast the backbone is beside its peers: `python tests/bench/dit.py [--json] [--key=value …]`.

Every model has the same width, depth, head width, text and number of video tokens, and runs in its own
process with the same threads and dtype; FFN ratio, norms and the way of the text are each model's own.

  per parameter      = tokens/s / parameters. At equal width and depth it is for a small model.
  token-parameters   = tokens/s x the weights that every video token is multiplied with (an adaptive norm's
                       matrix sees one row a clip): of two models with equal tokens/s the larger ranks higher.
  fraction of peak   = FLOPs / seconds / the fastest matmul. FlopCounterMode counts the forward, and with the
                       backward it is three times that: what is computed again counts for nothing.

Beside these the two-stream backbone and diffusers' own of the same shape, on a picture of as many tokens.

With a CUDA device also the training MFU of configs/models/dit_1b.yaml, compiled, bf16, with sdpa and with
xformers.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dit_subjects import DTYPES, MODELS, PAIR, Settings, Subject  # beside this file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_flop_count

from kinoflow.dit_video import VideoDiT
from kinoflow.dit_video.mmdit import MMDiT
from kinoflow.dit_video.parallel import ParallelConfig, parallelize

MATMULS = ((1024, 1024, 1024), (1024, 1024, 4096), (2048, 2048, 2048), (4096, 4096, 4096))


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Torch counts its fused attention on every device but a CPU."""
    return sdpa_flop_count(query, key, value)


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call after one that warms up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_peak(dtype: torch.dtype, repeats: int = 5) -> float:
    """FLOP/s of the fastest of several matrix products."""
    best = 0.0
    for rows, inner, columns in MATMULS:
        x, w = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        seconds = median_seconds(lambda x=x, w=w: F.linear(x, w), repeats)
        best = max(best, 2 * rows * inner * columns / seconds)
    return best


def token_parameters(subject: Subject, tokens: int) -> int:
    """Elements of the weights whose matrix product has a row for every video token."""
    found: dict[nn.Module, int] = {}

    def note(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.Linear) and arguments[0].numel() >= tokens * module.in_features:
            found[module] = module.weight.numel()

    handles = [module.register_forward_hook(note) for module in subject.model.modules()]
    with torch.no_grad():
        subject.call()
    for handle in handles:
        handle.remove()
    return sum(found.values())


def measure(name: str, s: Settings) -> dict[str, Any]:
    """Every figure of one model, in this process."""
    torch.set_num_threads(s.threads)
    torch.manual_seed(0)
    peak = matmul_peak(DTYPES[s.dtype])
    before = resident()
    subject = (MODELS | PAIR)[name](s)

    def both() -> None:
        subject.model.zero_grad(set_to_none=True)
        subject.call().float().square().mean().backward()

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        subject.call()
    own = token_parameters(subject, s.tokens)
    if s.compile:
        compile_blocks(subject)
    with torch.no_grad():
        forward = median_seconds(subject.call, s.repeats)
    forward_backward = median_seconds(both, s.repeats)
    parameters = sum(parameter.numel() for parameter in subject.model.parameters())
    figures = {"model": name, "parameters": parameters, "token_parameters": own, "matmul_peak": peak,
               "peak_memory_bytes": resident() - before}  # fmt: skip
    for kind, seconds, flops in (
        ("forward", forward, counter.get_total_flops()),
        ("forward_backward", forward_backward, 3 * counter.get_total_flops()),
    ):
        figures[kind] = {"seconds": seconds, "flops": flops, "tokens_per_second": s.tokens / seconds,
                         "tokens_per_second_per_parameter": s.tokens / seconds / parameters,
                         "token_parameter_tokens_per_second": own * s.tokens / seconds,
                         "fraction_of_peak": flops / seconds / peak}  # fmt: skip
    return figures


def compile_blocks(subject: Subject) -> None:
    torch._dynamo.reset()  # it remembers frames that it met under the counter as not to be compiled
    if isinstance(subject.model, VideoDiT | MMDiT):
        parallelize(subject.model, ParallelConfig(compile=True), None)
        return
    for name in subject.blocks:
        for block in getattr(subject.model, name):
            block.compile()


def resident() -> int:
    """The largest resident set of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_rounds(s: Settings, models: Iterable[str]) -> list[dict[str, Any]]:
    """All of them one after another, `rounds` times; of each the round of median forward + backward time.

    A machine has faster and slower minutes, which one round would give to single models.
    """
    rounds = [[in_child(name, s) for name in models] for _ in range(s.rounds)]
    return [
        sorted(figures, key=lambda f: f["forward_backward"]["seconds"])[s.rounds // 2]
        for figures in zip(*rounds, strict=True)
    ]


def in_child(name: str, s: Settings) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), f"--only={name}", *arguments_of(s)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(answer.stdout.splitlines()[-1])


def arguments_of(s: Settings) -> list[str]:
    return [f"--{key}={value}" for key, value in asdict(s).items()]


def compare(found: list[dict[str, Any]]) -> dict[str, float]:
    """Ours over the best peer and over the peers' median, forward and backward, and our share of the peak."""
    peak = max(figures["matmul_peak"] for figures in found)
    ours, *peers = (figures["forward_backward"] for figures in found)
    result = {}
    for key in ("tokens_per_second", "tokens_per_second_per_parameter", "token_parameter_tokens_per_second"):
        theirs = [peer[key] for peer in peers]
        result[f"{key}_over_best"] = ours[key] / max(theirs)
        result[f"{key}_over_median"] = ours[key] / statistics.median(theirs)
    for kind in ("forward", "forward_backward"):
        figures = found[0][kind]
        result[f"{kind}_fraction_of_peak"] = figures["flops"] / figures["seconds"] / peak
    return result


def table(found: list[dict[str, Any]]) -> str:
    lines = [f"{'':14}{'M params':>9}{'M token':>9}{'MiB':>7}{'fwd tok/s':>11}{'f+b tok/s':>11}"
             f"{'per M param':>13}{'G token-param':>15}{'of peak':>9}"]  # fmt: skip
    for f in found:
        both = f["forward_backward"]
        lines.append(
            f"{f['model']:14}{f['parameters'] / 1e6:9.1f}{f['token_parameters'] / 1e6:9.1f}"
            f"{f['peak_memory_bytes'] / 2**20:7.0f}{f['forward']['tokens_per_second']:11.0f}"
            f"{both['tokens_per_second']:11.0f}{both['tokens_per_second_per_parameter'] * 1e6:13.1f}"
            f"{both['token_parameter_tokens_per_second'] / 1e9:15.1f}{both['fraction_of_peak']:9.2f}"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Measure one model (--only) or compare all; on a CUDA device also the training MFU of dit_1b."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", choices=MODELS | PAIR)
    for field in fields(Settings):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    given = vars(parser.parse_args(arguments))
    as_json, only = given.pop("json"), given.pop("only")
    s = Settings(**given)
    if only:
        print(json.dumps(measure(only, s)))
        return
    found, pair = in_rounds(s, MODELS), in_rounds(s, PAIR)
    ours, theirs = (figures["forward_backward"]["tokens_per_second"] for figures in pair)
    summary = compare(found) | {"mmdit_tokens_per_second_over_sd3": ours / theirs}
    result: dict[str, Any] = {"settings": asdict(s), "models": [*found, *pair], "ours": summary}
    if torch.cuda.is_available():
        from dit_training import on_cuda  # beside this file

        result["training_dit_1b"] = on_cuda()
    if as_json:
        print(json.dumps(result))
        return
    print(table([*found, *pair]))
    print("\n".join(f"{key:44} {value:.3g}" for key, value in summary.items()))
    for kernel, figures in result.get("training_dit_1b", {}).items():
        print(f"training of dit_1b, {kernel}: {figures}")


if __name__ == "__main__":
    main(sys.argv[1:])
