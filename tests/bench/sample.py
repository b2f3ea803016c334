"""How fast clips are made: `python tests/bench/sample.py [--json] [--steps 50] [--clips 8] …`.

shares   of one clip of the shipped release, from the prompt to the mp4, on one thread: text encoders,
         backbone, decoder, and what is neither of the last two (text, solver, guidance, noise, the file).
batch    clips/s of the shipped release: one at a time on one thread and on all, several at once in threads.
peer     our pipeline and diffusers' WanPipeline, random weights, one clip turn about: equal width, depth,
         tokens, steps, guidance and number of threads, feed-forwards of equally many weights (three matrices
         of 8/3 of the width, two of 4 times), and text states that are there already. The decoders
         are each one's own (Wan's compresses time by 4, ours by 8), so the flow is told apart.
memory   peak resident MiB of `kinoflow sample` for a clip of 2 s and one of 20 s, each in a fresh process
         (VmHWM, Linux only).
server   `kinoflow sample serve` under clients on loopback beside `kinoflow sample --prompts` of as many
         clips: clips/s, processor seconds a clip, the waiting, what was lost (server.py; Linux only).
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from server import server  # beside this file
from torch import Tensor, nn

from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.configs.pretrained import load_config
from kinoflow.dit_video import DiTConfig, VideoDiT
from kinoflow.sample.best import Take
from kinoflow.sample.card import ReleaseConfig
from kinoflow.sample.generate import Sampling
from kinoflow.sample.output import Output
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.release import Release
from kinoflow.sample.request import ClipRequest
from kinoflow.tae import TAE, TAEConfig, accelerate

HEAD, TEXT_WIDTH, TEXT_TOKENS, CHANNELS = 64, 512, 32, 16
LATENT_FRAMES, GUIDANCE = 4, 4.0
MINI_TAE = Path(__file__).parents[2] / "sample" / "mini" / "tae"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--json", action="store_true")
    add("--only", choices=("shares", "batch", "peer", "memory", "server"))
    add("--steps", type=int, default=50, help="of shares and peer")
    add("--batch-steps", type=int, default=8, help="of batch and server")
    add("--clips", type=int, default=8, help="of batch")
    add("--at-once", type=int, nargs="+", default=[2, 4, 8], help="of batch")
    add("--seconds", type=float, default=180, help="of server: how long clips are ordered")
    add("--clients", type=int, default=8, help="of server")
    add(
        "--poll",
        type=float,
        default=1,
        help="of server: seconds after which a client asks again, as OpenAI's",
    )
    add("--width", type=int, default=384, help="of peer")
    add("--depth", type=int, default=4, help="of peer")
    add("--side", type=int, default=16, help="of peer: pixels / 8")
    add("--rounds", type=int, default=3, help="of shares and peer; medians are printed")
    add("--threads", type=int, default=torch.get_num_threads(), help="of peer")
    return parser.parse_args(arguments)


class Stopwatch:
    """Seconds inside of calls, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Any:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def watch(self, model: nn.Module, name: str, method: str = "forward") -> None:
        """Count a method of a module from now on."""
        plain = getattr(model, method)

        def timed(*args: Any, **named: Any) -> Any:
            with self(name):
                return plain(*args, **named)

        setattr(model, method, timed)


def shares(steps: int, rounds: int) -> dict[str, float]:
    """Seconds of a clip of the shipped release, and the share of each part; medians."""
    pipeline = Pipeline(Release.load())
    backbone, encoder = pipeline.models.backbone(), pipeline.models.text()
    watch = Stopwatch()
    watch.watch(backbone, "backbone")
    assert isinstance(encoder, nn.Module)
    watch.watch(encoder, "text")
    plan = pipeline.plan(
        ClipRequest(prompt="a red star moves left on a gray background", steps=steps, best_of=1)
    )
    found: dict[str, list[float]] = {}
    with TemporaryDirectory() as folder:
        for _ in range(rounds + 1):
            watch.seconds.clear()
            started = time.perf_counter()
            take = pipeline.flow(plan, pipeline.conditions(plan))
            b = plan.bucket
            size = {"frames": b.frames, "height": b.height, "width": b.width, "fps": b.fps}
            output = Output(Path(folder, "a.mp4"), **size, crf=18, metadata=pipeline.metadata(plan))
            output.write(_decoded(pipeline, plan, take, watch))
            total = time.perf_counter() - started
            values = {name: seconds / total for name, seconds in watch.seconds.items()}
            overhead = 1 - values["backbone"] - values["decoder"]
            for name, value in ({"seconds": total} | values | {"overhead": overhead}).items():
                found.setdefault(name, []).append(value)
    return {name: round(statistics.median(values[1:]), 4) for name, values in found.items()}


def _decoded(pipeline: Pipeline, plan: Any, take: Take, watch: Stopwatch) -> Any:
    pieces = pipeline.decode(plan, take)
    while True:
        with watch("decoder"):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


def batch(steps: int, clips: int, at_once: list[int]) -> list[dict[str, float]]:
    """Clips/s of a list, one at a time and several at once."""
    release = Release.load()
    prompt = "a red star moves left"
    requests = [ClipRequest(prompt=prompt, seed=seed, steps=steps, best_of=1) for seed in range(clips)]
    rows = []
    ways = [(1, 1), (torch.get_num_threads(), 1), *((1, count) for count in at_once)]
    for threads, count in dict.fromkeys(ways):
        pipeline = Pipeline(release, threads=threads)
        pipeline.load()
        next(pipeline.batch(requests[:1]))
        started = time.perf_counter()
        for _ in pipeline.batch(requests, at_once=count):
            pass
        rate = clips / (time.perf_counter() - started)
        rows.append({"threads": threads, "at_once": count, "clips_per_second": round(rate, 4)})
    return rows


class Given:
    """Text states that are there."""

    def __init__(self, hidden: Tensor) -> None:
        self._text = (TextEmbedding(hidden=hidden, mask=torch.ones(hidden.shape[:2], dtype=torch.bool)),)

    def __call__(self, prompts: list[str], fps: Fraction) -> tuple[TextEmbedding, ...]:
        del prompts, fps
        return self._text

    def null(self) -> tuple[TextEmbedding, ...]:
        return self._text


@dataclass(frozen=True)
class Random(Release):
    """Models with random weights."""

    models: tuple[VideoDiT, TAE, Given] = ()  # pyright: ignore[reportAssignmentType]

    def backbone(self, *_: Any) -> VideoDiT:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.models[0]

    def decoder(self, *_: Any) -> TAE:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.models[1]

    def encoder(self, *_: Any) -> Given:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.models[2]


def ours(options: argparse.Namespace) -> tuple[Callable[[], object], Stopwatch, int]:
    """A call that makes a clip, what its parts took, and the weights of the backbone."""
    config = DiTConfig(
        width=options.width, depth=options.depth, heads=options.width // HEAD, ffn=options.width * 8 // 3,
        latent_channels=CHANNELS, text_widths=(TEXT_WIDTH,),
        max_tokens=(LATENT_FRAMES, options.side, options.side),
    )  # fmt: skip
    dit = VideoDiT(config)
    dit.init_weights()
    tae = TAE(load_config(MINI_TAE, TAEConfig))
    tae.init_weights()
    frames, side = LATENT_FRAMES * 8, options.side * 8
    clip = f"{frames}x{side}x{side}@16"
    sampling = Sampling(guidance_scale=GUIDANCE, num_steps=options.steps)
    card = ReleaseConfig(name="random", buckets=(clip,), default_bucket=clip, sampling=sampling)
    models = dit.eval(), accelerate(tae.eval()), Given(torch.randn(1, TEXT_TOKENS, TEXT_WIDTH))
    pipeline = Pipeline(Random(Path(), card, models=models), threads=options.threads)
    plan = pipeline.plan(ClipRequest(prompt="noise"))
    watch = Stopwatch()
    watch.watch(dit, "backbone")

    def call() -> None:
        with watch("flow"):
            take = pipeline.flow(plan, pipeline.conditions(plan))
        list(pipeline.decode(plan, take))

    return call, watch, _weights(dit)


def wan(options: argparse.Namespace) -> tuple[Callable[[], object], Stopwatch, int]:
    """The same of diffusers' pipeline."""
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    dit = WanTransformer3DModel(
        num_attention_heads=options.width // HEAD, attention_head_dim=HEAD, ffn_dim=options.width * 4,
        num_layers=options.depth, text_dim=TEXT_WIDTH, in_channels=CHANNELS, out_channels=CHANNELS,
    ).eval()  # fmt: skip
    vae = AutoencoderKLWan(base_dim=32, num_res_blocks=1).eval()
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=dit,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # pyright: ignore[reportArgumentType]
    pipeline.set_progress_bar_config(disable=True)
    watch, states = Stopwatch(), torch.randn(1, TEXT_TOKENS, TEXT_WIDTH)
    watch.watch(dit, "backbone")
    watch.watch(vae, "decoder", "decode")

    def call() -> None:
        started = time.perf_counter()
        pipeline(
            prompt_embeds=states,
            negative_prompt_embeds=states,
            height=8 * options.side,
            width=8 * options.side,
            num_frames=4 * (LATENT_FRAMES - 1) + 1,
            num_inference_steps=options.steps,
            guidance_scale=GUIDANCE,
        )
        flow = time.perf_counter() - started - watch.seconds["decoder"]
        watch.seconds["flow"] = flow

    return call, watch, _weights(dit)


def _weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def peer(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds of both, whole and of the flow, one clip of each in turns."""
    torch.set_num_threads(options.threads)
    subjects = {"kinoflow": ours(options), "diffusers": wan(options)}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in subjects}
    for _ in range(options.rounds + 1):
        for name, (call, watch, _) in subjects.items():
            watch.seconds.clear()
            started = time.perf_counter()
            call()
            seconds = watch.seconds | {"seconds": time.perf_counter() - started}
            for part in ("seconds", "flow", "backbone"):
                found[name].setdefault(part, []).append(seconds[part])
    medians = {
        name: {part: round(statistics.median(values[1:]), 3) for part, values in parts.items()}
        | {"parameters": subjects[name][2]}
        for name, parts in found.items()
    }
    kinoflow, diffusers = medians["kinoflow"], medians["diffusers"]
    times = {part: round(diffusers[part] / kinoflow[part], 3) for part in ("seconds", "flow")}
    return medians | {"times_faster": times}


CHILD = """
import sys
from kinoflow.sample.__main__ import main
status = main(sys.argv[1:])
print("peak", open("/proc/self/status").read(), file=sys.stderr)
sys.exit(status)
"""


def memory(steps: int = 2) -> dict[str, float]:
    """Peak MiB of both clips, and how much more the long one takes."""
    peaks = []
    with TemporaryDirectory() as folder:
        for frames in (32, 320):
            words = [
                "a red star moves left",
                "--frames",
                frames,
                "--steps",
                steps,
                "--out",
                f"{folder}/a.mp4",
            ]
            command = [sys.executable, "-c", CHILD, *map(str, words), "--json"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = re.search(r"VmHWM:\s+(\d+) kB", done.stderr)
            assert found is not None
            peaks.append(int(found[1]) / 1024)
    return {"short": round(peaks[0]), "long": round(peaks[1]), "growth": round(peaks[1] / peaks[0] - 1, 3)}


def main(arguments: list[str]) -> None:
    """Measure and print."""
    options = parse(arguments)
    parts: dict[str, Callable[[], Any]] = {
        "shares": lambda: shares(options.steps, options.rounds),
        "batch": lambda: batch(options.batch_steps, options.clips, options.at_once),
        "peer": lambda: peer(options),
        "memory": memory,
        "server": lambda: server(options),
    }
    figures: dict[str, Any] = {}
    for name in parts if options.only is None else [options.only]:
        figures[name] = parts[name]()
        rows = figures[name] if isinstance(figures[name], list) else [figures[name]]
        for row in [] if options.json else rows:
            print(f"{name:7}", "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
