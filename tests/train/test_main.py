"""The command line before any training starts: usage and one line for each mistake."""

import pytest

from kinoflow.configs.schema import load
from kinoflow.train.__main__ import main
from kinoflow.train.run.config import RunConfig


def test_usage(capsys):
    assert main([]) == 2 and main(["--help"]) == 0
    assert "precompute" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["steps=5"], "run: name the folder"),
        (["run=a", "stpes=5"], "steps"),
        (["run=a", "deepspeed.zero_stage=4"], "deepspeed.zero_stage: 4"),
        (["run=a", "deepspeed.offload=optimizer"], "deepspeed.zero_stage 1, 2 or 3"),
        (["run=a", "deepspeed.precision=fp16"], "fp16 needs deepspeed.zero_stage 1, 2 or 3"),
        (["run=a", "data.world_share=0.5"], "data.manifest"),
        (["run=a", "data.manifest=a.jsonl", "data.world_share=1.5"], "data.world_share"),
        (["run=a", "data.crop=0"], "data.crop"),
        (["run=a", "deepspeed.offload=parameters"], "deepspeed.offload"),
        (["run=a", "deepspeed.accumulation=3"], "data.batch_size: 8 is no multiple"),
        (["run=a", "ema_decay=1"], "ema_decay"),
        (["run=a", "optimizer.betas=[0.9,1.0]"], "optimizer.betas"),
        (["run=a", "data.buckets=[]"], "data.buckets"),
        (["nowhere.yaml", "run=a"], "nowhere.yaml"),
        (["export", "somewhere"], "export: name the run"),
        (["export", "nowhere", "release"], "nowhere"),
        (["precompute"], "out: name the folder"),
        (["precompute", "out=a"], "source: name the clip list"),
        (["precompute", "out=a", "source=world"], "release: name the release folder"),
        (["precompute", "out=a", "source=world", "release=b"], "buckets: give at least one"),
        (["run=a", "model=judge"], "release: name the release folder"),
        (["run=a", "model=judge", "release=b"], "data.buckets: name the clips"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_config_survives_the_run_folder(tmp_path):
    from kinoflow.configs.schema import dump

    config = load(RunConfig, ["run=a", "optimizer.betas=[0.5,0.75]", "data.buckets=[1x8x8@16]", "threads=2"])
    dump(config, tmp_path / "config.yaml")
    assert load(RunConfig, [str(tmp_path / "config.yaml")]) == config
