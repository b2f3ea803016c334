"""A thousand spoiled files: each gives one clear line or a whole result, in time, and nothing half done."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.tae.mutating import make_sources

ROOT = Path(__file__).parents[2]
FILES, BATCH = 1000, 500


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    make_sources(folder)
    return folder


@pytest.mark.parametrize("first", range(0, FILES, BATCH))
def test_spoiled_files(sources: Path, first: int) -> None:
    """In a process of their own, so that a crash or a hang in FFmpeg is seen and the file is named."""
    words = [sys.executable, "-m", "tests.tae.mutating", str(sources), str(first), str(first + BATCH)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout)
    assert [outcome["index"] for outcome in outcomes] == list(range(first, first + BATCH))
    assert [outcome for outcome in outcomes if outcome["problems"]] == []
    # Neither all refused nor all accepted: the files are spoiled, and only partly.
    assert all(Counter(outcome["status"] for outcome in outcomes)[status] > 10 for status in (0, 2))
