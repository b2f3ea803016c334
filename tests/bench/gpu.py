"""All that wants a GPU, in the order of its worth: `make gpu`, or `python tests/bench/gpu.py [--out FOLDER]`.

Each part runs in processes of its own within its time limit; after each, FOLDER/gpu.json holds the figures of
all so far, and the same command goes on behind them. Without a GPU, what a CPU can stand in for is done in
little, and what is left out is said. At the end a table in Markdown is printed, for docs/LOG.md.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
GPU = torch.cuda.is_available()
Figures = dict[str, Any]

_MINI = ["release=sample/mini", "threads=1"]
_BUCKET = "8x64x64@16"
_PRECISION = "bf16" if GPU else "fp32"  # most CPUs take ten times as long in bf16
_OF = {"tae": ["data.world_share=1"], "dit": ["release=sample/mini", "preview_prompts=world"]}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One measurement: `run` gets the folder for what it writes, and a deadline in seconds a command."""

    name: str
    about: str
    seconds: int
    run: Callable[[Path, int], Figures]
    needs_gpu: bool = False


def python(arguments: list[str], seconds: int) -> str:
    """What a Python command prints; RuntimeError with its last line when it fails or takes too long."""
    command = [sys.executable, *arguments]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"longer than {seconds} s") from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()
        raise RuntimeError(f"exit {done.returncode}: {lines[-1][:300]}")
    return done.stdout


def tests(_folder: Path, seconds: int) -> Figures:
    """The tests with the gpu mark: parity of kernels, offload, the codec."""
    return {"said": python(["-m", "pytest", "-q", "-m", "gpu"], seconds).strip().splitlines()[-1]}


def steps(folder: Path, seconds: int) -> Figures:
    """Steps, a preview and a checkpoint of both tasks under ZeRO 0 to 3; on a GPU in bf16, compiled too."""
    latents = folder / "latents"
    words = [f"out={latents}", "source=world", "clips=8", f"buckets=[{_BUCKET}]", "batch_size=4", *_MINI]
    python(["-m", "kinoflow.train", "precompute", *words], seconds)
    found: Figures = {}
    for stage in range(4):
        for compiled in (False, True) if GPU else (False,):
            for task in ("tae", "dit"):
                name = f"{task}_zero{stage}{'_compiled' if compiled else ''}"
                how = [f"deepspeed.zero_stage={stage}", f"parallel.compile={str(compiled).lower()}"]
                found[name] = _trained(
                    folder / name, task, [*how, *_OF[task], f"data.latents={latents}"], seconds
                )
    return found


def _trained(run: Path, task: str, how: list[str], seconds: int) -> Figures:
    # One thread: two that wait for each other take many times as long where anything else runs.
    words = [
        f"configs/models/{task}_mini.yaml", *([] if GPU else ["threads=1"]), f"run={run}", "steps=4",
        "log_every=1", "checkpoint_every=4", "preview_every=4", f"deepspeed.precision={_PRECISION}",
        "deepspeed.persistent=0", "data.batch_size=2", f"data.buckets=[{_BUCKET}]",
        "optimizer.warmup_steps=1", *how,
    ]  # fmt: skip
    try:
        python(["-m", "kinoflow.train", *words], seconds)
    except RuntimeError as error:
        return {"error": str(error)}
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    keep = ("loss", "grad_norm", "samples_per_second", "peak_memory_bytes", "mfu")
    return {"losses": [line["loss"] for line in lines]} | {k: lines[-1][k] for k in keep if k in lines[-1]}


def sampling(folder: Path, seconds: int) -> Figures:
    """The shipped release in each number type beside the CPU in fp32: seconds, how near the frames are."""
    found: Figures = {}
    places = [("cpu", "fp32"), *([("cuda", kind) for kind in ("fp32", "bf16", "fp16")] if GPU else [])]
    for device, kind in places:
        out = folder / f"sample-{device}-{kind}.mp4"
        words = ["a red star moves left on a gray background", "--device", device, "--dtype", kind, "--json"]
        said = python(["-m", "kinoflow", "sample", *words, "--steps", "8", "--out", str(out)], seconds)
        found[f"{device}_{kind}"] = {"seconds": json.loads(said)["clips"][0]["seconds"]}
    if GPU:
        found["psnr_to_cpu"] = _psnr(folder, places)
    return found


def _psnr(folder: Path, places: list[tuple[str, str]]) -> Figures:
    from kinoflow.data import video

    clips = {place: video.read(folder / f"sample-{place[0]}-{place[1]}.mp4") for place in places}
    truth = torch.from_numpy(clips[places[0]]).float()
    errors = {
        place: (torch.from_numpy(clip).float() - truth).square().mean() for place, clip in clips.items()
    }
    return {
        f"{device}_{kind}": float(10 * torch.log10(255**2 / errors[device, kind].clamp(min=1e-9)))
        for device, kind in places[1:]
    }


def backbone(_folder: Path, seconds: int) -> Figures:
    """Training MFU of dit_1b at three lengths, compiled, with each kernel."""
    return json.loads(python(["tests/bench/dit_training.py"], seconds).splitlines()[-1])


def autoencoders(_folder: Path, seconds: int) -> Figures:
    """Encode and decode beside diffusers' classes, in bf16 at three sizes; on a CPU ours alone, small."""
    words = ["tests/bench/tae.py", "--json", "--repeats", "3" if GPU else "1"]
    if not GPU:
        said = python([*words, "--only", "tae_fast", "tae_mini", "--size", "64"], seconds)
        return {"64": json.loads(said)}
    found = {}
    for size in (256, 512, 768):
        how = ["--dtype", "bfloat16", "--device", "cuda", "--size", str(size)]
        found[str(size)] = json.loads(python([*words, *how], seconds // 3))
    return found


def shipped(_folder: Path, seconds: int) -> Figures:
    """The shipped release's parts: a prompt, a guided velocity, encoding, decoding."""
    device = "cuda" if GPU else "cpu"
    return json.loads(python(["tests/bench/release.py", "--json", "--device", device], seconds))


PARTS = (
    Part(name="tests", about="tests with the gpu mark", seconds=240, run=tests, needs_gpu=True),
    Part(name="steps", about="ZeRO 0-3 in bf16, both tasks", seconds=240, run=steps),
    Part(name="sampling", about="the shipped release, each number type", seconds=120, run=sampling),
    Part(name="backbone", about="training MFU of dit_1b", seconds=420, run=backbone, needs_gpu=True),
    Part(name="autoencoders", about="beside diffusers' classes", seconds=420, run=autoencoders),
    Part(name="shipped", about="parts of the shipped release", seconds=120, run=shipped),
)


def measured(part: Part, folder: Path) -> Figures:
    """The figures of a part, or why there are none."""
    if part.needs_gpu and not GPU:
        return {"left_out": "needs a GPU"}
    began = time.perf_counter()
    try:
        figures = part.run(folder, part.seconds)
    except (RuntimeError, ValueError, OSError) as error:
        figures = {"error": str(error)}
    return figures | {"part_seconds": round(time.perf_counter() - began, 1)}


def rows(name: str, figures: Any) -> list[str]:
    """A line of Markdown for each figure, named by its path."""
    if isinstance(figures, dict):
        return [row for key, value in figures.items() for row in rows(f"{name}.{key}", value)]
    if isinstance(figures, list):
        return [f"| {name} | {', '.join(map(_shown, figures))} |"]
    return [f"| {name} | {_shown(figures)} |"]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: list[str]) -> int:
    """Run what is not done yet; 1 when a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="default: runs/gpu")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "gpu.json"
    device = torch.cuda.get_device_name() if GPU else "no GPU: a CPU stands in"
    known = json.loads(file.read_text()) if file.is_file() else {}
    found: Figures = (
        known if known.get("device") == device else {"device": device, "torch": torch.__version__}
    )
    for part in PARTS:
        if part.name in (options.only or [part.name]) and "error" in found.get(part.name, {"error": ""}):
            print(f"{part.name}: {part.about} …", flush=True)
            found[part.name] = measured(part, options.out)
            file.write_text(json.dumps(found, indent=1))
    print("\n".join(["| figure | value |", "| --- | --- |", *rows("gpu", found)]))
    failed = [row for row in rows("gpu", found) if ".error |" in row]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
