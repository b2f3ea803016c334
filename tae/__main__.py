"""`kinoflow tae`: clips to latent files and back, with figures of what was lost."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from configs.pretrained import PretrainedError
from data import video
from data.video import VideoError, VideoInfo
from tae.codec import Codec, LatentFileError, LatentInfo, read_info
from tae.inflate import inflate, save_start
from tae.metrics import QualityMeter
from tae.model import TAE

DEFAULT_WEIGHTS = Path(__file__).resolve().parents[1] / "sample" / "mini" / "tae"

Figures = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 when it worked, 2 for a fault of the input, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        figures = arguments.run(arguments)
    except (VideoError, LatentFileError, PretrainedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    if arguments.json:
        print(json.dumps(figures))
    else:
        _show(figures)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kinoflow tae", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="encode | decode | reconstruct | info | inflate")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print one JSON object with every figure")
    model = argparse.ArgumentParser(add_help=False, parents=[shared])
    model.add_argument(
        "--weights",
        default=str(DEFAULT_WEIGHTS),
        help="autoencoder folder or hub id (default: the shipped one)",
    )
    model.add_argument("--device", type=_device, default="cpu", help="cpu (default) or cuda")
    model.add_argument(
        "--spatial-tile",
        type=_pixels,
        default=1024,
        metavar="PIXELS",
        help="frames larger than this are cut into overlapping tiles of this side (default: 1024)",
    )
    clip = argparse.ArgumentParser(add_help=False)
    clip.add_argument("--crf", type=float, default=18, help="H.264 quality, 0 (best) to 51 (default: 18)")

    encode = commands.add_parser("encode", parents=[model], help="a clip to a latent file")
    encode.add_argument("input", help="any clip or picture that FFmpeg reads")
    encode.add_argument("output", help="latent file: .kino (one file) or .zarr (a folder)")
    encode.set_defaults(run=_encode)
    decode = commands.add_parser("decode", parents=[model, clip], help="a latent file to an mp4")
    decode.add_argument("input", help="latent file")
    decode.add_argument("output", help="mp4 to write")
    decode.add_argument("--start", type=int, default=0, help="first frame (default: 0)")
    decode.add_argument("--end", type=int, help="the frame after the last one (default: all)")
    decode.set_defaults(run=_decode)
    both = commands.add_parser(
        "reconstruct", parents=[model, clip], help="there and back, with PSNR and SSIM"
    )
    both.add_argument("input", help="any clip or picture that FFmpeg reads")
    both.add_argument("output", help="mp4 to write")
    both.add_argument("--side-by-side", action="store_true", help="the original on the left")
    both.set_defaults(run=_reconstruct)
    info = commands.add_parser("info", parents=[shared], help="what a latent file holds")
    info.add_argument("input", help="latent file")
    info.set_defaults(run=_info)
    _inflate_parser(commands.add_parser("inflate", parents=[shared], help="start from an image model"))
    return parser


def _inflate_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder or hub id (owner/name or owner/name/vae) of an AutoencoderKL")
    parser.add_argument("output", help="folder to write: tae/, for init_from=, and tae.yaml, its config")
    parser.set_defaults(run=_inflate)


def _pixels(text: str) -> int:
    side = int(text)
    if side < 64:
        raise argparse.ArgumentTypeError(f"{side}: use 64 pixels or more")
    return side


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text}: torch has no such device here; use cpu") from error
    return device


def _codec(arguments: argparse.Namespace) -> Codec:
    tae = TAE.from_pretrained(arguments.weights).to(arguments.device)
    name = "kinoflow mini" if Path(arguments.weights) == DEFAULT_WEIGHTS else str(arguments.weights)
    return Codec(tae, name=name, spatial_tile=arguments.spatial_tile)


def _encode(arguments: argparse.Namespace) -> Figures:
    codec, clip = _codec(arguments), video.probe(arguments.input)
    began = time.perf_counter()
    with _progress("encode", clip.frames, arguments) as advance:
        codec.encode(arguments.input, arguments.output, progress=advance)
    return _figures(arguments, clip, clip.frames, began, codec)


def _decode(arguments: argparse.Namespace) -> Figures:
    codec, info = _codec(arguments), read_info(arguments.input)
    total = (info.frames if arguments.end is None else arguments.end) - arguments.start
    pieces = codec.decode(arguments.input, start=arguments.start, end=arguments.end)
    began, done = time.perf_counter(), 0
    with (
        _writer(arguments, info, info.source, codec) as writer,
        _progress("decode", total, arguments) as advance,
    ):
        for piece in pieces:
            writer.write(piece)
            done += len(piece)
            advance(done)
    return _figures(arguments, info, done, began, codec) | {"start": arguments.start}


def _reconstruct(arguments: argparse.Namespace) -> Figures:
    codec, clip = _codec(arguments), video.probe(arguments.input)
    meter, panels = QualityMeter(codec.tile_frames), 2 if arguments.side_by_side else 1
    began, done = time.perf_counter(), 0
    with (
        _writer(arguments, clip, clip.path.name, codec, panels) as writer,
        _progress("reconstruct", clip.frames, arguments) as advance,
    ):
        for pair in codec.reconstruct(arguments.input):
            shown = (pair.source, pair.decoded) if arguments.side_by_side else (pair.decoded,)
            writer.write(np.concatenate(shown, axis=2))
            meter.update(pair.decoded, pair.source)
            done += len(pair.source)
            advance(done)
    return _figures(arguments, clip, done, began, codec) | asdict(meter.result())


def _info(arguments: argparse.Namespace) -> Figures:
    info, path = read_info(arguments.input), Path(arguments.input)
    size = {"bytes": _bytes(path), "ratio": _raw_bytes(info, info.frames) / _bytes(path)}
    return {"input": arguments.input, **asdict(info), "fps": str(info.fps), **size}


def _inflate(arguments: argparse.Namespace) -> Figures:
    model, folder = inflate(arguments.source), Path(arguments.output)
    save_start(model, folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"source": arguments.source, "output": arguments.output, "parameters": parameters}


def _writer(
    arguments: argparse.Namespace, clip: VideoInfo | LatentInfo, title: str, codec: Codec, panels: int = 1
) -> video.VideoWriter:
    return video.VideoWriter(
        arguments.output,
        fps=clip.fps,
        width=clip.width * panels,
        height=clip.height,
        crf=arguments.crf,
        metadata={"title": title, "comment": "through the kinoflow tae", "kinoflow_tae_sha256": codec.sha256},
    )


def _figures(
    arguments: argparse.Namespace, clip: VideoInfo | LatentInfo, frames: int, began: float, codec: Codec
) -> Figures:
    """What every command reports; `ratio` is raw RGB bytes over the bytes of the latents in float16."""
    seconds = time.perf_counter() - began
    output = Path(arguments.output)
    raw, latent = _raw_bytes(clip, frames), codec.latent_bytes(frames, clip.height, clip.width)
    return {
        "input": arguments.input,
        "output": arguments.output,
        "frames": frames,
        "width": clip.width,
        "height": clip.height,
        "fps": str(clip.fps),
        "seconds": seconds,
        "frames_per_second": frames / seconds,
        "bytes": _bytes(output),
        "latent_bytes": latent,
        "ratio": raw / latent,
        "tae": codec.name,
        "tae_sha256": codec.sha256,
    }


def _raw_bytes(clip: VideoInfo | LatentInfo, frames: int) -> int:
    return frames * clip.height * clip.width * 3


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


@contextmanager
def _progress(task: str, total: int, arguments: argparse.Namespace) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    hidden = arguments.json or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        identity = bar.add_task(task, total=total)
        yield lambda done: bar.update(identity, completed=done)


def _show(figures: Figures) -> None:
    table = Table(show_header=False, box=None)
    for key, value in figures.items():
        if isinstance(value, tuple):
            continue
        table.add_row(key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
    if "output" in figures:
        print(figures["output"])


if __name__ == "__main__":
    sys.exit(main())
