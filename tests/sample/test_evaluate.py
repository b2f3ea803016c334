import json
from dataclasses import replace

import numpy as np
import pytest

from kinoflow.configs.errors import UserError
from kinoflow.data.world import labels, sample_scene
from kinoflow.sample.__main__ import main
from kinoflow.sample.evaluation.judge import Judge, JudgeConfig, Judgement
from kinoflow.sample.evaluation.statistics import frechet_distance, wilson
from kinoflow.sample.evaluation.world import HeldOut, measure
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.request import ClipRequest


class Oracle(Judge):
    """Answers from a script: one list of labels for each call."""

    def __init__(self, *answers):
        super().__init__(JudgeConfig(widths=(1, 1, 1, 1), reading_width=1))
        self.answers = list(answers)

    def judge(self, clips, batch_size=16):
        answer = self.answers.pop(0)
        features = np.random.default_rng(len(self.answers)).normal(size=(len(answer), 2))
        return Judgement(labels=tuple(answer), features=features)


def with_covariance(mean, covariance, count=400):
    """Points whose sample mean and covariance are exactly these."""
    x = np.random.default_rng(0).normal(size=(count, len(mean)))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(np.asarray(covariance, dtype=float)).T + mean


def test_frechet_distance_of_commuting_gaussians():
    first = with_covariance([0.0, 1.0], np.diag([4.0, 9.0]))
    second = with_covariance([3.0, 1.0], np.diag([1.0, 25.0]))
    assert frechet_distance(first, second) == pytest.approx(9 + (2 - 1) ** 2 + (3 - 5) ** 2)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_gaussians_that_do_not_commute():
    a, b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.0]])
    # A 2x2 matrix M with eigenvalues x, y has tr sqrt(M) = sqrt(x) + sqrt(y) = sqrt(tr M + 2 sqrt(det M)).
    cross = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    distance = frechet_distance(with_covariance([0, 0], a), with_covariance([1, 2], b))
    assert distance == pytest.approx(5 + np.trace(a) + np.trace(b) - 2 * cross)


def test_frechet_distance_stands_fewer_clips_than_features():
    x = np.random.default_rng(3).normal(size=(5, 20)).astype(np.float32)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x + 1) == pytest.approx(20, rel=1e-5)


def test_wilson_interval_of_known_shares():
    low, high = wilson(81, 263)  # Newcombe 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 20)[0] == 0
    assert wilson(0, 20)[1] == pytest.approx(0.1611, abs=1e-4)
    assert wilson(1, 29)[0] == pytest.approx(0.0061, abs=1e-4)
    assert wilson(20, 20)[1] == 1


def test_measure_counts_each_question_and_reads_words_only_where_there_is_one():
    seeds = [seed for seed in range(200) if sample_scene(seed, split="heldout").word][:2]
    seeds += [seed for seed in range(200) if not sample_scene(seed, split="heldout").word][:2]
    scenes = [sample_scene(seed, split="heldout") for seed in seeds]
    truth = [labels(scene) for scene in scenes]
    seen = [dict(label) for label in truth]
    seen[0]["color"] = "none"
    seen[1] |= {"shape": "none", "word": "NOPE"}
    seen[2] |= {"color": "none", "word": "SEEN"}
    clips = [np.zeros((16, 8, 8, 3), np.uint8)] * 4
    result = measure(Oracle(seen, truth, truth), scenes, clips, clips, clips)
    assert result.motion is not None
    shares = (result.color.share, result.shape.share, result.motion.share, result.joint.share)
    assert shares == (0.5, 0.75, 1.0, 0.25)
    assert result.word is not None
    assert (result.word.share, result.word.count) == (0.5, 2)
    assert (result.color.real, result.word.real, result.joint.real) == (1, 1, 1)
    assert (result.color.low, result.color.high) == wilson(2, 4)
    assert result.frechet > 0


def test_what_few_ask_for_is_counted_apart():
    scenes = [sample_scene(seed, split="heldout") for seed in range(40)]
    truth = [labels(scene) for scene in scenes]
    seen = [label | {"shape": "none"} if label["motion"] == "spins" else label for label in truth]
    clips = [np.zeros((16, 8, 8, 3), np.uint8)] * 40
    result = measure(Oracle(seen, truth, truth), scenes, clips, clips, clips)
    motions, spinning = result.classes["motion"], sum(label["motion"] == "spins" for label in truth)
    assert (motions["spins"].share, motions["spins"].count, motions["spins"].real) == (0, spinning, 1)
    assert {share.share for name, share in motions.items() if name != "spins"} == {1}
    assert all(sum(share.count for share in each.values()) == 40 for each in result.classes.values())
    stars = [label["motion"] != "spins" for label in truth if label["shape"] == "star"]
    assert result.classes["shape"]["star"].share == pytest.approx(np.mean(stars))
    still = measure(Oracle(seen, truth, truth), scenes, clips, clips, clips, still=True)
    assert list(still.classes) == ["color", "shape"]


def test_nobody_asks_how_a_picture_moves():
    scenes = [sample_scene(seed, split="heldout") for seed in range(2)]
    truth = [labels(scene) for scene in scenes]
    seen = [label | {"motion": "none"} for label in truth]
    clips = [np.zeros((16, 8, 8, 3), np.uint8)] * 2
    assert measure(Oracle(seen, truth, truth), scenes, clips, clips, clips).joint.share == 0
    result = measure(Oracle(seen, truth, truth), scenes, clips, clips, clips, still=True)
    assert result.motion is None
    assert result.joint.share == 1


def test_pictures_are_judged_as_long_as_clips(capsys):
    held_out = HeldOut(Pipeline.from_pretrained(), 4, frames=1)
    assert not [text for text in held_out.texts for word in ("moves", "spins", "camera") if word in text]
    found, costs = held_out.evaluate(ClipRequest(prompt="", steps=8, best_of=1))
    assert found.motion is None and found.color.real == found.shape.real == 1
    assert found.strict is not None and found.strict.wholly.real >= 0.75
    assert not {"motion", "speed"} & found.strict.attributes.keys()
    assert costs.passes == 16
    argv = ["evaluate", "--prompts", "2", "--steps", "1", "--frames", "1"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "clip 1x128x128@16" in said and "motion" not in said and said.count("joint of ") == 2
    assert main([*argv[:-1], "7"]) == 2
    assert "makes no such clips" in capsys.readouterr().err


def test_measure_wants_clips_for_each_scene():
    with pytest.raises(UserError, match="prompts"):
        measure(Oracle(), [sample_scene(0)], [], [], [])


def test_evaluate_generates_held_out_scenes_and_is_reproducible(tiny_release, tmp_path):
    calls, common = [], ClipRequest(prompt="", steps=1)
    held_out = HeldOut(Pipeline(tiny_release), 3)
    first, costs = held_out.evaluate(common, sheet=tmp_path / "sheet.png", progress=lambda: calls.append(1))
    assert len(calls) == 3
    assert (tmp_path / "sheet.png").stat().st_size > 0
    assert first == held_out.evaluate(common)[0] == HeldOut(Pipeline(tiny_release), 3).evaluate(common)[0]
    assert (first.prompts, costs.passes, costs.reused) == (3, 2, 0)
    assert first.frechet != held_out.evaluate(replace(common, seed=9))[0].frechet


def test_other_scenes_are_those_further_on(tiny_release):
    pipeline = Pipeline(tiny_release)
    all_of_them, later = HeldOut(pipeline, 5), HeldOut(pipeline, 3, first=2)
    assert (later.scenes, later.texts) == (all_of_them.scenes[2:], all_of_them.texts[2:])
    with pytest.raises(UserError, match="first: -1 is below 0"):
        HeldOut(pipeline, 3, first=-1)


def test_the_command_prints_one_object_or_a_table(tiny_release, capsys):
    argv = ["evaluate", "--release", str(tiny_release.folder), "--prompts", "3", "--steps", "1"]
    assert main([*argv, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["prompts"], figures["first"]) == (3, 0)
    assert main([*argv, "--first", "3", "--json"]) == 0
    others = json.loads(capsys.readouterr().out)
    assert others["first"] == 3 and others["frechet"] != figures["frechet"]
    assert figures["color"].keys() == {"share", "low", "high", "count", "real"}
    assert {"frechet", "frechet_real", "weights", "num_steps", "guidance_scale", "seed"} <= figures.keys()
    assert (figures["frames"], figures["fps"], figures["costs"]["passes"]) == (16, "16", 2)
    assert main(argv) == 0
    assert "judge on real" in capsys.readouterr().out


def test_too_few_prompts_are_one_line(tiny_release, capsys):
    assert main(["evaluate", "--release", str(tiny_release.folder), "--prompts", "1"]) == 2
    assert "prompts: 1" in capsys.readouterr().err
