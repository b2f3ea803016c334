"""The page: whole in itself, true to the figures, and the worst frames are the worst."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from kinoflow.data import video
from kinoflow.data.video.footage import footage
from kinoflow.tae import TAE
from kinoflow.tae.codec import jobs
from kinoflow.tae.codec.codec import Codec
from kinoflow.tae.codec.report import WorstFrames, _ramp, _thinned, _ticks
from tests.data.making import gradient
from tests.tae.mutating import TINY


class Reader(HTMLParser):
    """Tags in balance, and every address that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for key, value in attrs if key in {"src", "href", "srcset"}]
        if tag not in {"meta", "img", "line", "polyline", "circle"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.addresses += [value for key, value in attrs if key in {"src", "href"}]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one - other).abs().mean()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[dict, str]:
    folder = tmp_path_factory.mktemp("report")
    source = folder / "clip <b>.mp4"
    video.write(source, gradient(70), fps=25)
    torch.manual_seed(0)
    tae = TAE(TINY)
    tae.init_weights()
    figures = jobs.reconstruct(
        Codec(tae.eval(), name="tiny"),
        source,
        folder / "out.mp4",
        jobs.Comparison(distance=distance, report=folder / "page.html", every=10),
        fps=None,
        audio=False,
        crf=18,
        progress=lambda done, total: None,
    )
    return figures, Path(figures["report"]).read_text(encoding="utf-8")


def test_the_page_is_whole_and_needs_no_network(made):
    _, page = made
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.addresses
    assert all(address.startswith("data:image/png;base64,") for address in reader.addresses)
    assert not re.search(r"https?://|@import|url\(|<script", page)
    assert "clip &lt;b&gt;.mp4" in page
    assert "<b>" not in page


def test_the_page_shows_the_figures(made):
    figures, page = made
    for value in (f"{figures['psnr']:.2f}", f"{figures['ssim']:.4f}", f"{figures['perceptual']:.4f}"):
        assert value in page
    assert page.count("<polyline") == 4
    worst = int(np.argmin(figures["psnr_by_frame"]))
    assert f"Frame {worst} " in page
    assert len(re.findall("Frame [0-9]+ ", page)) == 3  # one of each second


def test_perceptual_frames_and_flicker(made):
    figures, _ = made
    assert figures["perceptual_frames"] == tuple(range(0, 70, 10))
    assert figures["perceptual"] == pytest.approx(np.mean(figures["perceptual_by_frame"]))
    assert len(figures["flicker_by_frame"]) == 69
    assert figures["perceptual_note"] is None


def test_worst_frames_are_the_worst_of_their_spans():
    random = np.random.default_rng(0)
    psnr = random.permutation(40).astype(float).tolist()
    frames = np.arange(40, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    worst = WorstFrames(8)
    for start in range(0, 40, 7):  # chunks and tiles need not agree
        part = slice(start, start + 7)
        worst.update(frames[part], 255 - frames[part], psnr[part])
    best = [min(range(tile, tile + 8), key=lambda index: psnr[index]) for tile in range(0, 40, 8)]
    expected = sorted(best, key=lambda index: psnr[index])[:4]
    found = worst.frames()
    assert [frame.index for frame in found] == expected
    assert all(frame.source[0, 0, 0] == frame.index for frame in found)
    assert all(frame.decoded[0, 0, 0] == 255 - frame.index for frame in found)


def test_ticks_are_round_and_cover():
    for low, high in ((0.0, 0.0), (24.07, 24.08), (-3.0, 5.0), (0.0, 600.0), (1e-6, 2e-6)):
        ticks = _ticks(low, high)
        assert ticks[0] <= low + 1e-12
        assert ticks[-1] >= high - 1e-12
        assert 2 <= len(ticks) <= 7
        assert ticks == sorted(set(ticks))


def test_a_long_curve_keeps_its_extremes():
    values = np.random.default_rng(0).random(14_315)
    kept = _thinned(list(np.arange(14_315) / 24), values.tolist())
    assert len(kept) <= 2000
    assert [time for time, _ in kept] == sorted(time for time, _ in kept)
    shown = [value for _, value in kept]
    assert (min(shown), max(shown)) == (values.min(), values.max())


def test_the_difference_map_is_darker_where_more_is_lost():
    colors = _ramp(np.array([[0.0, 10.0, 30.0, 64.0, 200.0]]))[0].astype(int)
    assert colors[0].tolist() == [255, 255, 255]
    assert np.all(np.diff(colors.sum(axis=1))[:3] < 0)
    assert np.array_equal(colors[3], colors[4])


def test_one_frame_has_a_page(tmp_path):
    video.write(tmp_path / "a.mp4", gradient(1), fps=25)
    tae = TAE(TINY)
    tae.init_weights()
    comparison = jobs.Comparison(report=tmp_path / "new" / "page.html", without="not measured: no weights")
    figures = jobs.reconstruct(
        Codec(tae.eval(), name="tiny"),
        tmp_path / "a.mp4",
        tmp_path / "b.mp4",
        comparison,
        fps=None,
        audio=False,
        crf=18,
        progress=lambda done, total: None,
    )
    assert figures["flicker"] is None
    assert "not measured: no weights" in Path(figures["report"]).read_text(encoding="utf-8")
    assert footage(tmp_path / "b.mp4").info.frames == 1
