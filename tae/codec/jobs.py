"""One clip at a time: encode, decode, reconstruct, describe, and the figures that each reports."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from kinoflow.configs.errors import UserError
from kinoflow.data import video
from kinoflow.data.latents import contents, shards
from kinoflow.data.latents.kino import LatentInfo, read_info, read_presentation, read_sound
from kinoflow.data.video.audio import Sound, sound
from kinoflow.data.video.footage import PICTURE_RATE, Footage, footage, stamp
from kinoflow.data.video.info import VideoInfo
from kinoflow.data.video.timeline import Presentation
from kinoflow.tae.codec.codec import Codec
from kinoflow.tae.codec.metrics import Distance, QualityMeter
from kinoflow.tae.codec.report import WorstFrames, write_report
from kinoflow.tae.codec.temporary import blamed_on_temporary_folder, sound_file
from kinoflow.tae.training.perceptual import MIN_SIDE

Figures = dict[str, Any]
Progress = Callable[[int, int], None]

PERCEPTUAL_FRAMES = 16  # measured in a clip unless something else is asked for


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How `reconstruct` shows what was lost.

    `distance` is the perceptual one, or None with `without` saying why; it is measured at every `every`-th
    frame, None for about 16 of the clip. `report` is an HTML page to write.
    """

    distance: Distance | None = None
    without: str | None = None
    every: int | None = None
    report: Path | None = None
    side_by_side: bool = False


def encode(
    codec: Codec,
    source: Path,
    output: Path,
    *,
    fps: Fraction | None,
    audio: bool,
    progress: Progress,
    partial: bool = False,
) -> Figures:
    """A clip to a latent file; with `partial`, of a damaged one the frames before the damage."""
    clip, began = footage(source, fps, partial=partial), time.perf_counter()
    info = codec.encode(clip, output, lambda done: progress(done, clip.info.frames), audio=audio)
    figures = _figures(codec, source, output, clip.info, frames=clip.info.frames, began=began)
    return figures | _timing(clip) | {"sound": info.sound}


def up_to_date(codec: Codec, source: Path, output: Path, *, fps: Fraction | None, audio: bool) -> bool:
    """Whether `encode` would write what is there: same source, autoencoder, rate and sound."""
    try:
        info = read_info(output)
    except UserError:
        return False
    wanted = fps or (PICTURE_RATE if source.is_dir() else None)
    same_rate = not info.resampled if wanted is None else info.fps == wanted and not info.variable_frame_rate
    same_source = (info.source_bytes, info.source_modified_ns) == stamp(source) and info.source == source.name
    if not (same_rate and same_source and info.tae_sha256 == codec.sha256):
        return False
    return info.sound is not None or not audio or source.is_dir() or not video.probe(source).audio


def decode(
    codec: Codec,
    source: Path,
    output: Path,
    *,
    start: int,
    end: int | None,
    crf: int | float,
    progress: Progress,
) -> Figures:
    """Frames start..end-1 of a latent file to an mp4, with their times and the sound that the file holds."""
    info = read_info(source)
    end = info.end_of(source, start, end)
    times, began, done = read_presentation(source), time.perf_counter(), 0
    clock = times or Presentation.constant(info.frames, info.fps)
    with _stored_sound(source, info, clock.time_of(start), clock.time_of(end)) as heard:
        cut = None if times is None else times.cut(start, end)
        with _writer(output, info, info.source, codec, crf, presentation=cut, sound=heard) as writer:
            for piece in codec.decode(source, start=start, end=end):
                writer.write(piece)
                done += len(piece)
                progress(done, end - start)
        spoken = None if heard is None else str(heard)
    timing = {"variable_frame_rate": times is not None, "frame_times": _KEPT if times else _CONSTANT}
    figures = _figures(codec, source, output, info, frames=done, began=began)
    stored = _stored_size(info.width, info.height)
    return figures | timing | {"sound": spoken, "start": start, "stored_size": stored}


def decode_clip(
    codec: Codec, folder: Path, output: Path, *, clip: int, bucket: str | None, **how: Any
) -> Figures:
    """One clip of a latent folder to an mp4: what training sees; `how` is `decode`'s."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / f"{folder.resolve().name}-{clip}.kino"
        contents.export(folder, file, clip, bucket)
        return decode(codec, file, output, **how) | {"input": str(folder), "clip": clip}


def reconstruct(
    codec: Codec,
    source: Path,
    output: Path,
    comparison: Comparison,
    *,
    fps: Fraction | None,
    audio: bool,
    crf: int | float,
    progress: Progress,
    partial: bool = False,
) -> Figures:
    """There and back, with figures of what was lost and, on request, a page that shows it."""
    clip, began, done = footage(source, fps, partial=partial), time.perf_counter(), 0
    distance, why = _distance(comparison, clip.info)
    every = comparison.every or max(1, round(clip.info.frames / PERCEPTUAL_FRAMES))
    tile_frames = codec.tile_frames(clip.info.height, clip.info.width)
    meter = QualityMeter(tile_frames, perceptual=distance, every=every)
    worst = WorstFrames(max(1, round(clip.info.fps)))  # one of each second
    panels = 2 if comparison.side_by_side else 1
    with _own_sound(clip, audio) as heard:
        options = {"presentation": clip.presentation, "sound": heard, "panels": panels}
        with _writer(output, clip.info, source.name, codec, crf, **options) as writer:
            for pair in codec.reconstruct(clip):
                shown = (pair.source, pair.decoded) if comparison.side_by_side else (pair.decoded,)
                writer.write(np.concatenate(shown, axis=2))
                worst.update(pair.source, pair.decoded, meter.update(pair.decoded, pair.source))
                done += len(pair.source)
                progress(done, clip.info.frames)
        spoken = None if heard is None else str(heard)
    quality = meter.result()
    figures = _figures(codec, source, output, clip.info, frames=done, began=began)
    stored = _stored_size(clip.info.width * panels, clip.info.height)
    figures |= {"stored_size": stored}
    figures |= _timing(clip) | {"sound": spoken, **asdict(quality), "perceptual_note": why}
    if comparison.report is not None:
        times = clip.presentation or Presentation.constant(done, clip.info.fps)
        seconds = [float(times.time_of(index)) for index in range(done)]
        write_report(
            comparison.report,
            figures,
            quality,
            seconds=seconds,
            worst=worst.frames(),
            tile_frames=tile_frames,
        )
        figures["report"] = str(comparison.report)
    return figures


def describe(path: Path) -> Figures:
    """What a latent file, a latent folder, a clip or a folder of pictures holds."""
    if shards.is_latent_folder(path):
        return {"input": str(path), **contents.describe(path), "bytes": size_of(path)}
    if path.suffix in {".kino", ".zarr"} or (path / "zarr.json").is_file():
        info = read_info(path)
        size = {"bytes": size_of(path), "ratio": _raw_bytes(info, info.frames) / size_of(path)}
        return {"input": str(path), **_plain(asdict(info)), **size}
    clip = footage(path)
    timing = _timing(clip)
    if clip.presentation is not None:
        steps = np.diff(clip.presentation.ticks) * float(clip.presentation.time_base)
        timing |= {"shortest_frame": float(steps.min()), "longest_frame": float(steps.max())}
    return {"input": str(path), **_plain(asdict(clip.info)), **timing, "bytes": stamp(path)[0]}


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


_CONSTANT, _KEPT = "constant", "variable, kept exactly; fps is the average"


def _timing(clip: Footage) -> Figures:
    said = _CONSTANT if clip.presentation is None else _KEPT
    if clip.repeats is not None:
        more = int(np.maximum(clip.repeats - 1, 0).sum())
        said = f"resampled to constant, {more} repeated, {int((clip.repeats == 0).sum())} dropped"
    return {"variable_frame_rate": clip.presentation is not None, "frame_times": said}


def _distance(comparison: Comparison, info: VideoInfo) -> tuple[Distance | None, str | None]:
    if comparison.distance is not None and min(info.height, info.width) < MIN_SIDE:
        return None, f"not measured: it needs {MIN_SIDE} pixels a side"
    return comparison.distance, comparison.without


@contextmanager
def _stored_sound(path: Path, info: LatentInfo, start: Fraction, end: Fraction) -> Iterator[Sound | None]:
    if info.sound is None:
        yield None
        return
    with sound_file() as nut:
        with blamed_on_temporary_folder(), nut.open("wb") as file:
            for piece in read_sound(path):
                file.write(piece)
        with sound(nut, origin=info.sound_origin, start=start, end=end, named=path) as heard:
            yield heard


@contextmanager
def _own_sound(clip: Footage, audio: bool) -> Iterator[Sound | None]:
    info = clip.info
    if not audio or not info.audio:
        yield None
        return
    times = clip.presentation
    end = info.duration if times is None else times.time_of(info.frames)
    with sound(info.path, origin=video.origin(info.path), start=Fraction(0), end=end) as heard:
        yield heard


def _writer(
    output: Path,
    clip: VideoInfo | LatentInfo,
    title: str,
    codec: Codec,
    crf: int | float,
    *,
    panels: int = 1,
    presentation: Presentation | None,
    sound: Sound | None,
) -> video.VideoWriter:
    said = clip.metadata if isinstance(clip, LatentInfo) else {}
    through = {"title": title, "comment": "through the kinoflow tae", "kinoflow_tae_sha256": codec.sha256}
    return video.VideoWriter(
        output,
        fps=clip.fps,
        width=clip.width * panels,
        height=clip.height,
        crf=crf,
        metadata=said | through,
        presentation=presentation,
        sample_aspect_ratio=clip.sample_aspect_ratio,
        sound=sound,
    )


def _figures(
    codec: Codec, source: Path, output: Path, clip: VideoInfo | LatentInfo, *, frames: int, began: float
) -> Figures:
    """What every command reports; `ratio` is raw RGB bytes over the bytes of the latents in float16."""
    seconds = time.perf_counter() - began
    latent = codec.latent_bytes(frames, clip.height, clip.width)
    return {
        "input": str(source),
        "output": str(output),
        "frames": frames,
        "width": clip.width,
        "height": clip.height,
        "fps": str(clip.fps),
        "seconds": seconds,
        "frames_per_second": frames / seconds,
        "bytes": size_of(output),
        "latent_bytes": latent,
        "ratio": _raw_bytes(clip, frames) / latent,
        "tae": codec.name,
        "tae_sha256": codec.sha256,
    }


def _stored_size(width: int, height: int) -> str | None:
    """What an mp4 makes of an odd size; None where it keeps it."""
    even = (width + width % 2, height + height % 2)
    if even == (width, height):
        return None
    return f"{even[0]}x{even[1]}: H.264 takes even sides; kinoflow reads {width}x{height} again"


def _raw_bytes(clip: VideoInfo | LatentInfo, frames: int) -> int:
    return frames * clip.height * clip.width * 3


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Fractions and paths as text, for JSON."""
    return {k: str(v) if isinstance(v, Fraction | Path) else v for k, v in values.items()}
