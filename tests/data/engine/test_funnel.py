"""The page counts what the stages did, and shows the clips nearest to each limit."""

import re
from pathlib import Path

import pytest

from kinoflow.configs.schema import load
from kinoflow.data.__main__ import main
from kinoflow.data.engine import selection
from kinoflow.data.engine.config import CurateConfig
from tests.data.engine.planting import lettered, shot, write

pytest.importorskip("cv2")
KEYS = ["scan.text=none", "select.sharpness=null", "select.motion=:2", "select.shake=null"]


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    for name in ("street", "crossing", "rabbit", "car"):
        write(folder / f"<{name}>.mp4", lettered(shot(name), name))
    (folder / "bad.mp4").write_bytes(b"nothing")
    assert main(["curate", str(folder), str(folder / "out"), "--workers", "0", "--config", *KEYS]) == 0
    return folder / "out"


def test_the_page_counts_as_the_ledger_does(curated: Path) -> None:
    page = (curated / "funnel.html").read_text(encoding="utf-8")
    chosen = selection.select(selection.read_scores(curated), load(CurateConfig, KEYS).select)
    assert f"<h1>{len(chosen.kept)} of 5 shots kept</h1>" in page
    cells = re.findall(r"<tr><td>(.+?)</td><td class=\"rule\">(.*?)</td><td>(\d+)</td><td>(\d+)</td>", page)
    told = [(s.name.replace("_", " "), s.rule, s.came - s.stayed, s.stayed) for s in chosen.stages]
    assert [(name, rule, int(gone), int(left)) for name, rule, gone, left in cells] == told
    assert sum(gone for _, _, gone, _ in told) == len(chosen.ledger)
    assert "25 %" in page and "1.94 %" in page, "the paper's"


def test_examples_are_pictures_nearest_first(curated: Path) -> None:
    page = (curated / "funnel.html").read_text(encoding="utf-8")
    motion = page.partition("<h2>motion</h2>")[2].partition("<h2>")[0]
    shown = [float(text) for text in re.findall(r"<b>([\d.]+)</b>", motion)]
    table = selection.read_scores(curated)
    values = sorted(value for value in table["motion"].to_pylist() if value is not None)
    stay, go = [v for v in values if v <= 2], [v for v in values if v > 2]
    assert stay and go
    assert shown == [float(f"{v:.4g}") for v in (*stay[::-1], *go)]
    assert motion.count("data:image/jpeg;base64,") == 4
    assert "&lt;street&gt;.mp4" in page and "<street>" not in page
    assert "http" not in page.replace("http-equiv", ""), "one file, nothing from elsewhere"
    readable = page.partition("<h2>readable</h2>")[2].partition("<h2>")[0]
    assert "not a video that FFmpeg can read" in readable
