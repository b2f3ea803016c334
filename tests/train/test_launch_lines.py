"""Every launch line of the pages and of the YAML files is read by its launcher's own parser, and started.

It starts as its launcher would start it, in two processes, with a model, clips and a release that are as
small as they get, and otherwise as it stands: ZeRO stage, precision, sequence parallelism, tables of
positions. Lines that name the same stages and keys are started once.
"""

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from fractions import Fraction
from functools import cache
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from kinoflow.configs.schema import load
from kinoflow.data import video
from kinoflow.data.clips import manifest
from kinoflow.data.latents.shards import LatentDataset
from kinoflow.dit_video import VideoDiT
from kinoflow.sample.evaluation.judge import Judge, JudgeConfig
from kinoflow.tae import TAE
from kinoflow.train.__main__ import main
from kinoflow.train.plan.advice import misfits
from kinoflow.train.plan.config import PlanConfig
from kinoflow.train.plan.memory import GIB
from kinoflow.train.plan.planner import Planner
from kinoflow.train.run.config import RunConfig
from kinoflow.train.tasks.precompute import PrecomputeConfig, load_encoders, precompute
from tests.launch_lines import ROOT, Launch, LineError, of_comments, of_prose, read
from tests.test_readme import commands, launch_problems
from tests.train.conftest import _torchrun
from tests.train.test_launch import srun
from tests.train.tiny import BUCKET, DIT, STREAMS, write_release

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Those of `kinoflow data curate` start no training; tests/test_configs.py reads their lines.
FILES = sorted(
    path
    for path in (ROOT / "configs").rglob("*")
    if path.suffix in {".yaml", ".sbatch"} and "kinoflow data curate" not in path.read_text(encoding="utf-8")
)
# Keys in which lines may differ and still be one start.
ALIKE = r"run|out|seed|steps|optimizer\..+|loss\..+|data\.(world_share|batch_size|latents|manifest)"
CLUSTER = 8  # processes from which on a line is meant for GPUs
TEXT = ["width=16", "layers=1", "heads=2", "feed_forward=16", "max_tokens=128", "steps=1", "batch_size=4"]


def of_file(path: Path) -> list[list[str]]:
    """The commands of a page or a YAML file that start kinoflow.train."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".md":
        return list(of_comments(text))
    shown = [words for words in commands(text) if re.search(r"kinoflow[. ]train|\bsbatch\b", " ".join(words))]
    return [*shown, *of_prose(text)]


def lines() -> Iterator[Launch]:
    for words in (words for path in [*PAGES, *FILES] for words in of_file(path)):
        with suppress(LineError):  # which a test tells of
            yield read(words)


def kind(line: Launch) -> str:
    """What a start tries of it; of a model beside a stage nothing, for the start takes a small one."""
    own = sorted(key for key in line.keys if not re.fullmatch(ALIKE, key))
    stages = [file for file in line.files if "models/" not in file] or line.files
    words = [line.launcher or "python", line.verb, *(Path(file).stem for file in stages), *own]
    return "-".join(filter(None, words))


LINES = list(lines())
STARTS = {kind(line): line for line in reversed(LINES) if line.verb in {"", "precompute"}}
PLANS = {" ".join(line.sources): line for line in LINES if line.verb == "plan"}
ON_GPUS = {
    f"{line.processes} {' '.join(line.sources)}": line
    for line in LINES
    if line.verb == "" and (line.processes or 0) >= CLUSTER
}

# What docs/cluster.md repeats of a printed plan.
FIGURES = (r"^ total +([\d.]+) *$", r"^ step +(\S+ s) *$", r"^ ([\d,]+) steps ", r" steps +(\S+) days *$",
           r"^ GPU hours +([\d,]+) *$")  # fmt: skip


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", [*PAGES, *FILES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_line_is_wrong(path: Path) -> None:
    found = of_file(path)
    assert [f"{shlex.join(words)}: {wrong}" for words in found for wrong in launch_problems(words)] == []
    assert found or path.suffix != ".yaml"


@cache
def planned(line: Launch) -> str:
    with redirect_stdout(StringIO()) as said:
        assert main(list(line.words)) == 0
    return said.getvalue()


@pytest.mark.parametrize("line", PLANS.values(), ids=PLANS)
def test_a_plan_is_made(line: Launch) -> None:
    assert "Smallest cluster" in planned(line)


def test_the_page_has_the_plans_figures() -> None:
    """The table of docs/cluster.md, a row for each of its plans."""
    page = ROOT / "docs" / "cluster.md"
    plans = [line for line in map(read, of_file(page)) if line.verb == "plan"]
    shown = re.search(r"^\| GPUs \|.*\n\| --- .*\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)
    assert shown is not None
    rows = [row.strip("| ").split(" | ") for row in shown[1].splitlines()]
    for line, (gpus, _, *cells) in zip(plans, rows, strict=True):
        found = [re.search(figure, planned(line), re.MULTILINE) for figure in FIGURES]
        assert cells == [each and each[1] for each in found], shlex.join(line.words)
        assert f"cluster.gpus={gpus.replace(',', '')}" in line.words


@pytest.mark.parametrize("line", ON_GPUS.values(), ids=ON_GPUS)
def test_the_planner_finds_room(line: Launch) -> None:
    """On as many GPUs as the line starts processes."""
    planner = Planner(load(PlanConfig, [*line.sources, f"cluster.gpus={line.processes}"]))
    assert [*planner.work.problems(), *misfits(planner)] == []
    needed = planner.memory(planner.inputs)
    assert needed.peak <= planner.inputs.budget, f"{needed.clip} needs {needed.peak / GIB:.0f} GiB"


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a release of frozen parts, latents, two clips in a list, and pictures with labels."""
    folder = tmp_path_factory.mktemp("desk")
    write_release(folder / "release")
    words = [f"out={folder / 'latents'}", f"release={folder / 'release'}", "source=world", "clips=4",
             f"buckets=[{BUCKET},1x16x16@16]", "keyframes=true"]  # fmt: skip
    held_out = [f"out={folder / 'held_out'}", "source=world:heldout", f"buckets=[{BUCKET}]"]
    twins = [f"out={folder / 'twins'}", "keyframes=false", "upsample=2"]
    for more in ([], held_out, twins):
        config = load(PrecomputeConfig, [*words, *more, "workers=0"])
        precompute(config, load_encoders(config))
    rows = []
    for name in "ab":
        frames = np.random.default_rng(ord(name)).integers(0, 255, (12, 32, 48, 3), np.uint8)
        video.write(folder / f"{name}.mp4", frames, fps=Fraction(16))
        size = {"frames": 12, "fps": Fraction(16), "width": 48, "height": 32}
        rows.append(manifest.ClipEntry(path=f"{name}.mp4", caption=name, **size))
    manifest.write(folder / "clips.jsonl", rows)
    pictures = np.random.default_rng(0).integers(0, 255, (40, 6, 6), np.uint8)
    np.savez(folder / "pictures.npz", images=pictures, labels=np.arange(40) % 10)
    for side, out in (("train", "pictures"), ("heldout", "held_out_pictures")):
        words = [f"source=images:{folder / 'pictures.npz'}:{side}", f"out={folder / out}", "workers=0"]
        precompute(load(PrecomputeConfig, [*words, "buckets=[1x8x8@1]"]), None)
    return folder


def of_precomputation(line: Launch, desk: Path, out: Path) -> list[str]:
    config = load(PrecomputeConfig, line.sources)
    words = [f"out={out}", "shard_size=1", "batch_size=2", "compile=false", "threads=1", "workers=0"]
    if config.images:
        return [*words, f"source=images:{desk / 'pictures.npz'}:{config.images.side}", "clips=4"]
    clips = ["clips=4"] if config.split else [f"source={desk / 'clips.jsonl'}", "clips=null"]
    return [*words, f"release={desk / 'release'}", f"buckets=[{BUCKET}]", *clips]


def of_training(config: RunConfig, desk: Path, out: Path) -> list[str]:
    """What makes a run small. What is compiled takes minutes, and has tests of its own."""
    words = [f"run={out}", "steps=1", "preview_every=0", "threads=1"]
    if config.parallel.compile:
        words.append("parallel.compile=false")
    start = out.with_name("start")
    if config.model == "unet" or (config.model == "dit" and config.dit.classes):
        # Small enough as it is.
        words += [f"data.latents={desk / 'pictures'}", "data.batch_size=2", "log_every=1"]
        words += [f"validation.latents={desk / 'held_out_pictures'}", "validation.every=1"]
    elif config.model == "dit":
        known = config.distill.steps and config.dit.known  # a teacher reads what its student reads
        small = load(RunConfig, [*DIT, "dit.max_tokens=[1,1,1]", f"dit.known={str(bool(known)).lower()}"]).dit
        VideoDiT(small).save_pretrained(start / "dit")
        latents = "twins" if config.known.upsample else "latents"
        words += [*DIT, f"data.latents={desk / latents}", "data.buckets=null", "data.workers=1",
                  f"data.batch_size={2 * config.deepspeed.accumulation}",
                  f"parallel.sequence={min(config.parallel.sequence, 2)}"]  # fmt: skip
        if config.distill.adapters or config.lora.init_from:
            words += ["distill.adapters=[]", "lora.init_from=null"]
        if config.validation.every:
            words += [f"validation.latents={desk / 'held_out'}", "validation.every=1", "log_every=1"]
    elif config.model == "mmdit":
        words += [*STREAMS, f"data.latents={desk / 'latents'}", "data.buckets=[1x16x16@16]", "data.workers=1",
                  f"data.batch_size={2 * config.deepspeed.accumulation}"]  # fmt: skip
    elif config.model == "tae":
        # The perceptual network's weights come with another package.
        small = ["tae.channels=32", "discriminator.channels=8", "discriminator.depth=2", "loss.perceptual=0"]
        words += [
            *small,
            "data.crop=null",
            "data.buckets=[4x16x16@16]",
            "data.batch_size=2",
            "data.workers=0",
        ]
        words += [f"data.manifest={desk / 'clips.jsonl'}"] if config.data.manifest else []
        TAE(replace(config.tae, channels=32)).save_pretrained(start / "tae")
    elif config.model in ("judge", "strict", "verifier"):
        Judge(JudgeConfig()).save_pretrained(start / "judge")
        words += ["data.buckets=[16x32x32@16]", "data.batch_size=4", f"release={start}"]
    else:
        words += [f"text.{name}.{word}" for name in ("ul2", "byt5", "metaclip") for word in TEXT]
        words += ["text.clips=8", "text.merges=300", "text.probes=30"]
    return words if config.init_from is None else [*words, f"init_from={start}"]


def deepspeed(rank, size, port):
    return {**_torchrun(rank, size, port), "CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": str(size)}


def mpirun(rank, size, port):
    names = {"RANK": rank, "SIZE": size, "LOCAL_RANK": 0, "LOCAL_SIZE": 1}
    return {
        **{f"OMPI_COMM_WORLD_{name}": str(value) for name, value in names.items()},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


VARIABLES = {"torchrun": _torchrun, "deepspeed": deepspeed, "srun": srun, "mpirun": mpirun}


@pytest.mark.parametrize("line", STARTS.values(), ids=STARTS)
def test_a_line_starts(line: Launch, desk: Path, tmp_path: Path, start_job) -> None:
    out = tmp_path / "out"
    if line.verb:
        words = [*line.words, *of_precomputation(line, desk, out)]
    else:
        words = [*line.words, *of_training(load(RunConfig, line.words), desk, out)]
    size = 2 if line.launcher else 1
    added = ["--local_rank=0"] if line.launcher == "deepspeed" else []
    job = start_job("line", [*added, *words], size=size, launcher=VARIABLES.get(line.launcher))
    assert job.wait() == [0] * size, job.text()
    if line.verb:
        data = LatentDataset(out)
        assert all(
            data.captions(name, clip)[0] for name in data.buckets for clip in range(data.num_clips(name))
        )
    elif load(RunConfig, words).model in {"dit", "mmdit", "tae", "unet"}:
        state = json.loads((out / "checkpoints" / "00000001" / "state.json").read_text())
        assert state["processes"] == size
    else:
        written = ("judge.json", "strict.json", "verifier.json", "text/figures.json")
        assert any((out / name).is_file() for name in written)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("torchrun --nproc-per-node 2 -m kinoflow.train configs/dit_1b.yaml stps=3", 'did you mean "steps"?'),
        ("torchrun --procs 2 -m kinoflow.train configs/models/dit_1b.yaml run=x", "unrecognized arguments"),
        ("torchrun --nproc-per-node 2 kinoflow.train configs/models/dit_1b.yaml run=x", "has no -m"),
        ("torchrun --nnodes 2 --node-rank 1 -m kinoflow.train run=x", "2 nodes, but not where they meet"),
        ("deepspeed --gpus 2 --module kinoflow.train run=x", "unrecognized arguments: --gpus"),
        ("deepspeed --num_gpus 2 kinoflow.train run=x", "has no --module"),
        ("srun --task 8 python -m kinoflow.train run=x", "--task is none of"),
        ("srun --ntasks=many python -m kinoflow.train run=x", "--ntasks many is not of the form"),
        ("srun python -m kinoflow.trian run=x", "starts no training"),
        ("sbatch --nodes 2 configs/cluster/gone.sbatch run=x", "there is no script configs/cluster/gone"),
        ("mpirun -np 2 --hostfile hosts python -m kinoflow.train run=x", "-x MASTER_ADDR"),
        ("python -m kinoflow.train configs/models/gone.yaml run=x", "there is no such file"),
        ("kinoflow train exprt runs/a b", "has no exprt"),
        ("kinoflow train export runs/a", "takes RUN and RELEASE"),
        ("kinoflow train precompute configs/own/own_latents.yaml otu=x", 'did you mean "out"?'),
        ("kinoflow train plan configs/own/own_dit.yaml cluster.gpu=1", 'did you mean "cluster.gpus"?'),
    ],
)
def test_a_wrong_line_is_caught(text: str, problem: str) -> None:
    found = [*launch_problems(shlex.split(text))]
    assert any(problem in each for each in found), found


def test_lines_are_found(tmp_path: Path) -> None:
    """In comments with what continues them, in blocks and in sentences; a wrong one is caught there."""
    yaml, page = tmp_path / "a.yaml", tmp_path / "a.md"
    yaml.write_text(
        "# `kinoflow train plan` says more.\n#\n"
        "#   torchrun --nproc-per-node 8 -m kinoflow.train configs/models/dit_1b.yaml \\\n#     stps=3\n"
        "#   sbatch configs/a.sbatch run=x\nmodel: dit  # kinoflow train run=x\n"
    )
    page.write_text(
        "Say `kinoflow train plan a.yaml`, or `srun python -m kinoflow.train … run=x`.\n"
        "```bash\nkinoflow train export runs/a b && make test\n```\n"
        "```console\n$ kinoflow train plan b.yaml\nkinoflow train c.yaml\n```\n"
    )
    assert [shlex.join(words[-2:]) for words in of_file(yaml)] == [
        "configs/models/dit_1b.yaml stps=3",
        "configs/a.sbatch run=x",
    ]
    assert next(launch_problems(of_file(yaml)[0])).endswith('did you mean "steps"?')
    assert [words[-1] for words in of_file(page)] == ["b", "b.yaml", "a.yaml"]


def test_the_lines_of_today_are_among_them() -> None:
    """A reader that finds nothing would pass every test above."""
    assert {line.launcher for line in STARTS.values()} >= {"", "torchrun", "srun"}
    verbs = {"", "precompute", "plan", "export", "status", "validate", "average"}
    assert {line.verb for line in LINES} == verbs
    assert len(STARTS) >= 25
