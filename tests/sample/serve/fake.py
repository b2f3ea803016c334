"""A quick maker for tests of the server, and what starts one in a thread or as a process."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from kinoflow.configs.errors import UserError, run
from kinoflow.data import video
from kinoflow.data.clips.buckets import Bucket, parse
from kinoflow.sample.request import ClipRequest
from kinoflow.sample.serve.app import ServeConfig, create_app
from kinoflow.sample.serve.command import listening, serve

TOKEN = "a-token-that-tests-know"
FORM = {"prompt": "a red star moves left"}
CLIPS = ("16x32x32@16", "1x32x32@16", "24x32x48@24000/1001", "24x32x48@24")


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """What `condition` gives when it is true at last."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.005)
    return found


class FakeMaker:
    """Draws a gray clip, its shade the seed's or its first picture's.

    While `gate` says no, it stays at half of the clip.
    """

    name, rewrites, takes_pictures = "fake", False, True
    clips = tuple(map(parse, CLIPS))
    at_once = 1

    def __init__(self, gate: Callable[[], bool] = lambda: True) -> None:
        self.gate = gate
        self.made: list[str] = []  # prompts of what was drawn to the end
        self.left = 0  # how many were drawn or given up
        self.defaults = self.check(ClipRequest(prompt="a clip"))

    def check(self, request: ClipRequest) -> ClipRequest:
        wanted = {key: getattr(request, key) for key in ("frames", "width", "height", "fps")}
        fitting = [clip for clip in self.clips if self._fits(clip, wanted)]
        if not fitting:
            raise UserError(f"frames {request.frames}: fake makes --frames 16 --size 32x32 --fps 16")
        steps = 50 if request.steps is None else request.steps
        if not 1 <= steps <= 250:
            raise UserError(f"num_steps: {steps} is more than 250; use 1 to 250")
        if request.guidance == 1 and request.negative:
            raise UserError("negative: guidance_scale 1 steers away from nothing; use more, or leave it out")
        clip = {key: getattr(fitting[0], key) for key in wanted}
        guidance = 4.0 if request.guidance is None else request.guidance
        return replace(request, **clip, steps=steps, guidance=guidance)

    @staticmethod
    def _fits(clip: Bucket, wanted: dict[str, Any]) -> bool:
        return all(value in (None, getattr(clip, key)) for key, value in wanted.items())

    def make(self, request: ClipRequest, path: Path, progress: Callable[[float], None]) -> dict[str, Any]:
        try:
            return self._draw(request, path, progress)
        finally:
            self.left += 1

    def _draw(self, request: ClipRequest, path: Path, progress: Callable[[float], None]) -> dict[str, Any]:
        progress(0.5)
        while not self.gate():
            progress(0.5)
            time.sleep(0.002)
        if "broken" in request.prompt:
            raise UserError(f"{path}: the disk\nis full")
        if "bug" in request.prompt:
            raise RuntimeError("a secret")
        assert request.frames and request.height and request.width and request.fps
        shape = (request.frames, request.height, request.width, 3)
        picture = None if request.image is None else video.read(Path(request.image))
        shade = np.full(shape, request.seed % 256 if picture is None else picture.mean(), np.uint8)
        video.write(path, shade, fps=Fraction(request.fps), metadata={"prompt": request.prompt})
        self.made.append(request.prompt)
        reworded = {"typed": request.prompt, "prompt": f"{request.prompt}, slowly", "rewriter": "it"}
        return (reworded if request.rewrite else {}) | {
            "unknown_words": [word for word in request.prompt.split() if word == "puple"]
        }


@contextmanager
def running(maker: FakeMaker, config: ServeConfig) -> Iterator[str]:
    """A real server at a free port, in a thread; gives its address."""
    with listening("127.0.0.1", 0) as listener:
        app = create_app(maker, config)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def main(folder: str, gate: str) -> int:
    """A process that serves as the command does; it makes clips once there is a file `gate`."""
    with listening("127.0.0.1", 0) as listener:
        return serve(FakeMaker(Path(gate).exists), ServeConfig(folder=Path(folder)), listener)


if __name__ == "__main__":
    sys.exit(run(lambda: main(*sys.argv[1:]), "fake"))
