"""VBench's prompts come in, and its folder goes out."""

import json
from pathlib import Path

import pytest

from kinoflow.data.video import probe
from kinoflow.sample.output import derived_seed

PROMPTS = [
    {"prompt_en": "a person is eating, close up", "dimension": ["human_action"]},
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"],
     "auxiliary_info": {"object": "sign"}},
    {"prompt_en": "a person is eating, close up", "dimension": ["overall_consistency"]},
]  # fmt: skip


def written(value, name="full.json"):
    Path(name).write_text(json.dumps(value))
    return name


def test_each_prompt_has_five_files_of_its_own_name_once(run):
    argv = ["--prompts", written(PROMPTS), "--out", "clips", "--frames", "1", "--vbench"]
    code, out, err = run(*argv, "--json")
    assert code == 0, err
    prompts = [row["prompt_en"] for row in PROMPTS[:2]]
    names = {f"{prompt}-{number}.mp4" for prompt in prompts for number in range(5)}
    assert {path.name for path in Path("clips").iterdir()} == names
    assert len({path.read_bytes() for path in Path("clips").iterdir()}) == 10
    metadata = probe(Path("clips", f"{prompts[0]}-3.mp4")).metadata
    first = derived_seed(0, prompts[0])
    assert metadata["seed"] == str(derived_seed(first, prompts[0], repeat=3))
    Path("clips", f"{prompts[0]}-3.mp4").unlink()  # an interruption: the rest is not made again
    _, out, _ = run(*argv, "--json")
    made = [Path(clip["path"]).name for clip in json.loads(out)["clips"] if "skipped" not in clip]
    assert made == [f"{prompts[0]}-3.mp4"]


def test_the_number_of_samples_and_another_setting(run):
    name = written(PROMPTS[:1])
    argv = ["--prompts", name, "--out", "clips", "--frames", "1", "--vbench", "2"]
    assert run(*argv)[0] == 0
    assert len(list(Path("clips").iterdir())) == 2
    _, out, _ = run(*argv, "--guidance", "2")
    assert out.count("(replaced)") == 2 and len(list(Path("clips").iterdir())) == 2


def test_without_the_layout_the_list_is_like_any_other(run):
    name = written([PROMPTS[0], {"prompt": "a ring", "seed": 3}])
    assert run("--prompts", name, "--out", "clips", "--frames", "1")[0] == 0
    seed = derived_seed(0, PROMPTS[0]["prompt_en"])
    names = {f"a-person-is-eating-close-up-{seed}.png", "a-ring-3.png"}
    assert {path.name for path in Path("clips").iterdir()} == names


@pytest.mark.parametrize(
    ("value", "more", "said"),
    [
        ({"prompt_en": "x"}, ["--vbench"], "full.json: no JSON list"),
        (["x"], ["--vbench"], "full.json, object 1: no JSON object"),
        ([], ["--vbench"], "full.json: no prompt in it"),
        ([{"prompt_en": "x/y"}], ["--vbench"], "object 1: prompt: no file can be called 'x/y'"),
        ([{"prompt_en": "x" * 260}], ["--vbench"], "no file can be called"),
        ([{"prompt_en": " "}], ["--vbench"], "full.json, object 1: prompt: empty"),
        ([{"prompt": "x", "stps": 2}], [], "object 1: stps: no setting of a clip"),
        (PROMPTS, ["--vbench", "0"], "vbench: 0 samples of a prompt; use 1 or more"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_made(run, value, more, said):
    code, out, err = run("--prompts", written(value), *more)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err and [path.name for path in Path().iterdir()] == ["full.json"]


def test_it_is_for_lists(run):
    code, _, err = run("a ring", "--vbench")
    assert code == 2 and "vbench: it is for lists" in err
