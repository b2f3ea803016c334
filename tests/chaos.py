"""A training that everything happens to: `make chaos`, or `python tests/chaos.py [--seed 1] [--faults 20]`.

Two processes train an autoencoder on a list of clips, one of which is a pipe and one of which is damaged.
They are killed, stopped, told to end, their newest checkpoint is cut or a bit of it flipped, their disk is
full, and the folder of their clips is away for two seconds; after each the same command is given again. The
weights must be those of a run that nothing happened to, bit for bit. A second training, of a transformer, has
a shard with a number that is none in it from the start, which is damaged for a while.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np

from kinoflow.data import video
from kinoflow.data.clips import manifest
from kinoflow.data.clips.manifest import ClipEntry
from kinoflow.train.run import checkpoint
from kinoflow.train.run.watch import STOOD_STILL
from tests.train.launching import free_port

ROOT = Path(__file__).resolve().parents[1]
COMMON = ["log_every=1", "checkpoint_every=4", "ema_decay=0.9", "optimizer.lr=1e-3", "deepspeed.zero_stage=2",
          "patience=60", "threads=1", "data.batch_size=4"]  # fmt: skip
TINY_TAE = ["tae.channels=32", "tae.multipliers=[1,1]", "tae.strides=[[2,2,2]]", "tae.encoder_blocks=[1,1]",
            "tae.decoder_blocks=[1,1]", "tae.latent_channels=4", "tae.attention=false", "loss.adversarial=0",
            "loss.perceptual=0"]  # fmt: skip
CODES = {
    "kill": (-signal.SIGKILL, 1),
    "term": (143,),
    "usr1": (143,),
    "stop": (STOOD_STILL,),
    "full disk": (2,),
}


class Run:
    """The processes of one command, and what they printed."""

    def __init__(self, words: list[str], desk: Path, largest: int | None = None) -> None:
        port = free_port()
        self.printed = (desk / "printed.txt").open("w+")
        limit = None if largest is None else (lambda: _no_file_beyond(largest))
        own = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "PYTHONPATH": str(ROOT),
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "kinoflow.train", *words], cwd=desk,
                preexec_fn=limit,  # noqa: PLW1509
                env=os.environ | own | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=self.printed, stderr=subprocess.STDOUT,
            )
            for rank in range(2)
        ]  # fmt: skip

    def wait(self, seconds: float = 900) -> list[int]:
        return [process.wait(seconds) for process in self.processes]

    def text(self) -> str:
        self.printed.seek(0)
        return self.printed.read()


def _no_file_beyond(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


class Disk:
    """A tmpfs of its own for a folder, which can be full; who may mount none gets a limit of each file."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self.mounted = folder, os.geteuid() == 0 and _mount("size=256m", folder) == 0
        kind = "a tmpfs" if self.mounted else "a limit of 30 kB on each file, as only root may mount one"
        print(f"   the full disk is {kind}", flush=True)

    def fill(self) -> int | None:
        """Leave a few kilobytes; else the largest file that a run is to be allowed."""
        if not self.mounted:
            return 30_000
        found = os.statvfs(self._folder)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        assert _mount(f"remount,size={used + 16_384}", self._folder) == 0
        return None

    def empty(self) -> None:
        if self.mounted:
            assert _mount("remount,size=256m", self._folder) == 0

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self._folder)], check=True)


def _mount(options: str, folder: Path) -> int:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode


def steps_logged(run: Path) -> int:
    log = run / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def wait_for_steps(run: Path, more: int, job: Run) -> None:
    """Until so many more lines are in the log, or the job is over."""
    until = steps_logged(run) + more
    while steps_logged(run) < until and all(process.poll() is None for process in job.processes):
        time.sleep(0.05)


def happen(fault: str, job: Run, desk: Path, rng: random.Random) -> None:
    """Do to a running job what the fault is called by."""
    victim = rng.choice(job.processes)
    time.sleep(rng.random())
    if fault == "kill":
        victim.kill()
    elif fault == "stop":
        victim.send_signal(signal.SIGSTOP)
        other = next(process for process in job.processes if process is not victim)
        other.wait(900)
        victim.kill()
    elif fault in ("term", "usr1"):
        victim.send_signal(signal.SIGTERM if fault == "term" else signal.SIGUSR1)
    elif fault == "clips away":
        (desk / "clips").rename(desk / "away")
        time.sleep(2)
        (desk / "away").rename(desk / "clips")


def damage(fault: str, run: Path, rng: random.Random) -> str:
    """Cut or flip a file of the newest checkpoint; which."""
    newest = checkpoint.folders(run / "checkpoints")[-1]
    path = rng.choice([path for path in newest.iterdir() if path.stat().st_size > 200])
    content = bytearray(path.read_bytes())
    if fault == "cut file":
        del content[len(content) // 2 :]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"{newest.name}/{path.name}"


def weights(run: Path, steps: int) -> dict[str, bytes]:
    last = run / "checkpoints" / f"{steps:08d}"
    return {path.name: path.read_bytes() for path in sorted(last.glob("*.safetensors"))}


def clips(desk: Path) -> None:
    """Ten clips of noise, one of them a pipe and one damaged, and their list."""
    rng, entries = np.random.default_rng(0), []
    (desk / "clips").mkdir()
    for number in range(10):
        path = desk / "clips" / f"{number}.mp4"
        video.write(path, rng.integers(0, 255, (12, 32, 32, 3), np.uint8), fps=16)
        entries.append(
            ClipEntry(path=f"clips/{number}.mp4", frames=12, fps=video.probe(path).fps, width=32, height=32)
        )
    (desk / "clips" / "3.mp4").unlink()
    os.mkfifo(desk / "clips" / "3.mp4")
    (desk / "clips" / "7.mp4").write_bytes(b"damaged")
    manifest.write(desk / "clips.jsonl", entries)


def autoencoder(desk: Path, faults: list[str], rng: random.Random) -> bool:
    """Whether a training with the faults ends where one without them does."""
    with closing(Disk(desk / "run")) as disk:
        return _disturbed(desk, faults, rng, disk)


def _disturbed(desk: Path, faults: list[str], rng: random.Random, disk: Disk) -> bool:
    steps = 6 * len(faults)
    clips(desk)
    words = ["model=tae", *TINY_TAE, *COMMON, f"steps={steps}", "data.buckets=['4x16x16@16']",
             f"data.manifest={desk / 'clips.jsonl'}"]  # fmt: skip
    calm = Run([*words, "run=calm"], desk)
    assert calm.wait() == [0, 0], calm.text()
    run = desk / "run"
    for number, fault in enumerate(faults, 1):
        began, before = time.perf_counter(), steps_logged(run)
        if fault in ("cut file", "flipped bit"):
            told = damage(fault, run, rng) if checkpoint.folders(run / "checkpoints") else "no checkpoint yet"
            codes = []
        else:
            largest = disk.fill() if fault == "full disk" else None
            job = Run([*words, "run=run"], desk, largest=largest)
            wait_for_steps(run, rng.randrange(1, 8), job)
            happen(fault, job, desk, rng)
            if fault == "clips away":
                wait_for_steps(run, 3, job)
                for process in job.processes:
                    process.terminate()
            codes, told = job.wait(), job.text().strip().splitlines()[-1][:150]
            disk.empty()
            assert set(codes) & {0, *CODES.get(fault, (143,))}, (fault, codes, job.text())
        seconds = time.perf_counter() - began
        print(
            f"{number:2d} {fault:11s} {codes} steps {before} to {steps_logged(run)}, {seconds:.0f} s: {told}",
            flush=True,
        )
    last = Run([*words, "run=run"], desk)
    assert last.wait() == [0, 0], last.text()
    return weights(run, steps) == weights(desk / "calm", steps)


def transformer(desk: Path) -> bool:
    """Whether a number that is none costs its step alone, and a damaged shard no more than a start."""
    made = ["source=world", "buckets=[1x32x32@16]", "clips=16", "shard_size=4", "out=latents", "workers=0"]
    made = [
        sys.executable,
        "-m",
        "kinoflow.train",
        "precompute",
        *made,
        f"release={ROOT / 'sample' / 'mini'}",
    ]
    subprocess.run(made, cwd=desk, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    widths = json.loads((desk / "latents" / "index.json").read_text())["widths"]
    words = ["model=dit", "dit.width=32", "dit.depth=1", "dit.heads=2", "dit.ffn=64",
             "dit.latent_channels=16", "dit.max_tokens=[2,4,4]", f"dit.text_widths={widths}", *COMMON,
             "steps=12", "data.latents=latents"]  # fmt: skip
    shard = next((desk / "latents").glob("1x32x32*/00001/latent.npy"))
    values = np.load(shard)
    values[0, 0, 0, 0, 0] = np.nan
    np.save(shard, values)
    calm = Run([*words, "run=calm_dit"], desk)
    assert calm.wait() == [0, 0], calm.text()
    told = [json.loads(line) for line in (desk / "calm_dit" / "events.jsonl").read_text().splitlines()]
    assert told and all("00001 clip 0" in " ".join(event["clips"]) for event in told), told
    first = Run([*words, "run=dit", "steps=6"], desk)
    assert first.wait() == [0, 0], first.text()
    whole = shard.read_bytes()
    shard.write_bytes(whole[:50])
    bad = Run([*words, "run=dit"], desk)
    assert any(bad.wait()) and str(shard.relative_to(desk)) in bad.text(), bad.text()
    print(f"   shard damaged: {bad.text().strip().splitlines()[-1][:150]}", flush=True)
    shard.write_bytes(whole)
    last = Run([*words, "run=dit"], desk)
    assert last.wait() == [0, 0], last.text()
    return weights(desk / "dit", 12) == weights(desk / "calm_dit", 12)


FAULTS = (
    "kill",
    "term",
    "cut file",
    "kill",
    "flipped bit",
    "usr1",
    "clips away",
    "kill",
    "full disk",
    "stop",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=20)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    faults = [FAULTS[i % len(FAULTS)] for i in range(options.faults)]
    rng.shuffle(faults)
    checks: dict[str, Callable[[Path], bool]] = {
        "autoencoder": lambda desk: autoencoder(desk, faults, rng), "transformer": transformer,
    }  # fmt: skip
    equal = {}
    for name, check in checks.items():
        desk = Path(tempfile.mkdtemp(prefix="chaos-"))
        equal[name] = check(desk)
        print(f"{name}: {'bit for bit' if equal[name] else 'OTHER WEIGHTS, see ' + str(desk)}", flush=True)
        if equal[name]:
            shutil.rmtree(desk)
    return 0 if all(equal.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
