"""A run on one process: kill -9, SIGTERM, Ctrl-C, damage, changed settings, full disk, export."""

import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch

from kinoflow.conditioning.checkpoints import TextConfig
from kinoflow.configs.schema import dump, load
from kinoflow.sample.__main__ import main as sample
from kinoflow.sample.card import ReleaseConfig, read_card
from kinoflow.train.run import checkpoint
from kinoflow.train.run.averages import AveragedState
from kinoflow.train.run.config import RunConfig
from kinoflow.train.tasks import export
from tests.train.toys import Toy

COMMON = [
    "steps=24",
    "log_every=5",
    "checkpoint_every=8",
    "keep_checkpoints=2",
    "ema_decay=0.9",
    "data.workers=2",
]
FIGURES = ("loss", "error", "grad_norm", "lr", "generator", "discriminator_loss")


def figures(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: line.get(key) for key in ("step", *FIGURES)} for line in lines]


def wait_for(path, job):
    deadline = time.monotonic() + 900
    while not path.exists():
        assert time.monotonic() < deadline and job.processes[0].is_alive(), job.text()
        time.sleep(0.02)


def said(job):
    """What a job printed beside the line of each interval."""
    return [line for line in job.text().splitlines() if not re.match(r"step \d+/\d+  loss ", line)]


@pytest.fixture(scope="module")
def whole(start_job, tmp_path_factory):
    """An uninterrupted run with a critic."""
    folder = tmp_path_factory.mktemp("whole")
    job = start_job("toy", [*COMMON, f"run={folder}"], True)
    assert job.wait() == [0], job.text()
    *_, last, closing = job.text().splitlines()
    assert re.fullmatch(r"step 24/24  loss \S+  lr 0.0001  \S+ samples/s  0 s left", last)
    assert closing == f"{folder}: trained to step 24; next: kinoflow train export {folder} RELEASE"
    return folder


def copied(whole, folder):
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    return folder


def test_run_folder(whole):
    assert load(RunConfig, [str(whole / "config.yaml")]) == load(RunConfig, [*COMMON, f"run={whole}"])
    assert json.loads((whole / "env.json").read_text())["packages"]["torch"] == torch.__version__
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == [
        "00000016",
        "00000024",
        "latest",
    ]
    assert (whole / "checkpoints" / "latest").read_text() == "00000024\n"
    assert [line["step"] for line in figures(whole)] == [5, 10, 15, 20, 24]
    assert list((whole / "tensorboard").glob("events*"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_run_goes_on_exactly(whole, start_job, tmp_path, number):
    job = start_job("toy", [*COMMON, f"run={tmp_path}"], True, 0.05)
    wait_for(tmp_path / "checkpoints" / "00000008", job)
    time.sleep(0.2)
    os.kill(job.processes[0].pid, number)
    assert job.wait() == [143 if number == signal.SIGTERM else -9], job.text()
    done = [int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert max(done) < 24, "it must have been cut off"
    assert (max(done) % 8 > 0) == (number == signal.SIGTERM), "SIGTERM saves where it stands"
    job = start_job("toy", [*COMMON, f"run={tmp_path}"], True)
    assert job.wait() == [0], job.text()
    assert figures(tmp_path) == figures(whole)
    last = "checkpoints/00000024"
    before, after = AveragedState(whole / last), AveragedState(tmp_path / last)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_ctrl_c_is_one_line(start_job, tmp_path):
    job = start_job("toy", [*COMMON, f"run={tmp_path}"], False, 0.05)
    wait_for(tmp_path / "checkpoints" / "00000008", job)
    os.kill(job.processes[0].pid, signal.SIGINT)
    assert job.wait() == [130]
    assert len(said(job)) == 1 and "goes on" in job.text()


def test_finished_run_does_nothing(whole, start_job, tmp_path):
    job = start_job("toy", [*COMMON, f"run={copied(whole, tmp_path)}"], True)
    assert job.wait() == [0], job.text()
    assert figures(tmp_path) == figures(whole)
    assert len(said(job)) == 1 and "kinoflow train export" in job.text()


def test_a_folder_named_with_digits_that_are_no_number_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "²").mkdir(parents=True)
    assert checkpoint.newest(tmp_path) is None


def test_damaged_checkpoint_falls_back(whole, start_job, tmp_path):
    copied(whole, tmp_path)
    shard = tmp_path / "checkpoints" / "00000024" / "model_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    job = start_job("toy", [*COMMON, f"run={tmp_path}"], True)
    assert job.wait() == [0], job.text()
    assert "00000024 is damaged" in job.text() and shard.name in job.text()
    assert figures(tmp_path) == figures(whole)


def test_half_written_checkpoint_is_passed_over(whole, tmp_path):
    copied(whole, tmp_path)
    (tmp_path / "checkpoints" / "00000024").rename(tmp_path / "checkpoints" / ".partial-00000024")
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints" / "00000016"


@pytest.mark.parametrize(("change", "code", "line"), [
    ("optimizer.lr=0.5", 0, "resuming with optimizer.lr: 0.0001 -> 0.5"),
    ("tae.latent_channels=4", 2, "tae.latent_channels"),
    ("unet.layers=1", 2, "unet.layers"),
    ("mmdit.depth=2", 2, "mmdit.depth"),
    ("deepspeed.zero_stage=1", 0, "resuming with deepspeed.zero_stage: 0 -> 1"),
    ("seed=1", 2, "seed: "),
    ("data.batch_size=16", 2, "data.batch_size: "),
    ("data.batch_size=0", 2, "data.batch_size"),
])  # fmt: skip
def test_changed_settings(whole, start_job, tmp_path, *, change, code, line):
    copied(whole, tmp_path)
    (tmp_path / "checkpoints" / ".partial-00000023").mkdir()  # of a killed run
    job = start_job("toy", [*COMMON, f"run={tmp_path}", "steps=25", change], True)
    assert job.wait() == [code], job.text()
    *said_first, closing = said(job)
    assert line in (closing if code else said_first[0]) and len(said_first) == (code == 0)
    assert load(RunConfig, [str(tmp_path / "config.yaml")]).steps == (25 if code == 0 else 24)
    assert not (tmp_path / "checkpoints" / ".partial-00000023").exists() or "batch_size" in change


def test_a_run_of_another_model_is_one_line(whole, start_job, tmp_path):
    job = start_job("toy", [*COMMON, f"run={copied(whole, tmp_path)}"], True, 0.0, 24)
    assert job.wait() == [2], job.text()
    assert (
        job.text().count("\n") == 1
        and "00000024 holds another model (layers.0.bias: [23] there, [24]" in job.text()
    )
    assert figures(tmp_path) == figures(whole)


def exported(capsys, run, out, **changes):
    """What the command says of a run that was trained with other settings beside."""
    config = replace(load(RunConfig, COMMON), **changes)
    dump(config, run / "config.yaml")
    assert export.main([str(run), str(out)], Toy) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def parts(tmp_path):
    """A release of which only the names count."""
    for name in ("tae", "dit", "text/ul2", "text/byt5", "text/metaclip"):
        (tmp_path / "parts" / name).mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (tmp_path / "parts" / name / file).write_text(name)
    (tmp_path / "parts" / "figures.json").write_text("{}")
    dump(
        ReleaseConfig(name="old", version="5", text=TextConfig(dtype="bfloat16")),
        tmp_path / "parts" / "kinoflow.yaml",
    )
    return tmp_path / "parts"


def test_export(whole, parts, tmp_path):
    config = replace(load(RunConfig, COMMON), release=str(parts))
    task = Toy(config)
    export.export(whole, tmp_path / "release", task, config)
    assert (tmp_path / "release" / "text" / "ul2" / "config.json").read_text() == "text/ul2"
    assert not (tmp_path / "release" / "figures.json").exists(), "the figures of another model"
    task.model.load_state_dict(torch.load(tmp_path / "release" / "tae" / "toy.pt"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    export.export(whole, parts / "inside", task, config)
    assert not (parts / "inside" / "text").exists(), "the release around it has the same"


def test_an_export_has_a_name_of_its_own_and_says_what_it_was_trained_from(whole, parts, tmp_path, capsys):
    run, release = copied(whole, tmp_path / "mine"), tmp_path / "release"
    for _ in range(2):  # once more from a later checkpoint
        said, _ = exported(capsys, run, release, release=str(parts), init_from=str(parts))
        assert said == f"{release}: tae from {run}/checkpoints/00000024, which went on from old 5"
        card = read_card(release)
        assert (card.name, card.version, card.trained_from) == ("mine", "1", "old 5")
        assert card.text.dtype == "bfloat16"
    exported(capsys, copied(whole, tmp_path / "later"), parts, init_from=str(release))
    card = read_card(parts)
    assert (card.name, card.version, card.trained_from) == ("later", "1", "mine 1")
    exported(capsys, copied(whole, tmp_path / "new"), parts)
    assert (read_card(parts).name, read_card(parts).trained_from) == ("new", "")


def test_an_export_ends_with_what_it_is_for(whole, parts, tmp_path, capsys):
    run, alone, both = copied(whole, tmp_path / "mine"), tmp_path / "alone", tmp_path / "both"
    _, line = exported(capsys, run, alone)
    assert f"an autoencoder only, for kinoflow tae encode CLIP CLIP.kino --weights {alone}/tae" in line
    assert sample(["a star", "--weights", str(alone)]) == 2
    assert capsys.readouterr().err == f"kinoflow sample: {line}\n"
    _, line = exported(capsys, run, both, release=str(parts), init_from="x")
    assert "dit/ does not know the latents of this new encoder" in line
    _, line = exported(capsys, run, both, release=str(parts), init_from="x", freeze_encoder=True)
    assert line == f'next: kinoflow sample "PROMPT" --weights {both}'


def test_export_without_a_checkpoint(tmp_path):
    config = load(RunConfig, COMMON)
    with pytest.raises(checkpoint.UserError, match="no checkpoint to export"):
        export.export(tmp_path, tmp_path / "release", Toy(config), config)


def test_full_disk_is_one_line(start_job, tmp_path):
    job = start_job("full_disk", [*COMMON, f"run={tmp_path}"])
    assert job.wait() == [2], job.text()
    assert (
        re.search(r"00000008: cannot be written \(.*\), is the disk full\?", job.text())
        and len(said(job)) == 1
    )
    assert list((tmp_path / "checkpoints").iterdir()) == []
