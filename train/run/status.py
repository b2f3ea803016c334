"""`kinoflow train status RUN`: how far a run is, whether it runs, and what went wrong."""

import fcntl
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import read_json_lines
from kinoflow.train.run import checkpoint
from kinoflow.train.run.guard import EVENTS
from kinoflow.train.run.lock import LOCK
from kinoflow.train.run.log import LOG
from kinoflow.train.run.watch import BEATS

USAGE = """usage: kinoflow train status RUN [--json]

Says of a run folder how far it is, whether it runs and where each process is, its newest checkpoint, and what
went wrong. Nothing is changed."""
_WIDTH, _BLOCKS = 64, "▁▂▃▄▅▆▇█"
_LAST_EVENTS = 3


def main(words: Sequence[str]) -> int:
    """Print the status of a run; 0.

    Raises:
        UserError: not one folder, or one without a run.
    """
    places = [word for word in words if word != "--json"]
    if len(places) != 1:
        raise UserError(f"give one run folder: {USAGE.splitlines()[0]}")
    found = status(Path(places[0]))
    print(json.dumps(found) if "--json" in words else text(found))
    return 0


def status(run: Path) -> dict[str, Any]:
    """What the files of a run folder say, in plain values; times in seconds.

    Raises:
        UserError: there is no run in it.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: no run has begun here; name the folder that was run=")
    lines, events = read_json_lines(run / LOG), read_json_lines(run / EVENTS)
    steps = _steps(run)
    last = lines[-1] if lines else {}
    holder = _holder(run / LOCK)
    saved = checkpoint.folders(run / "checkpoints")
    aside = read_json_lines(run / "quarantine.jsonl")
    lacks = {int(path.name): problem for path in saved if (problem := checkpoint.incomplete(path))}
    whole = [int(path.name) for path in saved if int(path.name) not in lacks]
    done = max(last.get("step", 0), *whole, 0)
    per_step = _seconds_per_step(lines)
    return {
        "run": str(run),
        "state": "running" if holder else "finished" if max(whole, default=0) >= steps else "stopped",
        "step": done,
        "steps": steps,
        "by": holder,
        "seconds_left": None if per_step is None else per_step * (steps - done),
        "figures": {key: value for key, value in last.items() if key not in ("step", "seconds")},
        "losses": [line["loss"] for line in lines if "loss" in line],
        "held_out_losses": [line["validation_loss"] for line in lines if "validation_loss" in line],
        "silent_seconds": _age(run),
        "checkpoints": whole,
        "broken_checkpoints": lacks,
        "events": dict(Counter(event["event"] for event in events)),
        "last_events": [event["text"] for event in events[-_LAST_EVENTS:]],
        "bad_clips": len({(line.get("list"), line.get("path")) for line in aside}),
        "processes": _processes(run / BEATS) if holder else [],
    }


def text(found: dict[str, Any]) -> str:
    """For people."""
    left = found["seconds_left"]
    time_left = f", about {_duration(left)} left" if left is not None and found["state"] == "running" else ""
    by = f" by {found['by']}" if found["by"] else ""
    ago = "" if found["state"] == "running" else f", {_duration(found['silent_seconds'])} ago"
    rows = [f"{found['run']}: {found['state']}{by}, step {found['step']} of {found['steps']}{time_left}{ago}"]
    for name, losses in (("loss", found["losses"]), ("held-out loss", found["held_out_losses"])):
        if losses:
            rows.append(f"{name}  {plot(losses)}  {losses[0]:.4g} to {losses[-1]:.4g}")
    figures = [f"{key} {value:.4g}" for key, value in found["figures"].items() if isinstance(value, float)]
    rows += [f"last  {', '.join(figures)}"] if figures else []
    rows.append(f"checkpoints  {', '.join(map(str, found['checkpoints'])) or 'none yet'}")
    rows += [f"broken  checkpoint {step}: {lack}" for step, lack in found["broken_checkpoints"].items()]
    if found["bad_clips"]:
        rows.append(f"clips set aside  {found['bad_clips']} (quarantine.jsonl)")
    for event in found["last_events"]:
        rows.append(f"event  {event}")
    for process in found["processes"]:
        rows.append(f"rank {process['rank']}  {process['waited']:.0f} s in {process['place']}")
    return "\n".join([*rows, *_next(found)])


def _next(found: dict[str, Any]) -> list[str]:
    """What to do with a run that does not run."""
    newest, broken = max(found["checkpoints"], default=0), found["broken_checkpoints"]
    if found["state"] == "running":
        return []
    if broken and not found["checkpoints"]:
        return ["next  no checkpoint is whole: bring the files back, or remove the folder to start from 0"]
    if newest >= found["steps"]:
        return [f"next  kinoflow train export {found['run']} RELEASE"]
    again = f", {found['step'] - newest} steps again" if found["step"] > newest else ""
    return [f"next  the command that began it goes on from step {newest}{again}"]


def plot(values: Sequence[float]) -> str:
    """A line of blocks, each the mean of its share of the values, from the least to the greatest.

    Where all are above 0 their logarithms are drawn: what a loss still loses at its end would not be seen.
    """
    count = min(len(values), _WIDTH)
    cuts = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    if min(means) > 0:
        means = [math.log(mean) for mean in means]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def _steps(run: Path) -> int:
    from kinoflow.configs.schema import load
    from kinoflow.train.run.config import RunConfig

    return load(RunConfig, [str(run / "config.yaml")]).steps


def _age(run: Path) -> float:
    """Seconds since the newest line of the log, or since the run began."""
    newest = run / LOG if (run / LOG).is_file() else run / "config.yaml"
    return max(time.time() - newest.stat().st_mtime, 0.0)


def _holder(path: Path) -> str | None:
    """Who has the run, None when nobody has."""
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip()
    return None


def _seconds_per_step(lines: Sequence[dict[str, Any]]) -> float | None:
    """Of the newest lines, which were written by one process: its clock begins at 0."""
    recent = [line for line in lines[-10:] if "seconds" in line]
    while len(recent) > 1 and any(b["seconds"] < a["seconds"] for a, b in pairwise(recent)):
        recent = recent[1:]
    if len(recent) < 2:
        return None
    return (recent[-1]["seconds"] - recent[0]["seconds"]) / max(recent[-1]["step"] - recent[0]["step"], 1)


def _processes(beats: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(beats.glob("*.json"), key=lambda path: int(path.stem)):
        beat = read_json_lines(path)
        if beat:
            silent = time.time() - beat[0]["time"]
            found.append(
                {"rank": int(path.stem), "place": beat[0]["place"], "waited": beat[0]["waited"] + silent}
            )
    return found


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    shown = [f"{count} {unit}" for count, unit in parts if count][:2]
    return " ".join(shown) or "0 s"
