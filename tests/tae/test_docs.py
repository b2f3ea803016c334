"""The code of docs/latents.md runs as it stands, and its printed result is as good as the page says."""

import re
from pathlib import Path

import pytest

from kinoflow.data import video
from tests.data.making import gradient
from tests.test_readme import fences

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "latents.md").read_text(encoding="utf-8")
BLOCKS = [code for language, code in fences(TEXT) if language == "python"]
SHOWN = next(code for language, code in fences(TEXT) if language == "text")


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the page names sample/mini/tae


def run(code: str, folder: Path, names: dict[str, object]) -> None:
    """Run a block with its clips and latent files moved into `folder`."""
    exec(re.sub(r'"(\w+\.(?:mp4|kino))"', rf'"{folder}/\1"', code), names)


def test_five_lines_and_latent_files(tmp_path, capsys):
    video.write(tmp_path / "clip.mp4", gradient(40), fps=25)
    names: dict[str, object] = {}
    for block in BLOCKS[:3]:
        run(block, tmp_path, names)
    assert names["latent"].shape == (1, 16, 4, 6, 8)
    assert video.probe(tmp_path / "back.mp4").frames == 32
    assert capsys.readouterr().out.splitlines() == ["(8, 48, 64, 3)", "(5, 16, 6, 8) 25"]


def test_retrieval_finds_what_the_page_says(tmp_path, capsys):
    """The same lines, each far above chance; the percentages move when the weights are trained anew."""
    run(BLOCKS[3], tmp_path, {})
    printed, shown = capsys.readouterr().out.splitlines(), SHOWN.splitlines()
    pattern = r"(.+:) +(\d+)% \(by chance (\d+)%\)"
    for line, promised in zip(printed, shown, strict=True):
        title, hits, chance = re.fullmatch(pattern, line).groups()
        assert re.fullmatch(pattern, promised).group(1, 3) == (title, chance)
        assert int(hits) >= 2 * int(chance)
