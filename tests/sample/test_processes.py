"""Clips by two and by four processes against those of one alone; who speaks, and who ends with whom."""

import json
import multiprocessing
from fractions import Fraction

import pytest
import torch
from PIL import Image

from kinoflow.configs.errors import UserError
from kinoflow.data.video import probe, read
from kinoflow.dit_video.mmdit import MMDiTConfig
from kinoflow.dit_video.unet import UNetConfig
from kinoflow.dit_video.video_dit import DiTConfig
from kinoflow.sample.__main__ import main
from kinoflow.sample.processes import way_for
from kinoflow.sample.release import Release, write
from tests.sample.several import PROMPT, begin, encoder, made
from tests.sample.test_labels import card, tiny_unet
from tests.train.launching import free_port

LONG = 60  # seconds that no test takes
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.sample.several"])


def start(what, size, *arguments, meetings=1):
    """The exit statuses of processes that start and end together."""
    ports = [free_port() for _ in range(meetings)]
    started = [
        _context.Process(target=begin, args=(what, rank, size, ports, *arguments)) for rank in range(size)
    ]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(LONG)
        return [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.fixture(scope="module")
def cases(tiny_release_folder, reading_folder, tmp_path_factory):
    """Releases and settings by name."""
    place = tmp_path_factory.mktemp("cases")
    Image.linear_gradient("L").convert("RGB").resize((32, 32)).save(place / "a.png")
    tiny_unet().save_pretrained(place / "unet")
    write(place / "classes", config=card(), parts={"unet": place / "unet"})
    known = {"image": str(place / "a.png"), "frames": 64, "fps": Fraction(24000, 1001)}
    tricks = {"guidance_kind": "apg", "guidance_interval": (0.2, 0.8), "guidance_rescale": 0.5, "cache": 0.2}
    clips = {
        "plain": (tiny_release_folder, {"prompt": PROMPT, "negative": "a long ring of blue and gray"}),
        "tricks": (tiny_release_folder, {"prompt": PROMPT, "steps": 8, "solver": "heun", **tricks}),
        "known in windows": (reading_folder, {"prompt": PROMPT, **known}),
        "a single picture": (tiny_release_folder, {"prompt": PROMPT, "frames": 1}),
        "labels": (place / "classes", {"prompt": "dog"}),
        "unguided": (tiny_release_folder, {"prompt": PROMPT, "guidance": 1.0}),
        "unguided in windows": (reading_folder, {"prompt": PROMPT, "guidance": 1.0, **known}),
    }
    return {name: (str(folder), {"steps": 3, "seed": 4} | how) for name, (folder, how) in clips.items()}


@pytest.fixture(scope="module")
def spread(cases, tmp_path_factory):
    """What each number of processes made."""
    found = {}
    for size, more in ((2, ["unguided", "unguided in windows"]), (4, [])):
        chosen = {name: cases[name] for name in ["plain", "tricks", "known in windows", "labels", *more]}
        if size == 4:
            del chosen["labels"]
        out = tmp_path_factory.mktemp("spread") / "latents.pt"
        assert start("latents", size, chosen, out) == [0] * size
        found[size] = torch.load(out)
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_make_the_clip_of_one(cases, spread, size, monkeypatch):
    """The two passes of the guidance at two processes; at four with the tokens of each shared by two."""
    monkeypatch.setattr(Release, "encoder", encoder)
    assert {"plain", "tricks", "known in windows"} <= spread[size].keys()
    for name, (latent, passes) in spread[size].items():
        alone, computed = made(*cases[name])
        assert (latent - alone).abs().max() < 1e-3 * alone.abs().max(), name
        assert passes == computed and computed[0] > 0, name
    assert spread[2].keys() - spread[4].keys() == {"labels", "unguided", "unguided in windows"}
    assert spread[2]["tricks"][1][1] > 0  # the cache had its say


TEXT = DiTConfig(
    width=32, depth=2, heads=4, ffn=48, latent_channels=4, text_widths=(8,), max_tokens=(8, 8, 8)
)


@pytest.mark.parametrize(
    ("size", "guided", "expected"),
    [
        (2, True, "one for each pass of the guidance"),
        (2, False, "2 share the clip's tokens"),
        (4, True, "for each pass 2 share the clip's tokens"),
        (4, False, "4 share the clip's tokens"),
    ],
)
def test_how_they_share_a_clip(size, guided, expected):
    assert str(way_for(size, TEXT, guided=guided)) == expected


@pytest.mark.parametrize(
    ("size", "config", "guided", "said"),
    [
        (3, TEXT, True, "3 cannot share a clip, 3 does not divide dit.heads=4; start 2"),
        (8, TEXT, False, "8 cannot share a clip, 8 does not divide dit.heads=4; start 4"),
        (6, TEXT, True, "6 cannot share a clip, 3 does not divide dit.heads=4; start 4"),
        (4, UNetConfig(), True, "4 cannot share a clip, only a dit/ shares a clip's tokens; start 2"),
        (2, MMDiTConfig(), False, "2 cannot share a clip, only a dit/ shares a clip's tokens; start 1"),
    ],
)
def test_processes_that_would_stand_by_are_refused(size, config, guided, said):
    with pytest.raises(UserError, match=f"processes: {said}"):
        way_for(size, config, guided=guided)


@pytest.fixture(scope="module")
def said(whole_release_folder, tmp_path_factory):
    """What two processes said to some commands, and the folder in which they were."""
    folder = tmp_path_factory.mktemp("said")
    (folder / "list.txt").write_text("a red star\na blue ring\n")
    common = ["--weights", str(whole_release_folder), "--steps", "2"]
    lines = [
        [PROMPT, *common, "--out", "clip.mp4", "--json"],
        ["--prompts", "list.txt", *common, "--guidance", "1", "--out", "clips", "--batch", "2"],
        ["--prompts", "list.txt", *common, "--out", "clips", "--guidance", "1", "--json"],
        ["again", "clip.mp4", "--weights", str(whole_release_folder)],
        [PROMPT, *common, "--frames", "17"],
        ["push", "x"],
        ["--help"],
        [PROMPT, "--weights", "nowhere"],
        [PROMPT, *common, "--device", "cuda:3"],
    ]
    assert start("commands", 2, lines, folder, meetings=len(lines)) == [0, 0]
    told = [
        [json.loads((folder / f"{i}.{rank}.json").read_text()) for rank in (0, 1)] for i in range(len(lines))
    ]
    return folder, told


def test_only_the_first_speaks_and_writes(said):
    folder, told = said
    assert [[code, err] for _, (code, _, err) in told if code or err] == []
    clip = json.loads(told[0][0][1])["clips"][0]
    assert told[0][0][2].splitlines()[:1] == ["2 processes: one for each pass of the guidance"]
    assert clip["processes"] == probe(folder / "clip.mp4").metadata["processes"] == "2"
    assert [out for _, (_, out, _) in told if out] == []
    assert told[6][0][1].startswith("usage: kinoflow sample")
    assert len(list((folder / "clips").iterdir())) == 2
    assert read(folder / "clip.mp4").shape == (16, 32, 32, 3)


def test_lists_are_made_once(said):
    _, told = said
    first, again = told[1][0], told[2][0]
    assert first[0] == again[0] == 0
    assert first[1].splitlines()[0] == "2 processes: 2 share the clip's tokens"
    assert [clip["skipped"] for clip in json.loads(again[1])["clips"]] == [True, True]


def test_a_clip_is_made_again_by_as_many(said, whole_release_folder, capsys):
    folder, told = said
    assert told[3][0][1] == "clip.mp4: equal, to the byte\n"
    assert main(["again", str(folder / "clip.mp4"), "--weights", str(whole_release_folder)]) == 2
    how = "run torchrun --nproc-per-node 2 -m kinoflow.sample again"
    assert f"2 processes made it, and these are 1; {how}" in capsys.readouterr().err


def test_a_mistake_is_told_once(said):
    _, told = said
    for number, line in {
        4: "frames 17: tiny makes no such clips",
        5: "push: one process does it; start it without torchrun",
        7: "nowhere",
        8: "cuda:3: torch has no such device here",
    }.items():
        code, out, err = told[number][0]
        assert (code, out, err.count("\n")) == (2, "", 1) and line in err


@pytest.mark.parametrize("who", [0, 1])
def test_the_others_end_with_one_that_is_killed(who, whole_release_folder, tmp_path):
    words = [
        PROMPT,
        "--weights",
        str(whole_release_folder),
        "--steps",
        "4",
        "--out",
        str(tmp_path / "clip.mp4"),
    ]
    statuses = start("dying", 2, who, words)
    assert statuses[who] == -9 and statuses[1 - who] == 1
    assert list(tmp_path.iterdir()) == []


def test_the_others_end_with_one_that_waits_for_none(tiny_release_folder):
    assert start("leaving", 2, str(tiny_release_folder)) == [0, 0]
