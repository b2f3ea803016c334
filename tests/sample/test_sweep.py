"""Sweeps of the evaluation: rows, the table, the picture, and clips that are kept."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kinoflow.configs.errors import UserError
from kinoflow.sample.__main__ import main
from kinoflow.sample.evaluation import kept
from kinoflow.sample.evaluation.sweep import KEYS, combinations
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.request import ClipRequest

COMMON = ClipRequest(prompt="x", steps=2, seed=5)


@pytest.fixture
def evaluate(tiny_release, capsys):
    def command(*argv):
        capsys.readouterr()
        code = main(["evaluate", "--release", str(tiny_release.folder), "--prompts", "2", *argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def test_every_combination_is_a_request_the_last_key_changing_fastest():
    rows = combinations(["guidance=1,4", "guidance-interval=0:1,0.1:0.9", "guidance-kind=apg"], COMMON)
    assert [list(settings.values()) for settings, _ in rows] == [
        ["1", "0:1", "apg"], ["1", "0.1:0.9", "apg"], ["4", "0:1", "apg"], ["4", "0.1:0.9", "apg"]
    ]  # fmt: skip
    _, request = rows[3]
    assert (request.guidance, request.guidance_interval, request.guidance_kind) == (4, (0.1, 0.9), "apg")
    assert (request.steps, request.seed) == (2, 5)
    assert combinations([], COMMON) == [({}, COMMON)]


@pytest.mark.parametrize(
    ("sweeps", "said"),
    [
        (["seed=1,2"], f"sweep: 'seed' is not swept; use KEY=VALUE,VALUE with one of {', '.join(KEYS)}"),
        (["guidance"], "sweep: 'guidance' lacks a value"),
        (["guidance=1,,2"], "lacks a value or has one twice"),
        (["guidance=1,1"], "lacks a value or has one twice"),
        (["guidance=1", "guidance=2"], "sweep: guidance comes twice"),
        (["guidance=much"], "sweep: guidance: 'much' does not fit; write it as --guidance takes it"),
        (["guidance-kind=best"], "sweep: guidance-kind: 'best' does not fit"),
    ],
)
def test_a_wrong_sweep_is_one_line(sweeps, said):
    with pytest.raises(UserError) as error:
        combinations(sweeps, COMMON)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_command_gives_rows_a_table_and_a_picture(evaluate, tmp_path):
    argv = ["--steps", "4", "--sweep", "guidance=1,4", "--sweep", "cache=0,1"]
    code, out, _ = evaluate(*argv, "--json", "--plot", str(tmp_path / "sweep.png"))
    figures = json.loads(out)
    assert code == 0 and (figures["frames"], figures["fps"], figures["prompts"]) == (16, "16", 2)
    passes = {tuple(row["settings"].values()): (row["passes"], row["reused"]) for row in figures["rows"]}
    assert passes[("1", "0")] == (4, 0) and passes[("4", "0")] == (8, 0)
    for guidance, expected in (("1", 4), ("4", 8)):
        computed, reused = passes[(guidance, "1")]
        assert computed + reused == expected and reused > 0
    with Image.open(tmp_path / "sweep.png") as image:
        drawn = np.asarray(image)
        assert min(image.size) > 400 and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 4
    code, out, _ = evaluate(*argv)
    assert code == 0 and out.splitlines()[2].split()[:2] == ["guidance", "cache"]
    assert [line.split()[:2] for line in out.splitlines()[3:7]] == [list(map(str, key)) for key in passes]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--plot", "a.png"], "plot: there is nothing to compare"),
        (["--sheet", "a.png", "--sweep", "guidance=1,2"], "sheet: it shows the clips of one setting"),
        (["--sweep", "guidance=1,101"], "--guidance: 101.0 is not in 0..100"),
        (["--sweep", "guidance-interval=1:0"], "--guidance-interval: 1:0 is not two rising times"),
        (["--steps", "1", "--sweep", "guidance=1", "--plot", "a.svg"], "a.svg: a plot is a PNG"),
    ],
)
def test_mistakes_are_one_line(evaluate, argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = evaluate(*argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err and list(Path().iterdir()) == []


def test_clips_that_are_kept_are_not_made_again(tiny_release, tmp_path, monkeypatch):
    pipeline = Pipeline(tiny_release)
    plan = pipeline.plan(COMMON)
    first = kept.make(pipeline, plan, tmp_path)
    (path,) = tmp_path.iterdir()
    made = []
    monkeypatch.setattr(Pipeline, "make", lambda self, plan: made.append(plan))
    again = kept.make(pipeline, plan, tmp_path)
    assert np.array_equal(again.frames, first.frames) and made == []
    assert (again.seconds, again.passes, again.reused) == (first.seconds, 4, 0)
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:1000])  # damaged: made again
    assert np.array_equal(kept.make(pipeline, plan, tmp_path).frames, first.frames)
    kept.make(pipeline, pipeline.plan(ClipRequest(prompt="x", steps=2, seed=6)), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
