"""Wholly right: closed forms on planted answers, the shipped judge on renders, what the command prints."""

import json
import shutil

import torch

from kinoflow.sample.__main__ import main
from kinoflow.sample.evaluation.statistics import wilson
from kinoflow.sample.evaluation.strict import StrictConfig, StrictJudge
from kinoflow.sample.evaluation.whole import compared

TEXTS = (
    "a large red star bounces fast next to a small blue heart on a gray background",
    'a green ring moves left on a striped navy background with a sign that says "SUN"',
    "a pink cross stays still on a checkered black background while the camera zooms in",
    "a dotted white circle grows on a teal background",
)
PLAIN = {
    "texture": "plain", "size": "medium", "speed": "", "second_color": "", "second_shape": "", "pattern": "",
    "second_texture": "", "relation": "", "camera": "still", "sign": "", "word": "",
}  # fmt: skip
RIGHT = [
    PLAIN | {"color": "red", "shape": "star", "motion": "bounces", "size": "large", "speed": "fast",
             "second_color": "blue", "second_shape": "heart", "second_texture": "plain",
             "relation": "next to", "background": "gray"},
    PLAIN | {"color": "green", "shape": "ring", "motion": "moves left", "pattern": "striped",
             "background": "navy", "sign": "top", "word": "SUN"},
    PLAIN | {"color": "pink", "shape": "cross", "motion": "stays still", "pattern": "checkered",
             "background": "black", "camera": "zoom in"},
    PLAIN | {"color": "white", "shape": "circle", "motion": "grows", "texture": "dotted",
             "background": "teal"},
]  # fmt: skip


def test_planted_answers_give_these_shares():
    seen = [dict(label) for label in RIGHT]
    seen[0] |= {"second_shape": "star"}
    seen[2] |= {"camera": "still", "sign": "bottom"}
    seen[3] |= {"size": "small", "speed": "slowly"}  # left open
    real = [dict(label) for label in RIGHT]
    real[1]["word"] = "SIN"
    whole = compared(TEXTS, seen, real)
    assert (whole.wholly.share, whole.wholly.count, whole.wholly.real) == (0.5, 4, 0.75)
    assert (whole.wholly.low, whole.wholly.high) == wilson(2, 4)
    assert (whole.unasked.share, whole.unasked.real) == (0.75, 1)
    found = {key: (share.share, share.count, share.real) for key, share in whole.attributes.items()}
    assert found == {
        "color": (1, 4, 1), "shape": (1, 4, 1), "motion": (1, 4, 1), "background": (1, 4, 1),
        "texture": (1, 1, 1), "size": (1, 1, 1), "speed": (1, 1, 1), "pattern": (1, 2, 1),
        "second_color": (1, 1, 1), "second_shape": (0, 1, 1), "relation": (1, 1, 1),
        "camera": (0, 1, 1), "word": (1, 1, 0),
    }  # fmt: skip
    assert [(each.prompt, str(each)) for each in whole.missed] == [
        (TEXTS[0], "second shape: star"),
        (TEXTS[2], "camera: still, sign: bottom"),
    ]


def test_the_command_has_it_where_the_release_has_a_strict_judge(tiny_release, tmp_path, capsys):
    argv = ["evaluate", "--prompts", "3", "--steps", "1", "--json"]
    assert main([*argv, "--release", str(tiny_release.folder)]) == 0
    assert json.loads(capsys.readouterr().out)["strict"] is None
    folder = shutil.copytree(tiny_release.folder, tmp_path / "release")
    torch.manual_seed(0)
    judge = StrictJudge(StrictConfig(widths=(4, 4, 4, 8), reading_width=4, hidden=(8, 8)))
    judge.init_weights()
    judge.save_pretrained(folder / "strict")
    assert main([*argv, "--release", str(folder)]) == 0
    strict = json.loads(capsys.readouterr().out)["strict"]
    assert strict["wholly"].keys() == strict["unasked"].keys() == {"share", "low", "high", "count", "real"}
    assert {"color", "shape", "motion", "background"} <= strict["attributes"].keys()
    missed = {each["prompt"] for each in strict["missed"]}
    assert len(missed) == round(3 * (1 - strict["wholly"]["share"]))
    sheet = tmp_path / "sheet.png"
    assert (
        main(["evaluate", "--prompts", "2", "--steps", "1", "--release", str(folder), "--sheet", str(sheet)])
        == 0
    )
    shown = capsys.readouterr().out
    assert "strict judge" in shown and "nothing unasked" in shown and "wholly right" in shown
    assert sheet.stat().st_size > 0
    assert main([*argv[:-1], "--release", str(folder), "--sweep", "guidance=1,2"]) == 0
    assert "wholly right" in capsys.readouterr().out
