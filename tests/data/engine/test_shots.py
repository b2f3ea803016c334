"""Cuts against PySceneDetect's own detector and joins that are known, dissolves against rendered ones."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from kinoflow.data import video
from kinoflow.data.engine.config import ScanConfig, ShotConfig
from kinoflow.data.engine.dissolves import Dissolve, dissolves
from kinoflow.data.engine.parts import FLOATS, Signals
from kinoflow.data.engine.scan import scan, spans
from kinoflow.data.engine.shots import cuts, pieces, shots
from tests.data.engine.planting import FPS, SHOTS, dissolved, shot, write
from tests.data.making import real_clip

scenedetect = pytest.importorskip("scenedetect")
PLAIN = ScanConfig(text="none")
BIKES = [30, 76, 137, 187, 242]  # seen by eye


def f1(found: list[int], wanted: list[int], within: int) -> float:
    """Each of the wanted is found once, within so many frames."""
    left, hits = list(found), 0
    for want in wanted:
        near = [at for at in left if abs(at - want) <= within]
        if near:
            left.remove(near[0])
            hits += 1
    return 2 * hits / max(1, len(found) + len(wanted))


def signals_of(path: Path) -> Signals:
    return scan(path, range(video.probe(path).frames), PLAIN)


def segments(seed: int, count: int) -> list[np.ndarray]:
    """Pieces of real shots in random order, some mirrored or at another speed; neighbours differ."""
    rng, found, names = np.random.default_rng(seed), [], list(SHOTS)
    before = ""
    for _ in range(count):
        name = str(rng.choice([each for each in names if each != before]))
        clip, before = shot(name), name
        length = int(rng.integers(14, 40))
        start = int(rng.integers(0, len(clip) - length))
        piece = clip[start : start + length]
        found.append(piece[:, :, ::-1] if rng.random() < 0.5 else piece)
    return found


def test_hard_cuts_of_joined_shots(tmp_path: Path) -> None:
    parts = segments(seed=0, count=64)
    write(tmp_path / "a.mp4", np.concatenate(parts), crf=23)
    found = cuts(signals_of(tmp_path / "a.mp4").values["change"], ShotConfig()).tolist()
    wanted = np.cumsum([len(part) for part in parts])[:-1].tolist()
    assert len(wanted) == 63
    assert f1(found, wanted, within=0) >= 0.95


def test_cuts_of_a_real_film() -> None:
    signals = signals_of(real_clip("bikes.mp4"))
    assert cuts(signals.values["change"], ShotConfig()).tolist() == BIKES
    assert dissolves(signals.values["dissolve"], signals.values["dissolve_half"], ShotConfig().dissolve) == []


def test_the_rule_is_that_of_the_detector() -> None:
    """PySceneDetect's AdaptiveDetector on the same pictures; it does not look at the last two frames."""
    from scenedetect import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector

    path = real_clip("bikes.mp4")
    for adaptive, least in ((3.0, 15.0), (1.5, 8.0), (2.0, 5.0)):
        detector = AdaptiveDetector(adaptive_threshold=adaptive, min_scene_len=0, min_content_val=least)
        found: list[int] = []
        for each in video.thumbnails(path, range(250), side=160, detail=640, every=1000):
            picture = np.ascontiguousarray(each.small[..., ::-1])
            found += [at.frame_num for at in detector.process_frame(FrameTimecode(each.index, 25.0), picture)]
        config = ShotConfig(adaptive=adaptive, least_change=least)
        mine = cuts(signals_of(path).values["change"], config).tolist()
        assert [at for at in mine if 2 < at < 248] == [at for at in found if at > 2]
        assert len(mine) > 4


def test_the_change_is_that_of_the_detector() -> None:
    from scenedetect import FrameTimecode, StatsManager
    from scenedetect.detectors import ContentDetector

    path, stats, detector = real_clip("bikes.mp4"), StatsManager(), ContentDetector()
    detector.stats_manager = stats
    for each in video.thumbnails(path, range(80), side=160, detail=640, every=1000):
        picture = np.ascontiguousarray(each.small[..., ::-1])
        detector.process_frame(FrameTimecode(each.index, 25.0), picture)
    wanted = [stats.get_metrics(FrameTimecode(at, 25.0), ["content_val"])[0] for at in range(1, 80)]
    np.testing.assert_allclose(scan(path, range(80), PLAIN).values["change"][1:], wanted, rtol=1e-6)


def test_dissolves_are_found_and_cuts_are_none(tmp_path: Path) -> None:
    """Of 4 to 40 frames, 0.16 to 1.6 s, between real shots that move."""
    rng = np.random.default_rng(1)
    names = ["rabbit", "street", "car", "crossing"]
    clip, wanted = shot(names[-1])[:30], []
    for number in range(16):
        following = shot(names[number % 4])[:45]
        length = int(rng.choice([4, 6, 8, 12, 16, 20]))
        wanted.append((len(clip) - length, len(clip) - 1))
        clip = dissolved(clip, following, length)
    write(tmp_path / "a.mp4", clip, crf=20)
    values = signals_of(tmp_path / "a.mp4").values
    found = dissolves(values["dissolve"], values["dissolve_half"], ShotConfig().dissolve)
    overlap = [any(each.first <= last and first <= each.last for each in found) for first, last in wanted]
    right = [any(each.first <= last and first <= each.last for first, last in wanted) for each in found]
    score = 2 * sum(overlap) / (len(found) + len(wanted))
    assert score >= 0.8, (wanted, found)
    assert all(right) or sum(right) / len(right) > 0.9


def test_a_fade_within_a_shot_is_no_dissolve(tmp_path: Path) -> None:
    share = np.linspace(1, 0.4, 60)[:, None, None, None]
    write(tmp_path / "a.mp4", (shot("rabbit") * share).astype(np.uint8))
    values = signals_of(tmp_path / "a.mp4").values
    assert dissolves(values["dissolve"], values["dissolve_half"], ShotConfig().dissolve) == []


@pytest.mark.parametrize("at", [[113], [1, 125, 200], [60, 61, 62]])
def test_the_pieces_in_which_a_video_is_looked_at_do_not_matter(at: list[int]) -> None:
    path = real_clip("bikes.mp4")
    whole = scan(path, range(250), PLAIN)
    edges = [0, *at, 250]
    parts = [scan(path, range(*pair), PLAIN) for pair in itertools.pairwise(edges)]
    assert [part.first for part in parts] == edges[:-1]
    for key in FLOATS:
        joined = np.concatenate([part.values[key] for part in parts])
        np.testing.assert_array_equal(joined, whole.values[key], err_msg=key)
    np.testing.assert_array_equal(np.concatenate([part.hashes for part in parts]), whole.hashes)


def test_videos_are_split_evenly() -> None:
    found = spans(1001, FPS, 10.0)
    assert [len(span) for span in found] == [200, 200, 200, 200, 201]
    assert [found[0].start, found[-1].stop] == [0, 1001]
    assert spans(5, FPS, 10.0) == [range(5)]


def test_shots_lie_between_cuts_and_outside_of_dissolves() -> None:
    known = np.ones(100, bool)
    known[90:95] = False
    mixed = [Dissolve(first=50, last=59, distance=30.0)]
    assert shots(known, [20], mixed, 0) == [
        range(20), range(20, 50), range(60, 90), range(95, 100)
    ]  # fmt: skip
    assert shots(known, [20], [], 2) == [range(18), range(22, 88), range(97, 100)]
    assert shots(known, [20, 21], [], 3)[1] == range(20, 21), "one frame is left of a short shot"
    assert pieces(range(10, 110), 40) == [range(10, 43), range(43, 76), range(76, 110)]
    assert pieces(range(10, 50), 40) == [range(10, 50)]
