"""`kinoflow data caption`: what is seen in each kept shot, written by a model; a shot is asked about once.

In OUT/captions lies what was said (`kept`); `ledger.jsonl` there says why a shot has no caption, and
`settings.json` by which way of asking the clip list is written.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.configs.files import write_json
from kinoflow.data.clips import manifest
from kinoflow.data.clips.manifest import ClipEntry
from kinoflow.data.clips.workers import Workers
from kinoflow.data.engine import kept
from kinoflow.data.engine.captioners import Captioner
from kinoflow.data.engine.config import digest
from kinoflow.data.engine.kept import Kept, Key, key_of

FOLDER, LEDGER, SETTINGS = kept.CAPTIONS, kept.LEDGER, kept.SETTINGS
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
        text = self.said.get(key_of(entry))
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
    rows = kept.read(out / FOLDER, how)
    said = {key: str(row["caption"]) for key, row in rows.items() if "caption" in row}
    return Captions(model=model, all=every, said=said)


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
    cache = Kept(out / FOLDER, how)
    todo = [entry for entry in wanted if cache.get(entry) is None]

    def ask(entry: ClipEntry) -> dict[str, str]:
        shown = workers.call(kept.pictures, entry.path, kept.sampled(entry, asking.frames), asking.side)
        return {"caption": captioner(asking.prompt, shown)}

    failed = kept.gather(
        show(kept.work(todo, ask, asking.requests), "captioning", len(todo)), cache.put,
        model=captioner.name, of=len(wanted), ledger=out / FOLDER / LEDGER, lack="have no caption",
    )  # fmt: skip
    write_json(out / FOLDER / SETTINGS, {"how": how, "model": captioner.name, "all": asking.all})
    without = _apply(listing, out)
    return Told(asked=len(todo), cached=len(wanted) - len(todo), without=without, failed=failed)


def _apply(listing: Path, out: Path) -> int:
    """Write the captions into the list, which may have been chosen anew meanwhile; how many have none."""
    captions = read(out)
    assert captions is not None, "just written"
    entries = [captions.applied(entry) for entry in manifest.read(listing).entries]
    manifest.write(listing, entries)
    return sum(not entry.caption for entry in entries)


def _moved(camera: object, text: str) -> str:
    if not isinstance(camera, str) or not camera:
        return text
    return f"{'Still camera' if camera == 'still' else camera.capitalize()}. {text}"
