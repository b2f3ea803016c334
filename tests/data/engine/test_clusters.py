"""Clusters of planted embeddings, and how many of each stay: closed forms, the same each time."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import write_json
from kinoflow.data.__main__ import main
from kinoflow.data.clips import manifest
from kinoflow.data.clips.manifest import ClipEntry
from kinoflow.data.engine import clusters, kept, learned, parts, selection
from kinoflow.data.engine.config import ClipConfig, SelectConfig
from kinoflow.data.engine.score import SCHEMA

pytest.importorskip("cv2")
SIZES, WIDTH, WHOLE = (1, 4, 16, 64, 100), 24, 4.0
# sqrt(4 n) of n stay, all of 4 or fewer.
STAYED = {1: 1, 4: 4, 16: 8, 64: 16, 100: 20}


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Directions around one axis each, in random order and of random length, and their axes."""
    rng = np.random.default_rng(seed)
    axes = rng.permutation(np.repeat(np.arange(len(SIZES)), SIZES))
    points = np.eye(len(SIZES), WIDTH)[axes] + rng.normal(0, 0.03, (len(axes), WIDTH))
    return (points * rng.uniform(0.3, 1, (len(axes), 1))).astype(np.float32), axes


def test_planted_clusters_are_found() -> None:
    points, axes = planted()
    found = clusters.centres(points, len(SIZES))
    nearest = clusters.nearest(points, found)
    assert len(set(zip(axes.tolist(), nearest.tolist(), strict=True))) == len(SIZES), "one name for each"
    for axis in range(len(SIZES)):
        unit = points[axes == axis] / np.linalg.norm(points[axes == axis], axis=1, keepdims=True)
        assert found[nearest[axes == axis][0]] == pytest.approx(unit.mean(axis=0), abs=1e-4)
    np.testing.assert_array_equal(found, clusters.centres(points, len(SIZES)))
    with pytest.raises(UserError, match=r"clip.clusters: 6 of 5 shots"):
        clusters.centres(points[:5], 6)


def test_many_shots_move_no_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample is looked at: each axis has its centre all the same."""
    rng = np.random.default_rng(1)
    axes = np.arange(900) % 3
    points = (np.eye(3, 8)[axes] + rng.normal(0, 0.05, (900, 8))).astype(np.float32)
    monkeypatch.setattr(clusters, "_POINTS", 40)
    found = clusters.centres(points, 3)
    assert found[clusters.nearest(np.eye(3, 8, dtype=np.float32), found)] == pytest.approx(
        np.eye(3, 8), abs=0.05
    )


def test_what_stays_goes_by_the_square_root() -> None:
    _, axes = planted()
    size = np.array(SIZES, float)[axes]
    draws = np.random.default_rng(2).uniform(size=len(axes))
    gone = clusters.thinned(axes.astype(float), size, draws, WHOLE)
    stays = np.setdiff1d(np.arange(len(axes)), [*gone])
    assert Counter(size[stays]) == STAYED
    for row, limit in gone.items():
        same = np.flatnonzero(axes == axes[row])
        assert draws[row] > limit == draws[np.intersect1d(same, stays)].max(), "the lowest draws stay"
    assert not clusters.thinned(np.full(3, np.nan), np.full(3, np.nan), draws[:3], 1.0), "of no cluster"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """What curate and embed leave of shots with planted embeddings, and one that nobody looked at."""
    points, _ = planted()
    count = len(points) + 1
    rows = [{"path": f"/{at}.mp4", "shot": 0, "first_frame": 7, "frames": 48, "fps": "24", "seconds": 2.0,
             "begin": "0", "end": "2", "width": 640, "height": 360, "variable_rate": 0.0, "hashes": [],
             "camera": "still"} for at in range(count)]  # fmt: skip
    parts.write_rows(tmp_path / "scores" / "a.parquet", rows, SCHEMA)
    write_json(tmp_path / "parts.json", ["a.parquet"])
    entries = [ClipEntry(path=f"/{at}.mp4", caption="", first_frame=7, frames=48) for at in range(count)]
    manifest.write(tmp_path / "manifest.jsonl", entries)
    cache = kept.Kept(tmp_path / kept.EMBEDDINGS, "how")
    for entry, point in zip(entries, points, strict=False):
        cache.put(entry, {"picture": learned._packed(point), "text": None, "said": ""})
    write_json(tmp_path / kept.EMBEDDINGS / kept.SETTINGS, {"how": "how", "model": "planted"})
    return tmp_path


def test_select_thins_the_clusters_of_the_table(out: Path) -> None:
    config = SelectConfig(resample=WHOLE, duplicates=None)
    with pytest.raises(UserError, match=r"run kinoflow data embed with clip.clusters"):
        selection.select(learned.added(selection.read_scores(out), out, ClipConfig()), config)
    learned.cluster(out / "manifest.jsonl", len(SIZES))
    table = learned.added(selection.read_scores(out), out, ClipConfig())
    _, axes = planted()
    assert table["cluster_size"].to_pylist() == [*np.array(SIZES)[axes].tolist(), None]
    chosen = selection.select(table, config)
    assert Counter(table["cluster_size"][row].as_py() for row in chosen.kept) == STAYED | {None: 1}
    assert (chosen.stages[-1].came, chosen.stages[-1].stayed) == (186, 50)
    other = selection.select(table, SelectConfig(resample=WHOLE, duplicates=None, seed=1))
    assert len(other.kept) == 50 and set(other.kept) != set(chosen.kept)
    rest = selection.select(table.slice(20), config)
    scores = {row + 20: why["score"] for row, why in rest.ledger.items()}
    both = scores.keys() & chosen.ledger.keys()
    assert len(both) > 80 and all(scores[row] == chosen.ledger[row]["score"] for row in both), "its own draw"


def test_the_ledger_says_why(out: Path) -> None:
    learned.cluster(out / "manifest.jsonl", len(SIZES))
    keys = [f"select.resample={WHOLE:g}", "select.duplicates=null"]
    assert main(["select", str(out), "--config", *keys]) == 0
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert len(lines) == 136 and {line["stage"] for line in lines} == {"resample"}
    for line in lines:
        assert line["score"] > float(line["threshold"].removeprefix(":")) - 1e-6
        assert line["cluster_size"] in (16, 64, 100)
    first = (out / "manifest.jsonl").read_text()
    assert "<h2>resample</h2>" in (out / "funnel.html").read_text()
    entries = manifest.read(out / "manifest.jsonl").entries
    assert len(entries) == 50 and sum("cluster" in entry.extra for entry in entries) == 49
    assert main(["select", str(out), "--config", *keys]) == 0
    assert (out / "manifest.jsonl").read_text() == first
    assert main(["select", str(out), "--config", "select.resample=0.5"]) == 2
