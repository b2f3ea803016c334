"""`kinoflow tae`: clips to latent files and back, with figures of what was lost."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kinoflow.configs.devices import parse_device
from kinoflow.configs.errors import UserError, run
from kinoflow.configs.terminal import argument, parse_rate, print_json, progress_bar
from kinoflow.data.latents.shards import is_latent_folder
from kinoflow.tae.codec import folders, jobs
from kinoflow.tae.codec.codec import Codec
from kinoflow.tae.codec.jobs import Comparison, Figures
from kinoflow.tae.codec.report import write_index
from kinoflow.tae.cpu.accelerate import accelerate
from kinoflow.tae.model.inflate import inflate, save_start
from kinoflow.tae.model.tae import TAE
from kinoflow.tae.tiles.memory import parse_bytes
from kinoflow.tae.tiles.plan import Mode
from kinoflow.tae.tiles.tiled import DEFAULT_MEMORY
from kinoflow.tae.training.perceptual import PerceptualDistance, installed

DEFAULT_WEIGHTS = Path(__file__).resolve().parents[1] / "sample" / "mini" / "tae"


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 when it worked, 1 when a file of a folder failed, 2 after a user's mistake."""
    return run(lambda: _command(argv), "kinoflow tae")


def _command(argv: list[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    figures = arguments.run(arguments)
    if arguments.json:
        print_json(figures)
    else:
        _show(figures)
    return 1 if figures.get("failed") else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kinoflow tae", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="encode | decode | reconstruct | info | inflate")
    model, source, clip = _model_options(), _source_options(), _clip_options()

    encode = commands.add_parser(
        "encode", parents=[model, source], help="a clip to a latent file, or a folder of clips to a folder"
    )
    encode.add_argument("input", type=Path, help=_INPUT)
    encode.add_argument(
        "output", type=Path, help="latent file, .kino (one file) or .zarr (a folder); or a folder for many"
    )
    encode.set_defaults(run=_encode)
    decode = commands.add_parser("decode", parents=[model, clip], help="latent files to mp4, with sound")
    decode.add_argument("input", type=Path, help="latent file, a folder of them, or what precompute wrote")
    decode.add_argument("output", type=Path, help="mp4 to write; or a folder for many")
    decode.add_argument("--start", type=int, default=0, help="first frame (default: 0)")
    decode.add_argument("--end", type=int, help="the frame after the last one (default: all)")
    decode.add_argument("--clip", type=_count, metavar="N", help="which one of what precompute wrote")
    decode.add_argument("--bucket", metavar="SHAPE", help="where that clip is (default: the first bucket)")
    decode.set_defaults(run=_decode)
    both = commands.add_parser(
        "reconstruct", parents=[model, clip, source], help="there and back, with figures of what was lost"
    )
    both.add_argument("input", type=Path, help=_INPUT)
    both.add_argument("output", type=Path, help="mp4 to write; or a folder for many")
    both.add_argument("--side-by-side", action="store_true", help="the original on the left")
    both.add_argument("--report", type=Path, metavar="PAGE.html", help=_REPORT)
    both.add_argument(
        "--perceptual",
        type=_count,
        metavar="N",
        help="measure the perceptual distance, which is slow, at every Nth frame; 0: nowhere "
        f"(default: at about {jobs.PERCEPTUAL_FRAMES} frames of a clip, where stlpips-pytorch is installed)",
    )
    both.set_defaults(run=_reconstruct)
    info = commands.add_parser("info", help="what a latent file, a latent folder or a clip holds")
    info.add_argument("input", type=Path, help="latent file, clip, or folder of pictures or latents")
    info.add_argument("--json", action="store_true", help=_JSON)
    info.set_defaults(run=_info)
    start = commands.add_parser("inflate", help="an image autoencoder to one that training can start from")
    start.add_argument("source", help="folder or hub id (owner/name or owner/name/vae) of an AutoencoderKL")
    start.add_argument("output", type=Path, help="folder for tae/ (init_from=) and tae.yaml, its config")
    start.add_argument("--json", action="store_true", help=_JSON)
    start.set_defaults(run=_inflate)
    return parser


def _model_options() -> argparse.ArgumentParser:
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--json", action="store_true", help=_JSON)
    model.add_argument(
        "--weights",
        default=str(DEFAULT_WEIGHTS),
        help="autoencoder folder or hub id (default: the shipped one)",
    )
    model.add_argument(
        "--device",
        type=argument(parse_device),
        default="auto",
        help="cpu, cuda, cuda:1, mps (default auto: the GPU where there is one)",
    )
    model.add_argument(
        "--spatial-tile",
        type=_pixels,
        metavar="PIXELS",
        help="cut frames into overlapping tiles of at most this side (default: what --memory allows)",
    )
    model.add_argument(
        "--tiling",
        choices=get_args(Mode),
        default="halo",
        help="tiles that overlap by the context they need (halo, the default), or that fade into each other "
        "as in the paper (blend)",
    )
    model.add_argument(
        "--memory",
        type=argument(parse_bytes),
        default=DEFAULT_MEMORY,
        metavar="SIZE",
        help="memory for the model and its tiles, 8GiB for example; the process takes up to 1 GiB more "
        "(default: 4GiB)",
    )
    return model


def _source_options() -> argparse.ArgumentParser:
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument(
        "--fps",
        type=argument(parse_rate),
        metavar="RATE",
        help="bring a clip to this constant rate, 30000/1001 for example, by repeating and dropping frames; "
        "the rate of a folder of pictures (default: the clip's own times; 24 for pictures)",
    )
    source.add_argument("--audio", action="store_true", help="keep the sound (its first track)")
    source.add_argument(
        "--partial",
        action="store_true",
        help="of a truncated or damaged clip, the frames before the damage",
    )
    return source


def _clip_options() -> argparse.ArgumentParser:
    clip = argparse.ArgumentParser(add_help=False)
    clip.add_argument("--crf", type=float, default=18, help="H.264 quality, 0 (best) to 51 (default: 18)")
    return clip


_REPORT = "write a page of curves and the worst frames; of a folder each clip's beside its output, and a list"
_JSON = "print one JSON object with every figure"
_INPUT = "any clip or picture that FFmpeg reads, a folder of pictures (one clip), or a folder of clips"


def _count(text: str) -> int:
    count = int(text)
    if count < 0:
        raise argparse.ArgumentTypeError(f"{text}: use 0 or more")
    return count


def _pixels(text: str) -> int:
    side = int(text)
    if side < 64:
        raise argparse.ArgumentTypeError(f"{side}: use 64 pixels or more")
    return side


def _codec(arguments: argparse.Namespace) -> Codec:
    tae = accelerate(TAE.from_pretrained(arguments.weights).to(arguments.device))
    name = "kinoflow mini" if Path(arguments.weights) == DEFAULT_WEIGHTS else str(arguments.weights)
    return Codec(
        tae,
        name=name,
        tiling=arguments.tiling,
        memory=arguments.memory,
        spatial_tile=arguments.spatial_tile,
    )


def _encode(arguments: argparse.Namespace) -> Figures:
    codec = _codec(arguments)
    how = {"fps": arguments.fps, "audio": arguments.audio}

    def one(item: folders.FolderItem, progress: jobs.Progress) -> Figures:
        part = arguments.partial
        return jobs.encode(codec, item.source, item.output, progress=progress, partial=part, **how)

    if not _many(arguments, {".kino", ".zarr"}):
        return _single(arguments, one)
    plan = folders.plan(arguments.input, arguments.output, latents=False, suffix=".kino")
    return _all(arguments, plan, one, lambda item: jobs.up_to_date(codec, item.source, item.output, **how))


def _decode(arguments: argparse.Namespace) -> Figures:
    codec = _codec(arguments)

    def one(item: folders.FolderItem, progress: jobs.Progress) -> Figures:
        part = {"start": arguments.start, "end": arguments.end, "crf": arguments.crf}
        if arguments.clip is not None:
            chosen = {"clip": arguments.clip, "bucket": arguments.bucket}
            return jobs.decode_clip(codec, item.source, item.output, **chosen, **part, progress=progress)
        return jobs.decode(codec, item.source, item.output, progress=progress, **part)

    if is_latent_folder(arguments.input):
        if arguments.clip is None:
            raise UserError(f"{arguments.input}: holds many clips; choose one with --clip N")
        return _single(arguments, one)
    if arguments.clip is not None or arguments.bucket is not None:
        raise UserError(f"{arguments.input}: not what precompute wrote; leave out --clip and --bucket")
    if not _many(arguments, _MP4):
        return _single(arguments, one)
    plan = folders.plan(arguments.input, arguments.output, latents=True, suffix=".mp4")
    return _all(arguments, plan, one)


def _reconstruct(arguments: argparse.Namespace) -> Figures:
    many = _many(arguments, _MP4)
    codec = _codec(arguments)
    distance, why = _perceptual(arguments)
    comparison = Comparison(
        distance=distance,
        without=why,
        every=arguments.perceptual or None,
        report=arguments.report,
        side_by_side=arguments.side_by_side,
    )

    def one(item: folders.FolderItem, progress: jobs.Progress) -> Figures:
        how = {"fps": arguments.fps, "audio": arguments.audio, "partial": arguments.partial}
        asked = comparison
        if many and arguments.report is not None:  # a page for each clip, and one that leads to them
            asked = replace(comparison, report=item.output.with_name(f"{item.output.name}.html"))
        crf = arguments.crf
        return jobs.reconstruct(codec, item.source, item.output, asked, crf=crf, progress=progress, **how)

    if not many:
        return _single(arguments, one)
    plan = folders.plan(arguments.input, arguments.output, latents=False, suffix=".mp4")
    figures = _all(arguments, plan, one)
    if arguments.report is not None:
        write_index(arguments.report, figures)
        figures["report"] = str(arguments.report)
    return figures


def _info(arguments: argparse.Namespace) -> Figures:
    return jobs.describe(arguments.input)


def _inflate(arguments: argparse.Namespace) -> Figures:
    model = inflate(arguments.source)
    save_start(model, arguments.output)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"source": arguments.source, "output": str(arguments.output), "parameters": parameters}


def _perceptual(arguments: argparse.Namespace) -> tuple[PerceptualDistance | None, str | None]:
    if arguments.perceptual == 0:
        return None, "not measured: --perceptual 0"
    if not installed():
        if arguments.perceptual is not None:
            remedy = "pip install --no-deps stlpips-pytorch, or leave --perceptual out"
            raise UserError(f"--perceptual: its weights are not installed; {remedy}")
        return None, "not measured: pip install --no-deps stlpips-pytorch brings its weights"
    return PerceptualDistance.from_file("stlpips").to(arguments.device), None


_MP4 = {".mp4", ".m4v", ".mov"}


def _many(arguments: argparse.Namespace, files: set[str]) -> bool:
    """A folder goes to a folder; only an output with the ending of one file makes it one clip."""
    source = arguments.input
    return source.is_dir() and source.suffix != ".zarr" and arguments.output.suffix.lower() not in files


One = Callable[[folders.FolderItem, jobs.Progress], Figures]


def _single(arguments: argparse.Namespace, one: One) -> Figures:
    item = folders.FolderItem(source=arguments.input, output=arguments.output)
    with progress_bar(quiet=arguments.json) as bar:
        task = bar.add_task(escape(arguments.input.name), total=None)
        return one(item, lambda done, total: bar.update(task, completed=done, total=total))


def _all(
    arguments: argparse.Namespace,
    plan: folders.FolderPlan,
    one: One,
    done: Callable[[folders.FolderItem], bool] = lambda _: False,
) -> Figures:
    with progress_bar(quiet=arguments.json) as bar:
        clips = bar.add_task("clips", total=len(plan.items))
        frames = bar.add_task("", total=None)

        def begin(number: int, item: folders.FolderItem) -> None:
            bar.update(clips, completed=number)
            bar.reset(frames, description=escape(item.source.name), total=None)

        return folders.run(
            plan,
            lambda item: one(item, lambda at, total: bar.update(frames, completed=at, total=total)),
            done=done,
            progress=begin,
        )


def _show(figures: Figures) -> None:
    """A table for a person, then what failed, then where the output is."""
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")  # a path is shown whole
    for key, value in figures.items():
        if isinstance(value, tuple | list) or value is None:
            continue
        if isinstance(value, dict):
            shown = escape("\n".join(f"{name}: {each}" for name, each in value.items()))
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else escape(str(value))
        table.add_row(key.replace("_", " "), shown)
    Console().print(table)
    for problem in figures.get("failed", ()):
        print(f"failed: {problem['error']}")
    if figures.get("ignored"):
        more = figures["ignored_files"] - len(figures["ignored"])
        print(f"ignored: {', '.join(figures['ignored'])}{f' and {more} more' if more else ''}")
    for key in ("report", "output"):
        if key in figures:
            print(figures[key])


if __name__ == "__main__":
    sys.exit(main())
