"""Cuts and dissolves of real films, against what was seen by eye (cuts.json).

Every cut of Big Buck Bunny was looked at, in sheets of the frames around each change that any of three
measures at a low threshold found, and of every sixteenth frame. `make clips` fetches the films.
"""

import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from kinoflow.data import video
from kinoflow.data.engine.config import ScanConfig, ShotConfig
from kinoflow.data.engine.dissolves import Dissolve
from kinoflow.data.engine.parts import Signals
from kinoflow.data.engine.scan import scan
from kinoflow.data.engine.shots import boundaries
from tests.data.engine.planting import dissolved, write
from tests.data.engine.test_shots import f1
from tests.data.making import real_clip
from tests.footage import clip

pytest.importorskip("cv2")
SEEN = json.loads((Path(__file__).parent / "cuts.json").read_text(encoding="utf-8"))
FILM, HALF = "bbb.mp4", 7157  # frames of its first half, in which thresholds were chosen


def film(name: str) -> Path:
    path = real_clip(name) if name == "bikes.mp4" else clip(name)
    return path or pytest.skip("needs a film; run make clips")


@functools.cache
def signals(name: str) -> Signals:
    path = film(name)
    return scan(path, range(video.probe(path).frames), ScanConfig(text="none"))


def part(frames: list[int], half: int) -> list[int]:
    return [at for at in frames if (at >= HALF) == bool(half)]


def overlap(one: Dissolve, other: tuple[int, int]) -> bool:
    return one.first <= other[1] and other[0] <= one.last


def overlap_f1(found: list[Dissolve], wanted: list[tuple[int, int]]) -> float:
    """Each counts once that overlaps one of the other kind."""
    hit = sum(any(overlap(each, want) for each in found) for want in wanted)
    right = sum(any(overlap(each, want) for want in wanted) for each in found)
    return 2 * min(hit, right) / max(1, len(found) + len(wanted))


def test_the_list_is_long_and_in_order() -> None:
    cuts = SEEN[FILM]["cuts"]
    assert len(cuts) >= 60 and cuts == sorted(set(cuts))
    assert min(len(part(cuts, half)) for half in (0, 1)) >= 50


@pytest.mark.parametrize("half", [0, 1])
def test_hard_cuts_of_a_film(half: int) -> None:
    """1.00 in the first half, in which thresholds were chosen, and 0.97 in the second."""
    found, _ = boundaries(signals(FILM).values, ShotConfig())
    assert f1(part(found, half), part(SEEN[FILM]["cuts"], half), within=0) >= 0.95


def test_fades_and_dissolves_of_a_film() -> None:
    _, found = boundaries(signals(FILM).values, ShotConfig())
    wanted = [tuple(each) for each in SEEN[FILM]["mixed"]]
    assert overlap_f1(found, wanted) == 1, found


@pytest.mark.parametrize("name", [name for name in SEEN if name != FILM])
def test_other_films(name: str) -> None:
    found, mixed = boundaries(signals(name).values, ShotConfig())
    assert (found, mixed) == (SEEN[name]["cuts"], [])


@functools.cache
def shots() -> list[tuple[int, int]]:
    """Of the film's shots those between two hard cuts that are long enough to be mixed."""
    cuts, mixed = SEEN[FILM]["cuts"], SEEN[FILM]["mixed"]
    spans = [(first, last) for first, last in itertools.pairwise(cuts) if last - first >= 44]
    return [span for span in spans if not any(a < span[1] and span[0] < b for a, b in mixed)]


def rendered(path: Path, half: int, count: int = 25) -> list[tuple[int, int]]:
    """Shots of one half, in random order, each dissolved into the next in 4 to 36 frames; where they are."""
    rng = np.random.default_rng(half)
    spans = [span for span in shots() if (span[0] >= HALF) == bool(half)]
    chosen = [spans[at] for at in rng.permutation(len(spans))[: count + 1]]
    clip, wanted = None, []
    for first, last in chosen:
        span = range(first, min(last, first + 44))
        pictures = video.thumbnails(film(FILM), span, side=320, detail=320, every=1 << 30)
        small = np.stack([picture.small for picture in pictures])
        if clip is None:
            clip = small
            continue
        length = int(rng.choice([4, 6, 8, 12, 16, 20]))
        wanted.append((len(clip) - length, len(clip) - 1))
        clip = dissolved(clip, small, length)
    assert clip is not None
    write(path, clip, crf=23)
    return wanted


@pytest.mark.parametrize("half", [0, 1])
def test_rendered_dissolves_of_a_film(half: int, tmp_path: Path) -> None:
    """Where it was measured: 0.92 and 0.96."""
    wanted = rendered(tmp_path / "a.mp4", half)
    whole = scan(tmp_path / "a.mp4", range(video.probe(tmp_path / "a.mp4").frames), ScanConfig(text="none"))
    _, found = boundaries(whole.values, ShotConfig())
    assert len(wanted) >= 20
    assert overlap_f1(found, wanted) >= 0.8, (wanted, found)
