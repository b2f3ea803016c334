"""Make, check and describe clip lists: `kinoflow data curate | select | caption | embed | world | cut …`."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import TypeVar, get_args

from kinoflow.configs.errors import UserError, run
from kinoflow.configs.terminal import parse_rate, print_json, progress_bar
from kinoflow.data import video, world
from kinoflow.data.clips import captions, manifest
from kinoflow.data.clips.buckets import Bucket, choose, parse
from kinoflow.data.clips.cut import CutConfig, cut
from kinoflow.data.clips.manifest import ClipEntry, Problem
from kinoflow.data.engine import commands as engine

_T = TypeVar("_T")
_CRF = 10


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 when all is well, 1 when a clip is bad, 2 after a user's mistake."""

    def command() -> int:
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)

    return run(command, "kinoflow data")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kinoflow data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    make = commands.add_parser("world", help="draw captioned clips and list them in OUT/manifest.jsonl")
    make.add_argument("out", type=Path, metavar="OUT")
    make.add_argument("--clips", type=int, required=True, help="how many")
    make.add_argument("--split", choices=get_args(world.Split), default="train")
    make.add_argument("--seed", type=int, default=0, help="of the first clip; the others follow (default: 0)")
    make.add_argument(
        "--bucket",
        action="append",
        metavar="SHAPE",
        help="frames x height x width @ fps (default: 16x64x64@16); again for a mix, with ' weight=2'",
    )
    make.set_defaults(run=_world)
    pieces = commands.add_parser("cut", help="cut footage and pictures to short square clips in OUT")
    _cut_options(pieces)
    pieces.set_defaults(run=_cut)
    test = commands.add_parser("check", help="probe every clip of a list and name the bad ones")
    test.add_argument("manifest", metavar="MANIFEST", help="file or URL")
    test.add_argument("--decode", action="store_true", help="decode every frame as well (slow)")
    test.set_defaults(run=_check)
    tell = commands.add_parser("info", help="say what a list contains")
    tell.add_argument("manifest", metavar="MANIFEST", help="file or URL")
    tell.set_defaults(run=_info)
    for command in (make, pieces, test, tell):
        command.add_argument("--json", action="store_true", help="print one JSON object")
    engine.add_to(commands)
    return parser


def _cut_options(parser: argparse.ArgumentParser) -> None:
    add, defaults = parser.add_argument, CutConfig()
    add("sources", type=Path, nargs="+", metavar="CLIP_OR_PICTURE")
    add("out", type=Path, metavar="OUT")
    add(
        "--frames",
        type=int,
        help="of each clip (default: two seconds of them, which fills every bucket of configs/mini up to "
        "32 frames at 16 a second)",
    )
    add("--side", type=int, default=defaults.side, help="of each clip (default: 128 pixels)")
    add("--per-minute", type=float, default=defaults.per_minute, help="clips (default: 300)")
    add("--per-picture", type=int, default=defaults.per_picture, help="clips (default: 20)")
    add(
        "--fps",
        metavar="RATE",
        help="play the clips at this rate (default: their own); sources of a variable rate are sampled at it "
        "(default: at their average)",
    )
    add("--seed", type=int, default=defaults.seed, help="of the windows (default: 0)")
    add(
        "--captions",
        type=Path,
        metavar="FILE",
        help="JSON lines or CSV with the columns source (a file's name) and caption; a source without one "
        "takes the text of the .txt file of its name beside it",
    )


def _progress(items: Iterable[_T], title: str, total: int) -> Iterator[_T]:
    with progress_bar() as bar:
        yield from bar.track(items, total=total, description=title)


def _world(arguments: argparse.Namespace) -> int:
    """Draw the clips that aren't there yet, then list all of this command's clips."""
    if arguments.clips < 1:
        raise UserError(f"--clips: {arguments.clips} must be 1 or more")
    if arguments.seed < 0:
        raise UserError(f"--seed: {arguments.seed} is negative; use 0 or more")
    buckets = [parse(text) for text in arguments.bucket or ["16x64x64@16"]]
    seeds = range(arguments.seed, arguments.seed + arguments.clips)
    entries, drawn = [], 0
    for seed in _progress(seeds, "drawing", len(seeds)):
        entry, new = _draw(arguments.out, seed, arguments.split, choose(arguments.seed, seed, buckets))
        entries.append(entry)
        drawn += new
    listing = arguments.out / "manifest.jsonl"
    manifest.write(listing, entries)
    figures = {"manifest": str(listing), "clips": len(entries), "drawn": drawn}
    return _report(figures, arguments.json)


def _draw(out: Path, seed: int, split: world.Split, bucket: Bucket) -> tuple[ClipEntry, bool]:
    """The clip's row, and whether it had to be drawn: a file's name says all that decides its pixels."""
    scene = world.sample_scene(seed, split=split)
    fps = str(bucket.fps).replace("/", "over")
    shape = f"{bucket.frames}x{bucket.height}x{bucket.width}at{fps}"
    name = f"clips/{split}-{shape}-{seed:09d}.mp4"
    text = world.caption(scene, seed, image=bucket.frames == 1)
    new = not (out / name).exists()
    if new:
        size = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width}
        frames = world.render(scene, **size, fps=bucket.fps)
        facts = {"title": text, "comment": f"kinoflow world, {split} {seed}"}
        video.write(out / name, frames, fps=bucket.fps, crf=_CRF, metadata=facts)
    extra = {"split": split, "seed": seed} | world.labels(scene)
    entry = ClipEntry(
        path=name,
        caption=text,
        frames=bucket.frames,
        fps=bucket.fps,
        width=bucket.width,
        height=bucket.height,
        extra=extra,
    )
    return entry, new


def _cut(arguments: argparse.Namespace) -> int:
    """Cut every source; one that can't be used is listed and costs nothing else."""
    config = CutConfig(
        frames=arguments.frames, side=arguments.side, per_minute=arguments.per_minute,
        per_picture=arguments.per_picture, fps=_rate(arguments.fps), seed=arguments.seed,
    )  # fmt: skip
    table = captions.read_table(arguments.captions) if arguments.captions else {}
    stems = Counter(source.stem for source in arguments.sources)
    twice = [stem for stem, count in stems.items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]}: two sources have this name, and clips are named after it; rename one")
    if table and not table.keys() & {source.name for source in arguments.sources}:
        raise UserError(f"--captions: {arguments.captions} names none of the sources; write their file names")
    entries: list[ClipEntry] = []
    bad: list[str] = []
    for source in _progress(arguments.sources, "cutting", len(arguments.sources)):
        try:
            entries.extend(cut(source, arguments.out, config, captions.caption_of(source, table)))
        except UserError as error:
            bad.append(str(error))
            print(f"kinoflow data: {error}", file=sys.stderr)
    listing = arguments.out / "manifest.jsonl"
    if not entries:
        raise UserError(f"{listing}: no clip was cut; give longer or larger sources")
    manifest.write(listing, entries)
    without = sum(not entry.caption for entry in entries)
    figures = {"manifest": str(listing), "clips": len(entries), "without_caption": without, "bad": bad}
    _report(figures, arguments.json)
    if without and not arguments.json:
        print(
            f"{without} of {len(entries)} clips have no caption, which text to video needs: fill in "
            f'"caption" on their lines of {listing}, or give --captions or a .txt beside each source'
        )
    return 1 if bad else 0


def _rate(text: str | None) -> Fraction | None:
    try:
        return None if text is None else parse_rate(text)
    except UserError as error:
        raise UserError(f"--fps: {error}") from None


def _check(arguments: argparse.Namespace) -> int:
    listing = manifest.read(arguments.manifest)
    total = len(listing) + len(listing.bad)
    results = _progress(manifest.check(listing, decode=arguments.decode), "checking", total)
    bad = [problem for problem in results if problem is not None]
    if arguments.json:
        _report({"manifest": str(listing.path), "clips": total, "bad": [asdict(p) for p in bad]}, True)
    else:
        for problem in bad:
            print(_told(problem))
        print(f"{total - len(bad)} of {total} clips are good")
    return 1 if bad else 0


def _told(problem: Problem) -> str:
    return f"row {problem.row}  {problem.path}: {problem.reason}".replace("  :", ":")


def _info(arguments: argparse.Namespace) -> int:
    listing = manifest.read(arguments.manifest)
    entries = listing.entries
    timed = [entry for entry in entries if entry.frames is not None and entry.fps is not None]
    seconds = sum((Fraction(entry.frames or 0) / (entry.fps or 1) for entry in timed), Fraction(0))
    figures = {
        "manifest": str(arguments.manifest),
        "clips": len(entries),
        "without_caption": sum(not entry.caption for entry in entries),
        "caption_words": round(sum(len(entry.caption.split()) for entry in entries) / len(entries), 1),
        "hours": round(float(seconds) / 3600, 4),
        "shapes": _counts(_shape(entry) for entry in entries),
        "columns": sorted({key for entry in entries for key in entry.extra}),
        "bad": [asdict(problem) for problem in listing.bad],
    }
    if arguments.json:
        return _report(figures, True)
    del figures["bad"]
    _report(figures, False)
    for problem in listing.bad:
        print(_told(problem))
    return 0


def _shape(entry: ClipEntry) -> str:
    parts = [entry.frames, entry.height, entry.width, entry.fps]
    frames, height, width, fps = ("?" if part is None else str(part) for part in parts)
    return f"{frames}x{height}x{width}@{fps}"


def _counts(values: Iterable[str], most: int = 12) -> dict[str, int]:
    """The most frequent values; the others summed."""
    ranked = Counter(values).most_common()
    rest = sum(count for _, count in ranked[most:])
    return dict(ranked[:most]) | ({"others": rest} if rest else {})


def _report(figures: dict[str, object], as_json: bool) -> int:
    """One JSON object for a script, or a table for a person."""
    if as_json:
        print_json(figures)
        return 0
    for key, value in figures.items():
        if isinstance(value, dict):
            print(f"{key.replace('_', ' ')}:")
            for name, count in value.items():
                print(f"  {name:<24} {count}")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            print(f"{key.replace('_', ' '):<16} {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
