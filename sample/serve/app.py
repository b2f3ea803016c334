"""The HTTP side: OpenAI's video API, health, metrics and the page, over the jobs and their worker."""

import base64
import hashlib
import logging
import math
import re
import secrets
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from kinoflow.sample.request import ClipRequest
from kinoflow.sample.serve import body, metrics
from kinoflow.sample.serve.errors import ApiError, answer
from kinoflow.sample.serve.guard import Guard
from kinoflow.sample.serve.jobs import Job, Jobs
from kinoflow.sample.serve.metrics import Metrics
from kinoflow.sample.serve.pictures import FIELDS, keeping
from kinoflow.sample.serve.request import Maker
from kinoflow.sample.serve.worker import Worker
from kinoflow.sample.settings import interval_text

log = logging.getLogger(__name__)

_PAGE = Path(__file__).parent / "page.html"
_STOP_SECONDS = 3.0
_TYPES = {".mp4": "video/mp4", ".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What a server keeps, and whom it serves."""

    folder: Path
    """Of the jobs and their clips."""
    queue: int = 32
    """The most jobs that wait; a request beyond them is answered with 429."""
    keep: int = 200
    """The most finished jobs that are kept; the oldest go, with their clips."""
    token: str | None = None
    """What clients must send; without one the server answers to this machine only."""


class Server:
    """What the routes work on: the jobs, their worker, the figures.

    Raises:
        UserError: the folder cannot be used.
    """

    def __init__(self, maker: Maker, config: ServeConfig) -> None:
        self.maker, self.config, self.metrics = maker, config, Metrics()
        self.jobs = Jobs(config.folder / "jobs.sqlite")
        self.worker = Worker(self.jobs, maker, self.metrics, folder=config.folder / "clips", keep=config.keep)
        self._turn = threading.Lock()  # a picture takes 3 bytes a pixel while it is checked: one at a time

    def stop(self) -> bool:
        """Whether the worker stopped in good order; where it did not, its job is begun again next time."""
        stopped = self.worker.stop(_STOP_SECONDS)
        self.jobs.close()
        return stopped

    def create(self, values: dict[str, Any], sent: dict[str, bytes]) -> Job:
        """Queue what is asked for, with the pictures that came with it.

        Raises:
            ApiError: 400 or 413 for what cannot be made, 429 where the queue is full.
        """
        id = f"video_{secrets.token_hex(16)}"
        with self._turn if sent else nullcontext(), keeping(self.worker.folder, id, sent) as paths:
            asked = body.checked(values, self.maker, paths)
            names: dict[str, Any] = {FIELDS[field]: path.name for field, path in paths.items()}
            job = self.jobs.add(id, replace(asked, **names), most=self.config.queue)
            if job is None:
                seconds = math.ceil(self.metrics.mean_seconds)
                line = f"the queue of {self.config.queue} is full; ask again in {seconds} s"
                raise ApiError(429, line, code="queue_full", headers={"Retry-After": str(seconds)})
        self.worker.wake()
        return job

    def job(self, id: str) -> Job:
        """The job of that id. Raises ApiError 404."""
        job = self.jobs.get(id)
        if job is None:
            raise ApiError(404, f"no video {id[:80]!r}; GET /v1/videos lists those that there are")
        return job

    def video(self, job: Job) -> dict[str, Any]:
        """A job as OpenAI's API shows it, with our settings beside."""
        request = job.request
        share = self.worker.share(job.id) if job.status == "in_progress" else 0.0  # it may begin meanwhile
        error = None
        if job.error is not None:
            error = {"code": "server_error", "message": job.error}
        return {
            "id": job.id,
            "object": "video",
            "status": job.status,
            "progress": 100 if job.status == "completed" else min(99, int(100 * share)),
            "created_at": int(job.created),
            "completed_at": int(job.ended) if job.ended is not None and error is None else None,
            "model": self.maker.name,
            "seconds": body.duration(request),
            "size": f"{request.width}x{request.height}",
            "error": error,
            "has_preview": job.status == "in_progress" and self.worker.preview(job.id) is not None,
            **settings(request),
            "figures": job.figures,
        }


def settings(request: ClipRequest) -> dict[str, Any]:
    """A request's settings by the names that clients know."""
    interval = request.guidance_interval
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative,
        "seed": request.seed,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "guidance_kind": request.guidance_kind,
        "guidance_interval": interval and interval_text(interval),
        "guidance_rescale": request.guidance_rescale,
        "cache": request.cache,
        "best_of": request.best_of,
        "num_frames": request.frames,
        "fps": str(request.fps),
        "rewrite": request.rewrite,
        "input_reference": request.image,
        "last_reference": request.last,
    }


def create_app(maker: Maker, config: ServeConfig) -> FastAPI:
    """The application; its worker runs as long as its lifespan, and `app.state.server` is what it works on.

    Raises:
        UserError: the folder cannot be used.
    """
    server = Server(maker, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.worker.start()
        yield
        app.state.stopped = await run_in_threadpool(server.stop)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = server
    app.add_middleware(Guard, token=config.token)
    _answer_errors(app)
    _add_videos(app, server)
    _add_models(app, server)
    _add_watching(app, server)
    _add_page(app)
    return app


def _answer_errors(app: FastAPI) -> None:
    handlers: dict[type[Exception], Callable[[Any], ApiError]] = {
        ApiError: lambda error: error,
        HTTPException: lambda error: ApiError(error.status_code, str(error.detail), headers=error.headers),
        RequestValidationError: _bad_query,
        ClientDisconnect: lambda _: ApiError(400, "the client left"),  # which nobody reads
        sqlite3.Error: _no_disk,
        Exception: lambda _: ApiError(500, "the server failed; its log says why"),
    }
    for kind, convert in handlers.items():
        app.add_exception_handler(kind, _handler(convert))


def _handler(convert: Callable[[Any], ApiError]) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handle(_: Request, error: Exception) -> Response:
        return convert(error).response()

    return handle


def _no_disk(error: sqlite3.Error) -> ApiError:
    log.error("the list of jobs cannot be used: %s", error)
    return ApiError(503, "the server's list of jobs cannot be written; free space on its disk, ask again")


def _bad_query(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    param = str(first["loc"][-1])
    return ApiError(400, f"{param}: {first['msg']}", param=param, code="invalid_value")


def _add_videos(app: FastAPI, server: Server) -> None:
    @app.post("/v1/videos")
    async def create(request: Request) -> Response:
        job = await run_in_threadpool(server.create, *await body.read(request))
        return answer(server.video(job))

    @app.get("/v1/videos")
    def listing(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        jobs = server.jobs.page(limit=limit + 1, after=after, oldest_first=order == "asc")
        if jobs is None:
            raise ApiError(400, f"after: no video {after!r}; leave it out", param="after")
        data = [server.video(job) for job in jobs[:limit]]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        more = len(jobs) > limit
        return answer({"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more})

    @app.get("/v1/videos/{id}")
    def retrieve(id: str) -> Response:
        return answer(server.video(server.job(id)))

    @app.get("/v1/videos/{id}/content")
    def content(
        id: str, variant: Literal["video", "preview", "input_reference", "last_reference"] = "video"
    ) -> Response:
        job = server.job(id)
        if variant == "preview":
            picture = server.worker.preview(id)
            if picture is None:
                raise ApiError(404, f"{id} is {job.status} and has no preview", param="variant")
            return Response(picture, media_type="image/png", headers={"Cache-Control": "no-store"})
        if variant != "video":
            name = settings(job.request)[variant]
            if name is None:
                raise ApiError(404, f"{id} was asked for without a picture {variant}", param="variant")
            return _file(server.worker.picture(name), f"the picture of {id}")
        if job.status != "completed":
            remedy = "make it again" if job.status == "failed" else "ask again when it is completed"
            raise ApiError(409, f"{id} is {job.status} and has no content; {remedy}", code="video_not_ready")
        return _file(server.worker.path(id), f"the clip of {id}")

    @app.delete("/v1/videos/{id}")
    def delete(id: str) -> Response:
        server.job(id)
        server.worker.remove(id)
        return answer({"id": id, "object": "video.deleted", "deleted": True})


def _file(path: Path, what: str) -> Response:
    if not path.is_file():
        raise ApiError(404, f"{what} was removed from the server's folder; make it again")
    return FileResponse(path, media_type=_TYPES[path.suffix], filename=path.name)


def _add_models(app: FastAPI, server: Server) -> None:
    maker = server.maker
    clips = [
        {
            "num_frames": c.frames,
            "size": f"{c.width}x{c.height}",
            "fps": str(c.fps),
            "seconds": body.duration(c),
        }
        for c in maker.clips
    ]
    model = {"id": maker.name, "object": "model", "created": 0, "owned_by": "kinoflow"}
    model |= {"clips": clips, "defaults": settings(maker.defaults), "rewrites": maker.rewrites}
    model |= {"takes_pictures": maker.takes_pictures}

    @app.get("/v1/models")
    def models() -> Response:
        return answer({"object": "list", "data": [model]})


def _add_watching(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    def health() -> Response:
        if not server.worker.works:
            raise ApiError(503, "the worker has stopped; start the server again")
        return answer({"status": "ok"})

    @app.get("/metrics")
    def figures() -> Response:
        text = server.metrics.text(server.jobs.counts())
        return Response(text, media_type=metrics.CONTENT_TYPE)


def _add_page(app: FastAPI) -> None:
    page = _PAGE.read_text(encoding="utf-8")
    parts = {tag: _sources(page, tag) for tag in ("script", "style")}
    policy = (
        f"default-src 'none'; script-src {parts['script']}; style-src {parts['style']}; connect-src 'self'; "
        "media-src blob:; img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @app.get("/")
    def home() -> Response:
        return Response(page, media_type="text/html", headers=headers)


def _sources(page: str, tag: str) -> str:
    """The page's own scripts or styles, by their hashes: a browser runs no others."""
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{value}'" for value in hashes)
