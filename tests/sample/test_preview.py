"""What a terminal shows of a clip that is being made: colours of latents, half blocks, and where nothing."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.segment import Segments

from kinoflow.dit_video.flow.matching import data_from_velocity, perturb
from kinoflow.dit_video.flow.paths import cond_ot, cosine
from kinoflow.sample.generate import Sampling, sample_latent
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.preview import Previews, fit_colors, half_blocks
from kinoflow.sample.request import ClipRequest
from kinoflow.tae.model.config import LatentShape
from kinoflow.tae.model.pixels import Pixels
from kinoflow.tae.model.tae import TAE


class LinearFlow:
    """E[z|x] = 1/4 everywhere: the velocity is (z - x) / (1 - t)."""

    def encode_condition(self, condition):
        return condition

    def __call__(self, latent, time, condition):
        return (0.25 - latent) / (1 - time).clamp(min=1e-4)


RED, BLUE, GRAY = (255, 0, 0), (0, 0, 255), (7, 8, 9)


def terminal(width: int = 40, **settings) -> Console:
    keys = {"force_terminal": True, "color_system": "truecolor", "legacy_windows": False} | settings
    return Console(file=io.StringIO(), width=width, height=20, no_color=False, **keys)


def printed(picture: Segments) -> str:
    console = terminal()
    console.print(picture)
    return console.file.getvalue()


def plain(picture: Segments) -> str:
    return "".join(segment.text for segment in picture.segments)


def test_the_shipped_releases_map_shows_what_the_decoder_shows():
    pipeline = Pipeline.from_pretrained(device="cpu")
    request = ClipRequest(prompt="a red star moves left on a blue background", steps=4, best_of=1)
    plan, seen = pipeline.plan(request), []
    take = pipeline.flow(plan, pipeline.conditions(plan), seen=seen.append)
    latent, frames = take.latent, np.concatenate(list(pipeline.decode(plan, take)))
    decoded = F.adaptive_avg_pool3d(torch.from_numpy(frames).movedim(-1, 0).float(), latent.shape[2:])
    shown = fit_colors(pipeline.decoder)(latent)
    assert shown.shape == (4, 16, 16, 3)
    pair = torch.stack((shown.float().flatten(), decoded.movedim(0, -1).flatten()))
    assert torch.corrcoef(pair)[0, 1] > 0.8 and (pair[0] - pair[1]).abs().mean() < 30
    assert len(seen) == 4
    torch.testing.assert_close(seen[-1], latent, atol=0.05, rtol=0)


def test_the_map_of_a_linear_autoencoder_is_found():
    """Latents that are the cells' mean colours, mixed by a known matrix."""
    mix = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.2, 0.0, 1.0], [1.0, 1.0, 1.0]])

    class Mean(TAE):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.anchor = torch.nn.Parameter(torch.zeros(()))
            self.config = type("Config", (), {"factors": (8, 4, 4)})

        def encode(self, video):
            cells = F.avg_pool3d(video, (8, 4, 4))
            return type("Posterior", (), {"mean": torch.einsum("oc,bcthw->bothw", mix, cells) + 0.5})

        def normalize(self, latent):
            return latent / 2

    colors = fit_colors(Mean())
    torch.testing.assert_close(colors.weight @ mix / 2, torch.eye(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(colors.bias, -colors.weight @ torch.full((4,), 0.25), atol=1e-4, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_their_own_colours(channels):
    latent = torch.rand(1, channels, 2, 4, 5) * 2 - 1
    shown = fit_colors(Pixels(channels))(latent)
    want = ((latent[0].expand(3, -1, -1, -1) + 1) * 127.5).round().byte().movedim(0, -1)
    assert torch.equal(shown, want)


@pytest.mark.parametrize("path", [cond_ot, cosine])
def test_where_the_flow_leads_is_the_data(path):
    data, noise, time = (
        *torch.randn(2, 5, 3, dtype=torch.float64),
        torch.linspace(0, 1, 5, dtype=torch.float64),
    )
    sample = perturb(data, noise, time, path)
    torch.testing.assert_close(data_from_velocity(sample.velocity, sample.x_t, time, path), data)


def test_a_known_latent_as_text():
    """Red over blue, gray alone in the last line; the frames side by side."""
    frames = torch.tensor([[[RED, BLUE], [BLUE, RED], [GRAY, GRAY]]] * 2, dtype=torch.uint8)
    red_on_blue, blue_on_red = "\x1b[38;2;255;0;0;48;2;0;0;255m▀", "\x1b[38;2;0;0;255;48;2;255;0;0m▀"
    line = f"{red_on_blue}\x1b[0m{blue_on_red}\x1b[0m"
    last = "\x1b[38;2;7;8;9m▀\x1b[0m\x1b[38;2;7;8;9m▀\x1b[0m"
    assert printed(half_blocks(frames, columns=5)) == f"{line} {line}\n{last} {last}\n"
    assert printed(half_blocks(frames, columns=4)) == f"{line}\n{last}\n"


def test_a_large_picture_becomes_its_cells_means():
    frames = torch.zeros(1, 64, 8, 3, dtype=torch.uint8)
    frames[:, ::2] = 100
    picture = half_blocks(frames, columns=80, rows=4)
    assert plain(picture) == "▀\n" * 4
    assert printed(picture).count("38;2;50;50;50;48;2;50;50;50") == 4


@pytest.mark.parametrize(
    ("settings", "shows"),
    [
        ({}, True),
        ({"force_terminal": False}, False),
        ({"color_system": "256"}, False),
        ({"color_system": None}, False),
        ({"no_color": True}, False),
    ],
)
def test_only_a_terminal_of_24_bit_colours_sees_it(settings, shows):
    keys = {"force_terminal": True, "color_system": "truecolor", "no_color": False} | settings
    console = Console(file=io.StringIO(), **keys)
    previews = Previews(lambda: pytest.fail("nothing was to be shown") if not shows else Pixels(3), console)
    watch = previews.watch(1, 50)
    assert (watch is not None) == shows
    if watch is not None:
        watch(torch.zeros(1, 3, 1, 2, 2))
        assert [plain(picture) for picture in previews()] == ["▀▀\n"]


def test_each_few_velocities_the_first_clip_that_is_there_is_shown():
    previews, counted = Previews(lambda: Pixels(3), terminal()), []
    previews.__dict__["_colors"] = lambda latent: (
        counted.append(int(latent)) or torch.zeros(1, 2, 2, 3).byte()
    )
    assert list(previews()) == []
    second, first = previews.watch(2, 50), previews.watch(1, 4)
    for number in range(50):
        second(torch.full((1, 1, 1, 1, 1), float(number)))
    assert counted == list(range(0, 50, 3))
    (shown,) = previews()
    first(torch.zeros(1, 1, 1, 1, 1))
    assert list(previews()) != [] and next(iter(previews())) is not shown
    previews.drop(1)
    assert list(previews()) == [shown]
    previews.drop(2)
    previews.drop(2)
    assert list(previews()) == []


def test_what_is_seen_changes_nothing():
    sampling, shape = (
        Sampling(num_steps=5, guidance_scale=1.0),
        LatentShape(channels=2, frames=1, height=2, width=2),
    )
    seen = []
    keys = {"seed": 3, "sampling": sampling}
    watched = sample_latent(LinearFlow(), (), (), shape, seen=seen.append, **keys)
    assert torch.equal(watched, sample_latent(LinearFlow(), (), (), shape, **keys))
    for estimate in seen:  # every velocity of this flow leads to the same data
        torch.testing.assert_close(estimate, torch.full((1, 2, 1, 2, 2), 0.25), atol=1e-3, rtol=0)


def test_the_command_shows_it_in_a_terminal_and_nowhere_else(run, monkeypatch):
    said = run("a star", "--out", "a.mp4")
    assert "▀" not in said[2] and "\x1b" not in said[2]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "30")
    code, out, err = run("a star", "--out", "b.mp4")
    assert code == 0 and "▀" in err and "\x1b[38;2;" in err and "▀" not in out
    assert "▀" not in run("a star", "--out", "c.mp4", "--preview", "off")[2]
    monkeypatch.setenv("COLORTERM", "")
    assert "▀" not in run("a star", "--out", "d.mp4")[2]
    clips = [Path(f"{name}.mp4").read_bytes() for name in "abcd"]
    assert clips[1:] == clips[:1] * 3


def on_screen(text: str) -> list[str]:
    """Lines that a terminal shows in the end: colours aside, it is told to go up and to wipe lines off."""
    lines, at = [""], 0
    for code, char in re.findall(r"\x1b\[\??([\d;]*[A-Za-z])|([^\x1b])", text):
        if code.endswith("A"):
            at -= int(code[:-1])
        elif code == "2K":
            lines[at] = ""
        elif char == "\n":
            at += 1
            lines += [""] * (at == len(lines))
        elif char.strip():
            lines[at] += char
    return [line for line in lines if line]


def test_only_the_line_that_says_where_the_clip_is_stays_in_the_terminal(run, monkeypatch):
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Screen()
    for name, value in {"COLORTERM": "truecolor", "TERM": "xterm-256color", "FORCE_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    assert run("a star", "--out", "a.mp4")[0] == 0
    assert "▀" in screen.getvalue()
    (line,) = on_screen(screen.getvalue())
    assert line.startswith("a.mp4")
