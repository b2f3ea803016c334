"""Lists of prompts with settings of their own, from files and from standard input."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from kinoflow.data.video import probe, read
from kinoflow.sample.output import derived_seed

LINES = [{"prompt": "a red star, small", "seed": 7}, {"prompt": "a ring", "steps": 3, "guidance": 1.5}]
CSV = 'prompt,seed,steps,guidance\n"a red star, small",7,,\na ring,,3,1.5\n'


def made(folder="clips"):
    return {path.name: probe(path).metadata for path in Path(folder).iterdir()}


@pytest.mark.parametrize("way", ["jsonl", "csv", "stdin"])
def test_each_line_has_settings_of_its_own_and_else_the_commands(run, way, monkeypatch):
    text = CSV if way == "csv" else "\n".join(map(json.dumps, LINES)) + "\n\n"
    name = "-" if way == "stdin" else f"list.{way}"
    for skipped in (False, True):
        if way == "stdin":
            monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        else:
            Path(name).write_text(text, encoding="utf-8-sig")
        code, out, _ = run("--prompts", name, "--out", "clips", "--guidance", "2", "--json")
        assert code == 0
        assert [clip.get("skipped", False) for clip in json.loads(out)["clips"]] == [skipped] * 2
    first, second = made()["a-red-star-small-7.mp4"], made()[f"a-ring-{derived_seed(0, 'a ring')}.mp4"]
    assert (first["prompt"], first["steps"], first["guidance"]) == ("a red star, small", "2", "2.0")
    assert (second["steps"], second["guidance"]) == ("3", "1.5")
    assert len(made()) == 2


def test_guidance_and_cache_of_a_line(run):
    Path("list.csv").write_text(
        "prompt,guidance-kind,guidance_interval,guidance-rescale,cache,steps\n"
        "a ring,apg,0:0.9,0.7,,\na star,,,,0.9,4\n"
    )
    code, out, _ = run("--prompts", "list.csv", "--out", "clips", "--json")
    ring, star = json.loads(out)["clips"]
    told = {key: value for key, value in ring.items() if key.startswith("guidance_")}
    assert code == 0 and told == {
        "guidance_kind": "apg", "guidance_interval": "0.0:0.9", "guidance_rescale": "0.7",
        "guidance_momentum": "-0.5", "guidance_threshold": "0.06", "guidance_parallel": "0.0",
    }  # fmt: skip
    assert star["cache"] == "0.9" and not {key for key in star if key.startswith("guidance_")}
    assert "cache" not in ring and ring["passes"] == {"computed": 4, "reused": 0}
    assert star["passes"] == {"computed": 6, "reused": 2}


def test_plain_lines_on_standard_input(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a ring\n\na star\n"))
    assert run("--prompts", "-", "--out", "clips")[0] == 0
    assert {values["prompt"] for values in made().values()} == {"a ring", "a star"}


def test_a_batch_names_and_makes_the_same_files_as_one_at_a_time(run):
    lines = [LINES[0], {**LINES[0], "size": "48x32"}, {**LINES[0], "steps": 3}, {"prompt": "a ring"}]
    Path("list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for count in ("1", "4"):
        assert run("--prompts", "list.jsonl", "--out", count, "--batch", count)[0] == 0
    assert len(made("1")) == 4
    for path in Path("1").iterdir():
        assert path.read_bytes() == Path("4", path.name).read_bytes()


def test_a_batch_goes_on_after_a_failure_in_its_midst(run):
    Path("list.txt").write_text("a ring\nbad \0\na star\n")
    code, out, _ = run("--prompts", "list.txt", "--batch", "3", "--json")
    figures = json.loads(out)
    assert (code, [clip["prompt"] for clip in figures["clips"]]) == (1, ["a ring", "a star"])
    assert [failure["prompt"] for failure in figures["failed"]] == ["bad \0"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"prompt": "x"}\nnonsense', "a.jsonl:2: no JSON object"),
        ("a.jsonl", '{"prompt": "x", "stps": 3}', "a.jsonl:1: stps: no setting of a clip; known are prompt"),
        ("a.jsonl", '{"seed": 3}', "a.jsonl:1: no prompt"),
        ("a.jsonl", '{"prompt": "x", "steps": "few"}', "a.jsonl:1: steps: 'few' does not fit"),
        ("a.jsonl", '{"prompt": "x", "solver": "rk4"}', "a.jsonl:1: solver: 'rk4' does not fit"),
        ("a.jsonl", '{"prompt": "x", "guidance_kind": "b"}', "a.jsonl:1: --guidance-kind: 'b' does not fit"),
        ("a.jsonl", '{"prompt": "x", "guidance-interval": 3}', "a.jsonl:1: guidance-interval: '3' is not"),
        ("a.jsonl", '{"prompt": "x", "size": "big"}', "a.jsonl:1: size: 'big' is not a size"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": "x", "frames": 17}', "a.jsonl:2: frames 17: tiny makes no"),
        ("a.jsonl", '{"prompt": "x", "seed": -1}', "a.jsonl:1: seed: -1"),
        ("a.csv", "prompt,seed\nx,1,2\n", "a.csv:2: more fields than the header"),
        ("a.csv", "prompt\n", "a.csv: no prompt in it"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_made(run, name, text, said):
    Path(name).write_text(text)
    code, out, err = run("--prompts", name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert [path.name for path in Path().iterdir()] == [name]


def test_the_figures_name_the_parts(run):
    _, out, _ = run("a ring", "--json")
    figures = json.loads(out)
    (clip,) = figures["clips"]
    assert clip["parts"].keys() == {"load", "text", "flow", "decode", "write"}
    assert sum(clip["parts"].values()) == pytest.approx(clip["seconds"], abs=0.01)
    assert figures["bytes"]["backbone"] > figures["bytes"]["text"] == 0  # a stand-in reads the prompts


def test_a_batch_and_a_single_clip_have_equal_frames(run):
    assert run("a ring", "--seed", "7", "--out", "one.mp4")[0] == 0
    Path("list.csv").write_text("prompt,seed\na star,7\na ring,7\n")
    assert run("--prompts", "list.csv", "--out", "clips", "--batch", "2")[0] == 0
    assert np.array_equal(read("one.mp4"), read("clips/a-ring-7.mp4"))
