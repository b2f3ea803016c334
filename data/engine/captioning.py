"""`kinoflow data caption`: what is seen in each kept shot, written by a model; a shot is asked about once.

In OUT/captions there is a file of JSON lines for each video and each way of asking (model, prompt, pictures),
named by the video's path, size and time of change too; it is replaced whole with each shot. `ledger.jsonl`
there says why a shot has none, `settings.json` by which way of asking the clip list is written.
"""

import io
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.configs.files import read_json_lines, write_json, write_text
from kinoflow.data import video
from kinoflow.data.clips import manifest
from kinoflow.data.clips.manifest import ClipEntry
from kinoflow.data.clips.remote import local, place
from kinoflow.data.clips.workers import Workers
from kinoflow.data.engine.captioners import Captioner
from kinoflow.data.engine.config import digest
from kinoflow.data.engine.sources import Source
from kinoflow.data.video.picture import shrink

FOLDER, LEDGER, SETTINGS = "captions", "ledger.jsonl", "settings.json"
BY = "captioned_by"  # the column of the clip list that names the model
PROMPT = """\
These pictures are frames of one video shot, in the order of time and evenly spaced. Describe the shot in \
one paragraph of about 100 words, as a caption that a text-to-video model is trained on.
- Say in this order: the subject and its looks, what it does and how fast, what else is there, the \
background, the light and the style.
- Say what is seen, in plain words. Do not guess at names, feelings, sounds or what happens before and after.
- Copy words that can be read in the picture letter by letter, in double quotes. Quote nothing else.
- Do not speak of frames, pictures, the video or the camera's movement. Answer with the caption alone."""
_FORMAT = 1
_QUALITY = 90  # of JPEG
_MOST_FAILURES = 20  # one after another, after which something is wrong with all of them
Key = tuple[str, int, int]  # path, first frame, frames
Shown = Callable[[Iterable[Any], str, int], Iterable[Any]]


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How captions are asked for: `frames` pictures of a longer side of `side` pixels, and the prompt.

    With `all`, clips whose caption somebody wrote are described too. `requests` are made at a time.
    """

    prompt: str = PROMPT
    frames: int = 8
    side: int = 512
    all: bool = False
    requests: int = 8

    def __post_init__(self) -> None:
        for key, most in (("frames", 256), ("side", 4096), ("requests", 1024)):
            if not 1 <= getattr(self, key) <= most:
                raise UserError(f"--{key}: {getattr(self, key)}; use 1 to {most}")
        if not self.prompt.strip():
            raise UserError("--prompt: is empty; say what to write")

    def digest(self, model: str) -> str:
        """A name for all that an answer depends on but the shot."""
        return digest([_FORMAT, model, self.prompt, self.frames, self.side])


@dataclass(frozen=True, kw_only=True)
class Captions:
    """What the models said, and whose: `said` by shot, without the camera's motion."""

    model: str
    all: bool
    said: Mapping[Key, str]

    def applied(self, entry: ClipEntry) -> ClipEntry:
        """The clip with its caption, behind what the camera does, as Movie Gen's captions have it (3.2.1).

        One that somebody wrote stays as it is, unless all were asked for.
        """
        written = bool(entry.caption) and BY not in entry.extra
        if written and not self.all:
            return entry
        extra = {key: value for key, value in entry.extra.items() if key != BY}
        text = self.said.get(_key(entry))
        if text is None:
            return replace(entry, caption=entry.caption if written else "", extra=extra)
        return replace(entry, caption=_moved(entry.extra.get("camera"), text), extra=extra | {BY: self.model})


@dataclass(frozen=True, kw_only=True)
class Told:
    """How many clips were `asked` about now, how many were `cached`, how many have none, and which failed."""

    asked: int
    cached: int
    without: int
    failed: tuple[Mapping[str, Any], ...]


def read(out: Path) -> Captions | None:
    """The captions of the last `kinoflow data caption OUT`; None without one.

    Raises:
        UserError: the settings cannot be read.
    """
    path = out / FOLDER / SETTINGS
    if not path.exists():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        how, model, every = str(told["how"]), str(told["model"]), bool(told["all"])
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is damaged; run kinoflow data caption {out} again") from None
    said: dict[Key, str] = {}
    for file in sorted(path.parent.glob(f"*-{how}.jsonl")):
        said |= _rows(file)
    return Captions(model=model, all=every, said=said)


def forget(out: Path, source: Source, stamp: str) -> None:
    """Remove what was said of a video as it was before."""
    for path in (out / FOLDER).glob(f"{source.name}-*.jsonl"):
        if not path.name.startswith(f"{source.name}-{digest([stamp])}-"):
            path.unlink(missing_ok=True)


def caption(listing: Path, captioner: Captioner, asking: Asking, *, workers: Workers, show: Shown) -> Told:
    """Ask about each clip of a list that nobody described, and write its captions into the list.

    Raises:
        UserError: the list cannot be read or written; all clips fail, or twenty one after another: what was
            said before stays, and the same command goes on.
    """
    out = listing.parent
    found = manifest.read(listing)
    how = asking.digest(captioner.key)
    wanted = [entry for entry in found.entries if asking.all or not entry.caption or BY in entry.extra]
    cache = _Cache(out / FOLDER, how)
    todo = [entry for entry in wanted if cache.get(entry) is None]
    failed: list[Mapping[str, Any]] = []
    in_a_row = 0
    try:
        work = _work(todo, captioner, asking, workers)
        for entry, given in show(work, "captioning", len(todo)):
            if isinstance(given, UserError):
                failed.append(_failure(entry, captioner.name, given))
                in_a_row += 1
                if in_a_row == _MOST_FAILURES or len(failed) == len(wanted):
                    raise UserError(f"{in_a_row} clips have no caption, the last because {given}; the same "
                                    "command goes on")  # fmt: skip
                continue
            in_a_row = 0
            cache.put(entry, given)
    finally:
        lines = (json.dumps(each, ensure_ascii=False) + "\n" for each in sorted(failed, key=_order))
        write_text(out / FOLDER / LEDGER, "".join(lines))
    write_json(out / FOLDER / SETTINGS, {"how": how, "model": captioner.name, "all": asking.all})
    without = _apply(listing, out)
    return Told(asked=len(todo), cached=len(wanted) - len(todo), without=without, failed=tuple(failed))


def _apply(listing: Path, out: Path) -> int:
    """Write the captions into the list, which may have been chosen anew meanwhile; how many have none."""
    captions = read(out)
    assert captions is not None, "just written"
    entries = [captions.applied(entry) for entry in manifest.read(listing).entries]
    manifest.write(listing, entries)
    return sum(not entry.caption for entry in entries)


def sampled(frames: range, count: int) -> list[int]:
    """The middles of `count` equal parts of a shot; all frames of one that has fewer."""
    count = min(count, len(frames))
    return [frames[len(frames) * (2 * index + 1) // (2 * count)] for index in range(count)]


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


class _Cache:
    """What was said in one way of asking, by video; from one thread."""

    def __init__(self, folder: Path, how: str) -> None:
        self._folder, self._how = folder, how
        self._known: dict[str, dict[Key, str]] = {}
        self._paths: dict[str, Path] = {}

    def get(self, entry: ClipEntry) -> str | None:
        return self._video(entry.path).get(_key(entry))

    def put(self, entry: ClipEntry, text: str) -> None:
        known = self._video(entry.path)
        known[_key(entry)] = text
        rows = [
            {"path": path, "first_frame": first, "frames": frames, "caption": said}
            for (path, first, frames), said in sorted(known.items())
        ]
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(self._paths[entry.path], "".join(lines))

    def _video(self, path: str) -> dict[Key, str]:
        if path not in self._known:
            source = Source(path=path)
            stamp = source.stamp()
            forget(self._folder.parent, source, stamp)
            self._paths[path] = self._folder / f"{source.name}-{digest([stamp])}-{self._how}.jsonl"
            self._known[path] = _rows(self._paths[path])
        return self._known[path]


def _work(
    todo: Sequence[ClipEntry], captioner: Captioner, asking: Asking, workers: Workers
) -> Iterator[tuple[ClipEntry, str | UserError]]:
    """What is said of each clip, in the order in which it comes; pictures are made while others are asked."""
    stopped = threading.Event()

    def ask(entry: ClipEntry) -> tuple[ClipEntry, str | UserError]:
        span = entry.piece
        assert span is not None, "the engine lists pieces"
        try:
            if stopped.is_set():
                raise UserError("stopped")
            shown = workers.call(pictures, entry.path, sampled(span, asking.frames), asking.side)
            return entry, captioner(asking.prompt, shown)
        except UserError as error:
            return entry, error

    waiting = iter(todo)
    with ThreadPoolExecutor(asking.requests) as threads:
        running: set[Future[Any]] = {threads.submit(ask, each) for each in islice(waiting, asking.requests)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {threads.submit(ask, each) for each in islice(waiting, len(done))}
                yield from (future.result() for future in done)
        finally:
            stopped.set()


def _rows(path: Path) -> dict[Key, str]:
    found: dict[Key, str] = {}
    for row in read_json_lines(path):
        try:
            found[row["path"], int(row["first_frame"]), int(row["frames"])] = str(row["caption"])
        except (KeyError, TypeError, ValueError):
            continue  # it is asked for again
    return found


def _key(entry: ClipEntry) -> Key:
    return entry.path, entry.first_frame or 0, entry.frames or 0


def _moved(camera: object, text: str) -> str:
    if not isinstance(camera, str) or not camera:
        return text
    return f"{'Still camera' if camera == 'still' else camera.capitalize()}. {text}"


def _failure(entry: ClipEntry, model: str, error: UserError) -> dict[str, Any]:
    where = {key: entry.extra.get(key) for key in ("begin", "end")}
    return {"path": entry.path, "first_frame": entry.first_frame, "frames": entry.frames, **where,
            "model": model, "reason": str(error)}  # fmt: skip


def _order(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["path"], row["first_frame"]
