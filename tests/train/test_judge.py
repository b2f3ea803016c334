import json
import math

import pytest
import torch

from kinoflow.configs.schema import load
from kinoflow.data.clips.buckets import parse
from kinoflow.data.world import labels, sample_scene
from kinoflow.sample.evaluation.judge import Judge, JudgeConfig, Verdict, letter_classes
from kinoflow.train.mini import judge as train_judge
from kinoflow.train.mini.judge import accuracy, degrade, draw, judge_loss, main
from kinoflow.train.run.config import RunConfig

SMALL = JudgeConfig(frames=8, side=32, widths=(8, 12, 16, 24), reading_width=8)
BUCKET = parse("8x32x32@8")


def test_a_batch_holds_the_answers_of_its_scenes():
    batch = draw(range(40, 44), BUCKET, SMALL, split="heldout")
    assert batch.clips.shape == (4, 8, 32, 32, 3)
    for index in range(4):
        truth = labels(sample_scene(40 + index, split="heldout"))
        assert SMALL.colors[batch.color[index]] == truth["color"]
        assert SMALL.shapes[batch.shape[index]] == truth["shape"]
        assert SMALL.motions[batch.motion[index]] == truth["motion"]
        assert batch.letters[index].tolist() == letter_classes(truth["word"], 4)


def test_loss_of_a_judge_that_knows_nothing_is_that_of_chance():
    batch = draw(range(4), BUCKET, SMALL, split="train")
    blank = Verdict(
        color=torch.zeros(4, 8), shape=torch.zeros(4, 8), motion=torch.zeros(4, 9),
        letters=torch.zeros(4, 4, 27), features=torch.zeros(4, 1),
    )  # fmt: skip
    loss, parts = judge_loss(blank, batch)
    assert parts["color"].item() == pytest.approx(math.log(8))
    assert loss.item() == pytest.approx(2 * math.log(8) + math.log(9) + 2 * math.log(27), rel=1e-6)


def test_degrading_spares_half_of_the_clips_and_follows_its_generator():
    video = torch.rand(6, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first = degrade(video, torch.Generator().manual_seed(1))
    assert torch.equal(first[3:], video[3:])
    assert all(not torch.equal(one, other) for one, other in zip(first[:3], video[:3], strict=True))
    assert (first - video).abs().mean().item() < 0.3
    assert torch.equal(first, degrade(video, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, degrade(video, torch.Generator().manual_seed(2)))


def test_a_judge_learns_a_few_clips_by_heart():
    torch.manual_seed(0)
    judge = Judge(SMALL)
    judge.init_weights()
    batch = draw(range(8), BUCKET, SMALL, split="train")
    video, optimizer = judge.prepare(batch.clips), torch.optim.AdamW(judge.parameters(), lr=5e-3)
    for _ in range(40):
        loss, _ = judge_loss(judge(video), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5


def test_a_run_writes_the_judge_and_its_accuracy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_judge, "_NUM_VALIDATION", 6)
    release, run = tmp_path / "release", tmp_path / "run"
    overrides = [
        "steps=2",
        "log_every=1",
        "threads=1",
        "data.batch_size=4",
        f"run={run}",
        f"release={release}",
    ]
    assert main(load(RunConfig, ["configs/mini/mini_judge.yaml", *overrides])) == 0
    figures = json.loads((run / "judge.json").read_text())
    assert figures["real"]["scenes"] == 6
    assert "reconstructed" not in figures
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2]
    shown = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in shown[:2]] == ["step 1/2", "step 2/2"]
    again = accuracy(Judge.from_pretrained(release / "judge"), scenes=6, bucket=parse("32x128x128@16"))
    assert again == figures["real"]


def test_a_judge_is_trained_on(tmp_path):
    Judge(JudgeConfig()).save_pretrained(tmp_path / "judge", dtype=torch.float32)
    config = load(RunConfig, ["configs/mini/mini_judge.yaml", f"init_from={tmp_path}"])
    begun, earlier = train_judge._start(config), Judge.from_pretrained(tmp_path / "judge")
    for (name, value), old in zip(begun.state_dict().items(), earlier.state_dict().values(), strict=True):
        assert torch.equal(value, old), name
