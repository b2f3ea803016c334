"""What models say of kept shots: each is asked about once, and remembered by video, shot and way of asking.

There is a file of JSON lines for each video and each way of asking, named by the video's path, size and time
of change too; it is replaced whole with each shot.
"""

import io
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import read_json_lines, write_text
from kinoflow.data import video
from kinoflow.data.clips.manifest import ClipEntry
from kinoflow.data.clips.remote import local, place
from kinoflow.data.engine.config import digest
from kinoflow.data.engine.sources import Source
from kinoflow.data.video.picture import shrink

Key = tuple[str, int, int]  # path, first frame, frames
FOLDERS = CAPTIONS, EMBEDDINGS = "captions", "embeddings"
LEDGER, SETTINGS = "ledger.jsonl", "settings.json"
MOST_FAILURES = 20  # one after another, after which something is wrong with all of them
_QUALITY = 90  # of JPEG


class Kept:
    """What was said in one way of asking; used by one thread."""

    def __init__(self, folder: Path, how: str) -> None:
        self._folder, self._how = folder, how
        self._known: dict[str, dict[Key, Mapping[str, Any]]] = {}
        self._files: dict[str, Path] = {}

    def get(self, entry: ClipEntry) -> Mapping[str, Any] | None:
        """What is known of a clip."""
        return self._video(entry.path).get(key_of(entry))

    def put(self, entry: ClipEntry, said: Mapping[str, Any]) -> None:
        """Remember it, on the disk too."""
        known = self._video(entry.path)
        known[key_of(entry)] = said
        rows = [
            {"path": path, "first_frame": first, "frames": frames} | dict(values)
            for (path, first, frames), values in sorted(known.items(), key=lambda item: item[0])
        ]
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(self._files[entry.path], "".join(lines))

    def _video(self, path: str) -> dict[Key, Mapping[str, Any]]:
        if path not in self._known:
            source = Source(path=path)
            stamp = source.stamp()
            _forget(self._folder, source, stamp)
            self._files[path] = self._folder / f"{source.name}-{digest([stamp])}-{self._how}.jsonl"
            self._known[path] = dict(_rows(self._files[path]))
        return self._known[path]


def read(folder: Path, how: str) -> dict[Key, Mapping[str, Any]]:
    """All that is remembered of one way of asking."""
    return {key: row for file in sorted(folder.glob(f"*-{how}.jsonl")) for key, row in _rows(file)}


def forget(out: Path, source: Source, stamp: str) -> None:
    """Remove what was said of a video as it was before."""
    for folder in FOLDERS:
        _forget(out / folder, source, stamp)


def work(
    todo: Sequence[ClipEntry], ask: Callable[[ClipEntry], Any], threads: int
) -> Iterator[tuple[ClipEntry, Any]]:
    """What `ask` gives for each clip, or its UserError, as it comes; so many clips at a time."""
    stopped = threading.Event()

    def attempt(entry: ClipEntry) -> tuple[ClipEntry, Any]:
        try:
            return entry, UserError("stopped") if stopped.is_set() else ask(entry)
        except UserError as error:
            return entry, error

    waiting = iter(todo)
    with ThreadPoolExecutor(threads) as pool:
        running: set[Future[Any]] = {pool.submit(attempt, each) for each in islice(waiting, threads)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(attempt, each) for each in islice(waiting, len(done))}
                yield from (future.result() for future in done)
        finally:
            stopped.set()


def gather(
    done: Iterable[tuple[ClipEntry, Any]], put: Callable[[ClipEntry, Any], None],
    *, model: str, of: int, ledger: Path, lack: str,
) -> tuple[Mapping[str, Any], ...]:  # fmt: skip
    """Remember what comes of `work`; the lines of a ledger of clips of which nothing came, which is written.

    Raises:
        UserError: all `of` them fail, or twenty one after another; the line says that they `lack` it.
    """
    failed: list[Mapping[str, Any]] = []
    in_a_row = 0
    try:
        for entry, given in done:
            if not isinstance(given, UserError):
                in_a_row = 0
                put(entry, given)
                continue
            failed.append(failure(entry, model, given))
            in_a_row += 1
            if in_a_row == MOST_FAILURES or len(failed) == of:
                said = f"{in_a_row} clips {lack}, the last because {given}"
                raise UserError(f"{said}; the same command goes on")
    finally:
        write_ledger(ledger, failed)
    return tuple(failed)


def sampled(entry: ClipEntry, count: int) -> list[int]:
    """The frames in the middles of `count` equal parts of a shot; all of one that has fewer."""
    span = entry.piece
    assert span is not None, "the engine lists pieces"
    count = min(count, len(span))
    return [span[len(span) * (2 * index + 1) // (2 * count)] for index in range(count)]


def pictures(path: str, wanted: Sequence[int], side: int) -> list[bytes]:
    """Frames of what lies at a path or URL as JPEG, of a longer side of at most `side` pixels.

    Raises:
        UserError: it cannot be read.
    """
    from PIL import Image

    found = []
    with local(place(path)) as file:
        for picture in video.frames_at(file, wanted, threads=1):
            data = io.BytesIO()
            Image.fromarray(shrink(picture, side)).save(data, "JPEG", quality=_QUALITY)
            found.append(data.getvalue())
    return found


def key_of(entry: ClipEntry) -> Key:
    """What tells a clip from others."""
    return entry.path, entry.first_frame or 0, entry.frames or 0


def failure(entry: ClipEntry, model: str, error: UserError) -> dict[str, Any]:
    """The line of a ledger about a clip."""
    where = {key: entry.extra.get(key) for key in ("begin", "end")}
    return {"path": entry.path, "first_frame": entry.first_frame, "frames": entry.frames, **where,
            "model": model, "reason": str(error)}  # fmt: skip


def write_ledger(path: Path, failed: Sequence[Mapping[str, Any]]) -> None:
    """Write why clips are missing."""
    rows = sorted(failed, key=lambda row: (row["path"], row["first_frame"]))
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _forget(folder: Path, source: Source, stamp: str) -> None:
    for path in folder.glob(f"{source.name}-*.jsonl"):
        if not path.name.startswith(f"{source.name}-{digest([stamp])}-"):
            path.unlink(missing_ok=True)


def _rows(path: Path) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    for row in read_json_lines(path):
        try:
            key = str(row.pop("path")), int(row.pop("first_frame")), int(row.pop("frames"))
        except (KeyError, TypeError, ValueError, AttributeError):
            continue  # it is asked for again
        yield key, row
