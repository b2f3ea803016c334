"""`kinoflow sample serve`: a release behind OpenAI's video API, and a page for people."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.sample.options import add_hardware, add_lora

if TYPE_CHECKING:
    from kinoflow.sample.processes import Team
    from kinoflow.sample.serve.app import ServeConfig
    from kinoflow.sample.serve.request import Maker

_LEAST_TOKEN = 16  # characters
_GRACE = 2  # seconds that open connections have when the server stops


def main(argv: list[str], team: Team | None = None) -> int:
    """Serve until SIGTERM or SIGINT; 0 then."""
    args = _parser().parse_args(argv)
    from kinoflow.sample.pipeline import Pipeline
    from kinoflow.sample.serve.app import ServeConfig
    from kinoflow.sample.serve.maker import ReleaseMaker

    for key in ("queue", "keep", "threads", "batch"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise UserError(f"{key}: {getattr(args, key)}; use 1 or more")
    token = _token(args.token_file, args.host)
    config = ServeConfig(folder=args.folder, queue=args.queue, keep=args.keep, token=token)
    with listening(
        args.host, args.port
    ) as listener:  # before the models: a port that is taken is said at once
        pipeline = Pipeline.from_pretrained(
            args.weights, lora=args.lora, device=args.device, dtype=args.dtype, threads=args.threads,
            rewrite=args.rewrite, team=team,
        )  # fmt: skip
        at_last = None if team is None else partial(team.end, at_once=True)
        return serve(ReleaseMaker(pipeline, args.batch), config, listener, at_last)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kinoflow sample serve",
        description="Serve a release: OpenAI's video API at /v1/videos, and a page for people at /.",
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine only)")
    add("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    add("--weights", metavar="RELEASE", help="release folder or hub id (default: the shipped mini release)")
    add("--folder", type=Path, default=Path("serve"), help="of the jobs and their clips (default serve/)")
    add("--queue", type=int, default=32, help="the most clips that wait; beyond them 429 (default 32)")
    add("--keep", type=int, default=200, help="the most finished clips that are kept (default 200)")
    add("--batch", type=int, help="clips at once (default: one a CPU core, 1 on a GPU); memory grows with it")
    add("--token-file", type=Path, metavar="FILE", help="holds the token that clients must send")
    add(
        "--rewrite",
        metavar="MODEL",
        help="a language model that makes captions of the prompts of requests with rewrite: true: a folder, "
        "hub id or server, as kinoflow sample --rewrite takes it",
    )
    add_lora(add)
    add_hardware(add)
    return parser


def _token(path: Path | None, host: str) -> str | None:
    """The token in a file; None without a file, which only this machine's own address may be.

    Raises:
        UserError: it is missing, cannot be read or is easy to guess.
    """
    from kinoflow.sample.serve.guard import is_loopback

    if path is None:
        if not is_loopback(host):
            raise UserError(f"host: others reach {host}; give a token to ask them for with --token-file FILE")
        return None
    try:
        token = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise UserError(os_error_line(path, error)) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: a token is ASCII; write one with: openssl rand -hex 32") from None
    if len(token) < _LEAST_TOKEN or len(token.split()) != 1:
        raise UserError(
            f"{path}: no token of {_LEAST_TOKEN} characters or more; write one with: openssl rand -hex 32"
        )
    return token


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at that address.

    Raises:
        UserError: the name is unknown, or the port is taken or not ours.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"port: {port} is not in 0 .. {2**16 - 1}; choose another with --port")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(
            f"host: {host}: {_reason(error)}; use 127.0.0.1, or an address of this machine"
        ) from None
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except (OSError, OverflowError) as error:
            raise UserError(f"port: {host} {port}: {_reason(error)}; choose another with --port") from None
        yield listener


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).lower()


def serve(
    maker: Maker, config: ServeConfig, listener: socket.socket, at_last: Callable[[], None] | None = None
) -> int:
    """Answer at a bound socket until SIGTERM or SIGINT; `at_last` is called where a step is not waited for.

    Raises:
        UserError: the folder cannot be used.
    """
    import uvicorn

    from kinoflow.sample.serve.app import create_app

    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("kinoflow").setLevel(logging.INFO)
    app = create_app(maker, config)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            ws="none",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE,
        )
    )

    def stop(sig: int, frame: FrameType | None) -> None:  # noqa: ARG001
        server.should_exit = True

    server.handle_exit = stop  # uvicorn's own would raise the signal again at the end: this is no failure
    host, port = listener.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C stops)", flush=True)
    server.run(sockets=[listener])
    if not app.state.stopped:
        # A step that takes minutes is not waited for, and its thread must not see the interpreter taken down.
        if at_last is not None:
            at_last()
        os._exit(0)
    return 0
