"""A folder of clips in one call: which files are left out, and the pages of what was lost."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from kinoflow.data import video
from kinoflow.tae.__main__ import main
from tests.data.making import gradient


@pytest.fixture
def shown(weights, capsys):
    """Runs a command; the lines of a terminal."""

    def command(*words: object) -> list[str]:
        assert main([*map(str, words), "--weights", str(weights)]) == 0
        return capsys.readouterr().out.splitlines()

    return command


@pytest.fixture
def clips(tmp_path) -> Path:
    """Two clips, one of them deeper down, a folder of pictures, and a text."""
    folder = tmp_path / "clips"
    (folder / "deep" / "frames").mkdir(parents=True)
    for name in ("a.mp4", "deep/b.mp4"):
        video.write(folder / name, gradient(9), fps=25)
    for index, picture in enumerate(gradient(3)):
        Image.fromarray(picture).save(folder / "deep" / "frames" / f"{index}.jpg")
    (folder / "notes.txt").write_text("hello")
    return folder


def test_a_folder_has_a_page_for_each_clip_and_one_that_leads_to_them(tmp_path, run, clips):
    (clips / "bad.mp4").write_bytes(b"no clip")
    (clips / "deep" / "b.mp4").rename(clips / "deep" / "b #1.mp4")
    out, page = tmp_path / "out", tmp_path / "pages" / "index.html"
    figures = run("reconstruct", clips, out, "--report", page, status=1)
    assert figures["report"] == str(page)
    pages = [out / "a.mp4.html", out / "deep" / "b #1.mp4.html", out / "deep" / "frames.mp4.html"]
    assert sorted(out.rglob("*.html")) == pages
    text = page.read_text(encoding="utf-8")
    links = [page.parent / unquote(link) for link in re.findall('href="([^"]+)"', text)]
    assert sorted(link.resolve() for link in links) == pages
    worst = min(figures["results"], key=lambda clip: clip["psnr"])
    assert links[0].resolve() == Path(worst["report"]) and f"{worst['psnr']:.2f}" in text
    assert "Failed: " in text and "bad.mp4" in text


def test_what_a_folder_ignores_is_named(tmp_path, run, clips, shown):
    for name in ("a cover.png", "deep/b.JPG", "deep/frames/thumbs.db", ".hidden"):
        (clips / name).write_text("x")
    figures = run("encode", clips, tmp_path / "out")
    assert figures["ignored_files"] == 4
    beside = " (a picture beside clips)"
    assert figures["ignored"] == [
        f"a cover.png{beside}",
        "notes.txt",
        f"deep/b.JPG{beside}",
        "deep/frames/thumbs.db",
    ]
    for number in range(20):
        (clips / f"notes{number}.txt").touch()
    (line,) = (line for line in shown("encode", clips, tmp_path / "out") if line.startswith("ignored: "))
    assert line.startswith(f"ignored: a cover.png{beside}, notes.txt, ") and line.endswith(" and 14 more")
