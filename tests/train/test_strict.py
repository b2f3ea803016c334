import json
import math
from collections import Counter

import pytest
import torch

from kinoflow.configs.schema import load
from kinoflow.data.clips.buckets import parse
from kinoflow.data.world import sample_scene
from kinoflow.data.world.questions import answers
from kinoflow.sample.evaluation.judge import Judge, JudgeConfig
from kinoflow.sample.evaluation.strict import Answers, StrictConfig, StrictJudge
from kinoflow.train.mini import strict as train_strict
from kinoflow.train.mini.strict import accuracy, draw, main, scenes, stirred, strict_loss
from kinoflow.train.run.config import RunConfig

SMALL = StrictConfig(side=32, widths=(8, 12, 16, 24), reading_width=8, hidden=(32, 32))
BUCKET = parse("16x32x32@8")


def test_every_eight_scenes_have_a_moving_camera_two_second_things_and_a_sign():
    drawn = scenes(300_000, 64)
    assert drawn == scenes(300_000, 64)
    for start in range(0, 64, 8):
        some = drawn[start : start + 8]
        assert any(scene.camera != "still" for scene in some)
        assert sum(len(scene.things) > 1 for scene in some) >= 2
        assert any(scene.word for scene in some)


def test_some_scenes_are_what_the_world_never_draws():
    found = Counter()
    for seed in range(4000):
        old = sample_scene(seed)
        new = stirred(old, seed)
        assert answers(new)["color"] == answers(old)["color"]
        found["as it was"] += new == old
        found["second texture"] += answers(new)["second_texture"] not in ("", "plain")
        found["pair and sign"] += bool(answers(new)["second_color"] and new.word)
        found["filmed"] += new.camera != "still" and answers(new)["motion"] != "stays still"
    assert found["as it was"] > 3500
    assert min(found.values()) > 10


def test_a_batch_holds_the_answers_of_its_scenes():
    drawn = scenes(0, 8)
    clips, truth = draw(drawn, BUCKET, SMALL)
    assert clips.shape == (8, 16, 32, 32, 3)
    assert truth.seconds.tolist() == [15 / 8] * 8
    for index, scene in enumerate(drawn):
        for key, names in SMALL.questions.items():
            assert names[truth.classes[key][index]] == answers(scene)[key]


def test_the_clips_of_a_batch_are_of_several_buckets():
    words = ["data.buckets=[16x32x32@8,8x32x32@8,16x64x64@16]", "data.batch_size=24"]
    config = load(RunConfig, ["configs/mini/mini_strict.yaml", *words])
    judge = StrictJudge(SMALL)
    video, truth = train_strict._batch(judge, None, config, 1)
    assert video.shape == (24, 3, 16, 32, 32)
    assert truth.seconds.tolist() == [7 / 8] * 8 + [15 / 16] * 8 + [15 / 8] * 8
    assert torch.equal(video, train_strict._batch(judge, None, config, 1)[0])
    assert len(truth.classes["color"]) == len(truth.letters) == 24


def test_loss_of_a_judge_that_knows_nothing_is_that_of_chance():
    _, truth = draw(scenes(0, 4), BUCKET, SMALL)
    blank = {key: torch.zeros(4, len(names)) for key, names in SMALL.questions.items()}
    loss, parts = strict_loss(Answers(classes=blank, letters=torch.zeros(4, 4, 27)), truth)
    chance = {key: math.log(len(names)) for key, names in SMALL.questions.items()} | {"letters": math.log(27)}
    assert {key: part.item() for key, part in parts.items()} == pytest.approx(chance)
    assert loss.item() == pytest.approx(sum(chance.values()))


def test_a_strict_judge_learns_a_few_clips_by_heart():
    torch.manual_seed(0)
    judge = StrictJudge(SMALL)
    judge.init_weights()
    clips, truth = draw(scenes(0, 8), BUCKET, SMALL)
    video, optimizer = judge.prepare(clips), torch.optim.AdamW(judge.parameters(), lr=5e-3)
    for _ in range(60):
        loss, _ = strict_loss(judge(video, truth.seconds), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.0


def test_settling_gives_each_layer_the_mean_of_plain_renders(monkeypatch):
    monkeypatch.setattr(train_strict, "_NUM_SETTLING", 2)
    judge = StrictJudge(SMALL)
    judge.init_weights()
    train_strict.settle(judge, BUCKET)
    drawn = [draw(scenes(50_000_000 + 2000 * index, 32), BUCKET, SMALL)[0] for index in range(2)]
    seen = judge.stem[0](judge.prepare(torch.cat(drawn)))
    torch.testing.assert_close(judge.stem[1].running_mean, seen.mean(dim=(0, 2, 3, 4)), rtol=1e-3, atol=1e-4)
    assert not judge.training


@pytest.mark.parametrize("model", ["strict", "verifier"])
def test_it_starts_from_the_levels_of_the_judge_and_goes_on_from_its_own(tmp_path, model):
    first = Judge(JudgeConfig())
    first.init_weights()
    first.save_pretrained(tmp_path / "judge", dtype=torch.float32)
    config = load(RunConfig, ["configs/mini/mini_strict.yaml", f"init_from={tmp_path}", f"model={model}"])
    begun = train_strict._start(config)
    for name in ("stem", "level2", "level3", "level4", "reader", "letters"):
        own, given = begun.get_submodule(name).state_dict(), first.get_submodule(name).state_dict()
        assert all(torch.equal(own[key], given[key]) for key in own), name
    begun.save_pretrained(tmp_path / model, dtype=torch.float32)
    again = train_strict._start(config)
    assert all(torch.equal(value, begun.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("model", ["strict", "verifier"])
def test_a_run_writes_the_judge_and_its_accuracy(tmp_path, monkeypatch, model):
    monkeypatch.setattr(train_strict, "_NUM_VALIDATION", 6)
    monkeypatch.setattr(train_strict, "_NUM_SETTLING", 1)
    release, run = tmp_path / "release", tmp_path / "run"
    overrides = [
        f"model={model}",
        "steps=2",
        "log_every=1",
        "data.batch_size=4",
        f"run={run}",
        f"release={release}",
    ]
    assert main(load(RunConfig, ["configs/mini/mini_strict.yaml", *overrides])) == 0
    figures = json.loads((run / f"{model}.json").read_text())
    assert figures["real"]["scenes"] == 6
    assert "reconstructed" not in figures
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2]
    again = accuracy(StrictJudge.from_pretrained(release / model), scenes=6, bucket=parse("32x128x128@16"))
    assert [path.name for path in release.iterdir()] == [model] and again == figures["real"]
