"""The log: means, exact figures over a resume, lines of a killed run, a missing TensorBoard."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import kinoflow.train.run.log
from kinoflow.configs.errors import UserError, run
from kinoflow.train.run.log import Log

CPU = torch.device("cpu")


def log(folder, start=0, pending=None):
    return Log(folder, device=CPU, rank=0, processes=1, start=start, steps=10, pending=pending)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_line(tmp_path):
    with log(tmp_path) as opened:
        for value in (1.0, 4.0):
            opened.add({"loss": torch.tensor(value), "ratio": 0.5})
            opened.count(samples=3, tokens=12)
        opened.add({"generator": 7.0})
        opened.write(2, lr=0.1)
        opened.add({"loss": 3.0})
        opened.write(3, lr=0.2)
    first, second = lines(tmp_path)
    assert (first["step"], first["loss"], first["ratio"], first["generator"], first["lr"]) == (
        2,
        2.5,
        0.5,
        7,
        0.1,
    )
    assert first["tokens_per_second"] == pytest.approx(4 * first["samples_per_second"])
    assert first["peak_memory_bytes"] > 2**20 and "mfu" not in first
    assert (second["loss"], second["samples_per_second"]) == (3.0, 0.0) and "ratio" not in second


def test_interval_cut_by_a_checkpoint_has_the_same_mean(tmp_path):
    values = torch.randn(7, generator=torch.Generator().manual_seed(0)) / 3
    with log(tmp_path / "whole") as whole, log(tmp_path / "cut") as cut:
        for value in values:
            whole.add({"loss": value})
        for value in values[:3]:
            cut.add({"loss": value})
        pending = json.loads(json.dumps(cut.pending()))
        whole.write(7, lr=0.0)
    with log(tmp_path / "cut", start=3, pending=pending) as resumed:
        for value in values[3:]:
            resumed.add({"loss": value})
        resumed.write(7, lr=0.0)
    assert lines(tmp_path / "cut")[0]["loss"] == lines(tmp_path / "whole")[0]["loss"]


def test_without_a_terminal_there_is_a_line_each_interval(tmp_path, monkeypatch, capsys):
    """Of rank 0 alone; the clock, which stands at 8 s after 2 of 10 steps, says what is left."""
    clock = iter([0.0, 8.0, 16.0])
    monkeypatch.setattr(kinoflow.train.run.log, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with log(tmp_path) as opened:
        opened.add({"loss": 0.25})
        opened.count(samples=20, tokens=1)
        opened.write(2, lr=1e-3)
        opened.write(4, lr=5e-4)
    shown = capsys.readouterr()
    assert shown.out == (
        "step 2/10  loss 0.25  lr 0.001  2.5 samples/s  32 s left\n"
        "step 4/10  loss nan  lr 0.0005  0.0 samples/s  24 s left\n"
    )
    monkeypatch.undo()
    with Log(tmp_path, device=CPU, rank=1, processes=1, start=0, steps=10) as other:
        other.write(2, lr=1e-3)
    assert capsys.readouterr().out == ""


def test_at_a_terminal_there_is_the_bar_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # which rich takes for a terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with log(tmp_path) as opened:
        opened.add({"loss": 0.25})
        opened.count(samples=20, tokens=1)
        opened.write(2, lr=1e-3)
    shown = capsys.readouterr()
    assert shown.out == "" and "loss 0.25" in shown.err


def test_lines_after_the_checkpoint_go(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 5}\n{"step": 10}\n{"step": 15}\n{"step": 2')
    log(tmp_path, start=10).__exit__()
    assert lines(tmp_path) == [{"step": 5}, {"step": 10}]


def test_missing_tensorboard_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'kinoflow\[train\]'"):
        log(tmp_path)


def test_weights_and_biases_gets_the_figures(tmp_path, monkeypatch):
    """A folder is one run there, whenever it is opened."""
    begun, logged, finished = [], [], []

    def init(**words):
        begun.append(words)
        return SimpleNamespace(
            log=lambda figures, step: logged.append((step, figures)), finish=lambda: finished.append(1)
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for start in (0, 1):
        with Log(tmp_path, device=CPU, rank=0, processes=1, start=start, steps=2, wandb="videos") as opened:
            opened.add({"loss": 1.0 + start})
            opened.write(start + 1, {"validation_loss": 0.5}, lr=0.1)
    assert begun[0] == begun[1] and begun[0]["project"] == "videos" and begun[0]["resume"] == "allow"
    assert begun[0]["name"] == tmp_path.name
    assert [(step, line["loss"], line["validation_loss"]) for step, line in logged] == [
        (1, 1, 0.5),
        (2, 2, 0.5),
    ]
    assert len(finished) == 2
    with log(tmp_path, 2):
        assert len(begun) == 2, "only where a run asks for it"


def test_missing_weights_and_biases_names_the_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)

    def begin():
        with Log(tmp_path, device=CPU, rank=0, processes=1, start=0, steps=2, wandb="videos"):
            pytest.fail("it began without")

    assert run(begin, "kinoflow train") == 2
    assert capsys.readouterr().err == "kinoflow train: wandb is not installed; run: pip install wandb\n"
