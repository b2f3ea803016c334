import json
import re
import shutil
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kinoflow.sample.output
import kinoflow.sample.pipeline
import kinoflow.sample.release
from kinoflow.configs.errors import UserError
from kinoflow.data.video import probe, read
from kinoflow.sample.__main__ import main
from kinoflow.sample.output import derived_seed, slug
from kinoflow.sample.release import Release

PROMPT = "a red star moves left"


def files():
    return sorted(path.name for path in Path().iterdir())


def refused(result) -> str:
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_a_prompt_becomes_an_mp4_that_says_how_it_was_made(run, tiny_release):
    code, out, _ = run(PROMPT, "--seed", "3", "--guidance", "2.5", "--negative", "blurry")
    assert code == 0
    assert out.startswith("a-red-star-moves-left-3.mp4")
    assert files() == ["a-red-star-moves-left-3.mp4"]
    info = probe("a-red-star-moves-left-3.mp4")
    assert (info.frames, info.width, info.height, info.fps) == (16, 32, 32, Fraction(16))
    assert (info.codec, info.pixel_format) == ("h264", "yuv420p")
    expected = {"prompt": PROMPT, "seed": "3", "steps": "2", "guidance": "2.5", "negative": "blurry"}
    expected |= {
        "weights": tiny_release.weights_hash,
        "kinoflow": kinoflow.sample.output.installed("kinoflow"),
    }
    assert expected.items() <= info.metadata.items()


def test_the_same_seed_gives_the_same_bytes_and_nothing_is_overwritten_silently(run):
    run(PROMPT)
    code, out, _ = run(PROMPT)
    assert code == 0
    assert "a-red-star-moves-left-0-2.mp4" in out
    assert "was there already" in out
    assert (
        Path("a-red-star-moves-left-0.mp4").read_bytes() == Path("a-red-star-moves-left-0-2.mp4").read_bytes()
    )
    assert run(PROMPT, "--out", "x.mp4", "--seed", "1")[0] == 0
    before = Path("x.mp4").read_bytes()
    code, out, _ = run(PROMPT, "--out", "x.mp4", "--seed", "2")
    assert "replaced" in out
    assert Path("x.mp4").read_bytes() != before


def test_the_sde_is_chosen_by_name_and_repeats_itself(run):
    """Its noise is in the metadata, from the seed, and 0 of it is Euler."""
    for name, more in {
        "a": ["--diffusion", "0.5"],
        "b": ["--diffusion", "0.5"],
        "c": ["--diffusion", "0"],
    }.items():
        assert run(PROMPT, "--solver", "sde", *more, "--out", f"{name}.mp4")[0] == 0
    assert run(PROMPT, "--out", "euler.mp4")[0] == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    metadata = probe("a.mp4").metadata
    assert (metadata["solver"], metadata["diffusion"]) == ("sde", "0.5")
    assert "diffusion" not in probe("euler.mp4").metadata
    clips = {name: read(f"{name}.mp4") for name in ("a", "c", "euler")}
    assert np.array_equal(clips["c"], clips["euler"]) and not np.array_equal(clips["a"], clips["euler"])


def test_other_buckets_and_images(run):
    assert run(PROMPT, "--size", "48x32", "--out", "long.mp4")[0] == 0
    assert read("long.mp4").shape == (40, 32, 48, 3)
    assert probe("long.mp4").fps == Fraction(24000, 1001)
    assert run(PROMPT, "--frames", "1", "--out", "still.png")[0] == 0
    with Image.open("still.png") as image:
        assert image.size == (32, 32)
        assert image.info["prompt"] == PROMPT
    assert run(PROMPT, "--frames", "1", "--out", "still.mp4")[0] == 0
    assert probe("still.mp4").frames == 1


def test_json_is_one_object_and_the_only_thing_on_stdout(run):
    code, out, _ = run(PROMPT, "--json")
    figures = json.loads(out)
    assert code == 0
    (clip,) = figures["clips"]
    assert clip["path"] == "a-red-star-moves-left-0.mp4"
    assert (clip["seed"], clip["prompt"], clip["clip"]) == (0, PROMPT, "16x32x32@16")
    assert clip["seconds"] > 0
    assert figures["failed"] == []


@pytest.mark.parametrize("prompt", ["🎉🐙🌈", "x" * 10_000, '"KITE"', "../../etc/passwd", "-"])
def test_odd_prompts_work(run, prompt):
    code, _, _ = run(prompt)
    assert code == 0
    (name,) = files()
    assert probe(name).metadata["prompt"] == prompt


def test_what_the_encoder_cuts_is_said_in_one_line(run, tiny_release, monkeypatch):
    class TruncatedPromptWarning(UserWarning):
        pass

    TruncatedPromptWarning.__module__ = "kinoflow.conditioning.encoders"
    encoder = type(tiny_release).encoder(tiny_release)
    plain = type(encoder).__call__

    def noisy(self, prompts, fps):
        warnings.warn("ul2 reads at most 512 tokens", TruncatedPromptWarning, stacklevel=1)
        warnings.warn("some library's business", DeprecationWarning, stacklevel=1)
        return plain(self, prompts, fps)

    monkeypatch.setattr(type(encoder), "__call__", noisy)
    code, _, err = run(PROMPT)
    assert code == 0
    assert "warning: ul2 reads at most 512 tokens\n" in err
    assert "library" not in err


@pytest.fixture
def with_words(tiny_release, tmp_path_factory, monkeypatch):
    """Makes the release of `run` one with a tokenizer of words."""
    ul2 = Path(kinoflow.sample.release.__file__).parent / "mini" / "text" / "ul2" / "tokenizer.json"
    shutil.copy(ul2, tiny_release.folder / "text" / "ul2")
    card = tiny_release.folder / "kinoflow.yaml"
    plain = card.read_text()
    card.write_text(plain.replace("written: ''", "written: '[A-Z]{2,8}'"))
    yield
    card.write_text(plain)
    (tiny_release.folder / "text" / "ul2" / "tokenizer.json").unlink()


def test_words_that_the_release_does_not_know_are_named(with_words, run):
    code, out, err = run("a puple kite", "--negative", "a sign that reads kite", "--json")
    assert code == 0
    first, second = err.splitlines()[:2]
    assert first.startswith(
        'warning: this release does not know "puple" (it knows "purple"), "kite"; a word to'
    )
    assert second.startswith('warning: this release does not know "kite"')
    (clip,) = json.loads(out)["clips"]
    assert clip["unknown_words"] == ["puple", "kite"]
    _, out, err = run(PROMPT, "--json", "--out", "a.mp4")
    assert "warning" not in err and json.loads(out)["clips"][0]["unknown_words"] == []


def test_a_release_of_any_words_warns_of_none(run):
    _, out, err = run("ein Milan über dem See", "--json")
    assert "warning" not in err and json.loads(out)["clips"][0]["unknown_words"] == []


def test_the_readmes_prompts_are_of_the_shipped_releases_words():
    root = Path(__file__).parents[2]
    pages = "".join(
        page.read_text(encoding="utf-8") for page in (root / "README.md", root / "sample/__main__.py")
    )
    prompts = re.findall(
        r'(?:PROMPT=|kinoflow sample |^    \[|example )"(a [^"]+)"(?! --weights)', pages, re.MULTILINE
    )
    assert len(prompts) >= 3
    known = Release.load().vocabulary
    assert known is not None
    assert {prompt: advice for prompt in prompts if (advice := known.advice(prompt))} == {}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([""], "prompt: empty"),
        ([PROMPT, "--diffusion", "0.5"], "diffusion: euler adds no noise"),
        ([PROMPT, "--solver", "sde", "--diffusion", "-1"], "diffusion: -1.0 is not in 0..10"),
        (["  \n"], "prompt: empty"),
        ([], "give a PROMPT"),
        ([PROMPT, "--prompts", "list.txt"], "one of the three"),
        ([PROMPT, "--frames", "17"], "--frames 16 --size 32x32 --fps 16"),
        ([PROMPT, "--size", "640x480"], "it makes"),
        ([PROMPT, "--fps", "30"], "it makes"),
        ([PROMPT, "--guidance", "-1"], "--guidance: -1.0 is not in 0..100"),
        (
            [PROMPT, "--guidance", "1", "--negative", "blurry"],
            "negative: --guidance 1 steers away from nothing",
        ),
        ([PROMPT, "--negative", " "], "negative: empty"),
        ([PROMPT, "--frames", "1", "--crf", "18"], "crf: a picture (--frames 1) is a PNG"),
        ([PROMPT, "--frames", "1", "--out", "a.png", "--crf", "30"], "leave --crf out"),
        (
            [PROMPT, "--frames", "1", "--out", "one.jpg"],
            "one.jpg: a picture is written as PNG; end the name in .png",
        ),
        ([PROMPT, "--seed", "-1"], "seed"),
        ([PROMPT, "--crf", "99"], "crf"),
        ([PROMPT, "--threads", "0"], "threads"),
        ([PROMPT, "--out", "clip.avi"], "clip.avi"),
        ([PROMPT, "--batch", "2"], "batch: one prompt is one clip"),
        ([PROMPT, "--out", "."], "mp4"),
        ([PROMPT + "\0"], "NUL"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(run, argv, said):
    assert said in refused(run(*argv))
    assert files() == []


def test_a_damaged_release_is_one_line(run, capsys):
    assert main([PROMPT, "--weights", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [[PROMPT, "--size", "big"], [PROMPT, "--fps", "1/0"], [PROMPT, "--steps", "few"]]
)
def test_malformed_options_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert argv[1] in capsys.readouterr().err


@pytest.mark.parametrize("words", [[PROMPT, "--weights"], ["evaluate", "--release"]])
def test_a_mistake_in_a_setting_names_the_option(tiny_release, capsys, words):
    for option, value, said in (
        (
            "--steps",
            "300",
            "--steps: 300 is more than the 250 that a linear-quadratic schedule has; use 1 to 250",
        ),
        ("--steps", "0", "--steps: 0 is not a number of steps; use 1 or more"),
        ("--guidance", "101", "--guidance: 101.0 is not in 0..100; try 1 to 8"),
    ):
        assert main([*words, str(tiny_release.folder), option, value]) == 2
        assert capsys.readouterr().err == f"kinoflow sample: {said}\n"


def test_a_list_gives_each_prompt_its_own_seed_whatever_its_place(run):
    Path("list.txt").write_text("a red star\n\na blue ring\na red star\n", encoding="utf-8")
    assert run("--prompts", "list.txt", "--out", "clips")[0] == 0
    names = {path.name for path in Path("clips").iterdir()}
    seeds = [
        derived_seed(0, "a red star"),
        derived_seed(0, "a blue ring"),
        derived_seed(0, "a red star", repeat=1),
    ]
    assert names == {
        f"a-red-star-{seeds[0]}.mp4",
        f"a-blue-ring-{seeds[1]}.mp4",
        f"a-red-star-{seeds[2]}.mp4",
    }
    assert run("a blue ring", "--seed", str(seeds[1]))[0] == 0
    name = f"a-blue-ring-{seeds[1]}.mp4"
    assert Path(name).read_bytes() == Path("clips", name).read_bytes()


@pytest.mark.parametrize(
    ("key", "option", "value"),
    [("crf", "--crf", "30"), ("threads", "--threads", "2"), ("memory", "--memory", "2GiB")],
)
def test_all_that_decides_the_bytes_is_in_the_file_and_tells_what_is_finished(run, key, option, value):
    Path("list.txt").write_text("a red star\n")
    for options in ([], [option, value]):
        for skipped in (False, True):
            _, out, _ = run("--prompts", "list.txt", "--out", "clips", "--json", *options)
            (clip,) = json.loads(out)["clips"]
            assert clip.get("skipped", False) == skipped
    plain, other = (
        probe(path).metadata for path in sorted(Path("clips").iterdir(), key=lambda p: len(p.name))
    )
    assert {name for name in plain if plain[name] != other[name]} == {key}
    defaults = {"crf": "18.0", "threads": "1", "memory": str(4 * 2**30), "text_dtype": "float32"}
    assert (defaults | {"torch": kinoflow.sample.output.installed("torch")}).items() <= plain.items()


def test_a_picture_has_no_quality(run):
    assert run(PROMPT, "--frames", "1", "--out", "still.png")[0] == 0
    with Image.open("still.png") as image:
        assert "crf" not in image.info and image.info["threads"] == "1"
    assert run(PROMPT, "--frames", "1", "--out", "still.mp4", "--crf", "30")[0] == 0
    assert probe("still.mp4").metadata["crf"] == "30.0"


def test_a_list_skips_what_is_finished_and_makes_what_has_other_settings(run):
    Path("list.txt").write_text("a red star\na blue ring\n", encoding="utf-8")
    run("--prompts", "list.txt", "--out", "clips")
    for path in Path("clips").glob("a-blue*"):
        path.unlink()
    _, out, _ = run("--prompts", "list.txt", "--out", "clips", "--json")
    assert [clip.get("skipped", False) for clip in json.loads(out)["clips"]] == [True, False]
    run("--prompts", "list.txt", "--out", "clips", "--guidance", "2")
    assert len(list(Path("clips").iterdir())) == 4
    _, out, _ = run("--prompts", "list.txt", "--out", "clips", "--guidance", "2", "--json")
    assert all(clip["skipped"] for clip in json.loads(out)["clips"])


SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_a_prompt_is_a_line_of_the_file_whatever_characters_it_has(run, ending):
    prompts = ["a red star" + SEPARATORS + "grows", "a blue ring"]
    Path("list.txt").write_bytes(ending.join(prompts).encode())
    code, out, _ = run("--prompts", "list.txt", "--out", "clips", "--json")
    assert code == 0
    assert [clip["prompt"] for clip in json.loads(out)["clips"]] == prompts


@pytest.mark.parametrize("out", ["there.txt", "there.mp4", "new.mp4", "new.PNG"])
def test_a_list_goes_to_a_folder(run, out):
    Path("list.txt").write_text("a red star\n")
    for name in ("there.txt", "there.mp4"):
        Path(name).write_text("mine")
    line = refused(run("--prompts", "list.txt", "--out", out))
    assert line.startswith(f"kinoflow sample: {out}: with --prompts, --out is a folder")
    assert files() == ["list.txt", "there.mp4", "there.txt"]


def test_a_list_goes_on_after_a_failure_and_names_it(run):
    Path("list.txt").write_text("a red star\nbad \0 prompt\na blue ring\n", encoding="utf-8")
    code, out, err = run("--prompts", "list.txt", "--json")
    figures = json.loads(out)
    assert code == 1
    assert len(figures["clips"]) == 2
    assert [failure["prompt"] for failure in figures["failed"]] == ["bad \0 prompt"]
    assert "failed: 'bad" in err


def test_help_is_there_at_once():
    code = (
        "import sys; from kinoflow.sample.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'av', 'zarr') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_memory_that_is_no_size_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        run(PROMPT, "--memory", "lots")
    assert "'lots' is not a size; write it as 8GiB" in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_leaves_nothing(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(kinoflow.sample.pipeline, "decode_pieces", interrupt)
    code, _, err = run(PROMPT)
    assert code == 130
    assert err.count("\n") == 1
    assert files() == []


def test_a_full_disk_is_one_line_and_leaves_nothing(run, monkeypatch):
    def full(self, frames: np.ndarray):
        raise UserError("x.mp4: the disk is full")

    monkeypatch.setattr(kinoflow.sample.output.VideoWriter, "write", full)
    assert "disk is full" in refused(run(PROMPT))
    assert files() == []


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red star!", "a-red-star"),
        ('a sign that reads "KITE"', "a-sign-that-reads-kite"),
        ("🎉", "clip"),
        ("x" * 300, "x" * 60),
        ("../up", "up"),
    ],
)
def test_slugs_are_safe_file_names(prompt, name):
    assert slug(prompt) == name
