"""Spoil small clips and latent files, one seed for each file, and send them through `kinoflow tae`.

`python -m tests.tae.mutating FOLDER FIRST LAST` spoils files FIRST..LAST-1 from the sources in FOLDER and
prints one JSON list; it ends with a traceback and status 1 where one file takes more than two minutes.
"""

import faulthandler
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from kinoflow.data import video
from kinoflow.data.latents.kino import read_info
from kinoflow.tae import TAE, TAEConfig
from kinoflow.tae import __main__ as command
from kinoflow.tae.codec.codec import Codec

SECONDS = 120
TINY = TAEConfig(
    patch_size=(8, 8, 8),
    channels=4,
    multipliers=(1,),
    strides=(),
    encoder_blocks=(1,),
    decoder_blocks=(1,),
    latent_channels=2,
    norm="rms",
    attention=False,
)


def tiny_codec() -> Codec:
    torch.manual_seed(0)
    tae = TAE(TINY)
    tae.init_weights()
    return Codec(tae.eval(), name="tiny")


def make_sources(folder: Path) -> None:
    """A clip with sound, one with a variable rate, pictures, and latent files of them."""
    noise = np.random.default_rng(0).integers(0, 256, (11, 4, 4, 3), np.uint8)
    frames = noise.repeat(8, axis=1).repeat(6, axis=2)
    stamps = np.cumsum([0, *([40, 40, 120, 33] * 3)]).tolist()
    clip(folder / "sound.mp4", frames, "libx264", sound="aac")
    clip(folder / "variable.mkv", frames, "mpeg4", sound="flac", stamps=stamps)
    clip(folder / "plain.mkv", frames, "libx264")
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(folder / "still.png")
    pictures[0].save(folder / "moving.gif", save_all=True, append_images=pictures[1:], duration=40)
    codec = tiny_codec()
    for name in ("sound.mp4", "variable.mkv"):
        codec.encode(folder / name, folder / f"{name}.kino", audio=True)


def clip(
    path: Path, frames: np.ndarray, codec: str, *, sound: str | None = None, stamps: list[int] | None = None
) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, width=frames.shape[2], height=frames.shape[1])
        stream.pix_fmt, stream.codec_context.gop_size = "yuv420p", 4
        stream.codec_context.time_base = Fraction(1, 1000)
        track = container.add_stream(sound, rate=16000, layout="mono") if sound else None
        for index, shown in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
            frame.pts, frame.time_base = stamps[index] if stamps else 40 * index, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if track is not None:
            wave = np.sin(np.arange(8000) / 5).astype(np.float32)[None]
            heard = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            heard.sample_rate, heard.pts = 16000, 0
            for part in av.AudioResampler(format=track.format.name, layout="mono", rate=16000).resample(
                heard
            ):
                container.mux(track.encode(part))
            container.mux(track.encode(None))


def spoil(data: bytes, random: np.random.Generator, other: bytes) -> bytes:
    """Flip bits, cut, overwrite, remove or repeat a piece, or put another kind's header in front."""
    spoiled = bytearray(data)
    at, length = int(random.integers(len(data))), int(random.integers(1, 65))
    head = int(random.integers(min(256, len(data))))
    match int(random.integers(8)):
        case 0 | 1:
            for place in random.integers(len(data), size=length // 4 + 1):
                spoiled[place] ^= 1 << int(random.integers(8))
        case 2:
            del spoiled[at:]
        case 3:
            spoiled[at : at + length] = random.bytes(len(spoiled[at : at + length]))
        case 4:
            spoiled[head : head + length] = random.bytes(length)
        case 5:
            spoiled[: head + 1] = other[: head + 1]
        case 6:
            del spoiled[at : at + length]
        case 7:
            spoiled[at:at] = spoiled[at : at + length] * int(random.integers(1, 4))
    return bytes(spoiled)


def arguments(path: Path, out: Path, index: int) -> tuple[list[str], Path]:
    """A command that reads the file, and what it writes."""
    if path.suffix == ".kino":
        return ["decode", str(path), str(out / "out.mp4")], out / "out.mp4"
    if index % 2:
        page = ["--report", str(out / "page.html")] if index % 5 == 0 else []
        words = ["reconstruct", str(path), str(out / "out.mp4"), "--audio", "--perceptual", "0", *page]
        return words, out / "out.mp4"
    return ["encode", str(path), str(out / "out.kino"), "--audio"], out / "out.kino"


@cache
def decoded(latents: Path) -> bytes:
    """What an unspoiled latent file gives: checksums must not let anything else pass."""
    clean = latents.with_name("clean.mp4")
    with redirect_stdout(io.StringIO()):
        assert command.main(["decode", str(latents), str(clean), "--json"]) == 0
    content = clean.read_bytes()
    clean.unlink()
    return content


def attack(sources: list[Path], work: Path, index: int) -> dict[str, object]:
    """Spoil one file and read it; says what happened and what is wrong with that, if anything."""
    random = np.random.default_rng([20241117, index])
    source = sources[index % len(sources)]
    path = work / f"bad{source.suffix}"
    path.write_bytes(
        spoil(source.read_bytes(), random, sources[(index // 7 + 1) % len(sources)].read_bytes())
    )
    words, output = arguments(path, work, index)
    said, figures = io.StringIO(), io.StringIO()
    with redirect_stderr(said), redirect_stdout(figures):
        status = command.main(
            [*words, "--json", *(["--perceptual", "0"] if words[0] == "reconstruct" else [])]
        )
    left = sorted(file for file in work.iterdir() if file != path)
    problems = []
    if status == 0:
        promised = json.loads(figures.getvalue())["frames"]
        found = read_info(output).frames if output.suffix == ".kino" else len(video.read(output))
        if found != promised:
            problems.append(f"{output.name} holds {found} frames, not {promised}")
        if path.suffix == ".kino" and output.read_bytes() != decoded(source):
            problems.append("decodes to something else")
        if any(file.name not in {"out.mp4", "out.kino", "page.html"} for file in left):
            problems.append(f"left behind: {left}")
    else:
        line = said.getvalue()
        if status != 2 or line.count("\n") != 1 or path.name not in line:
            problems.append(f"status {status}, said {line!r}")
        if left:
            problems.append(f"left behind: {left}")
    for file in [path, *left]:
        file.unlink()
    return {"index": index, "source": source.name, "status": status, "problems": problems}


def main(folder: Path, first: int, last: int) -> None:
    sources = sorted(file for file in folder.iterdir() if file.is_file())
    work = folder / f"work{first}"
    work.mkdir()
    codec = tiny_codec()
    command._codec = lambda _: codec
    outcomes = []
    for index in range(first, last):
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        print(f"file {index}", file=sys.stderr, flush=True)
        outcomes.append(attack(sources, work, index))
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
