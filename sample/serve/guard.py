"""What stands before the server: who may come in, and with how much."""

import hmac
import ipaddress
import re
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kinoflow.sample.serve import pictures
from kinoflow.sample.serve.errors import ApiError

MAX_BODY = 2**20  # bytes
MAX_FORM = MAX_BODY + len(pictures.FIELDS) * pictures.MAX_BYTES  # of one that may bring pictures
OPEN = frozenset({"/", "/health"})  # what needs no token: it tells nothing


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a name or address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Lets through requests with the token, or without one those that this machine's own pages make.

    A browser would send what any web page asks of 127.0.0.1: where no token tells them apart, the names in
    Host and Origin do. Bodies above 1 MiB, or of forms that may bring pictures 21 MiB, are not
    read.
    """

    def __init__(self, app: ASGIApp, *, token: str | None) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        try:
            self._admit(request)
            most = _most(request)
            _check_length(request.headers.get("content-length", "0"), most)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, _counted(receive, most), _sealed(send))

    def _admit(self, request: Request) -> None:
        if self._token is None:
            _check_names(request)
        elif request.scope["path"] not in OPEN:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode(), self._token.encode())
            if scheme.lower() != "bearer" or not same:
                message = "send the server's token: Authorization: Bearer TOKEN"
                headers = {"WWW-Authenticate": "Bearer"}
                raise ApiError(401, message, code="invalid_api_key", headers=headers)


def _check_names(request: Request) -> None:
    origin = request.headers.get("origin")
    if not is_loopback(_name(f"//{request.headers.get('host', '')}")):
        line = "this server answers to localhost only; start it with --host and --token-file for other names"
        raise ApiError(403, line, code="forbidden_host")
    if origin is not None and origin.partition("://")[2] != request.headers["host"]:
        raise ApiError(403, "pages of other sites may not use this server", code="forbidden_origin")


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _most(request: Request) -> int:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return MAX_FORM if kind == "multipart/form-data" else MAX_BODY


def _check_length(length: str, most: int) -> None:
    if not re.fullmatch(r"\d{1,12}", length, re.ASCII) or int(length) > most:
        _refuse_length(most)


def _refuse_length(most: int) -> None:
    raise ApiError(413, f"the body is larger than {most:,} bytes; send less", code="request_too_large")


def _counted(receive: Receive, most: int) -> Receive:
    """Bodies that do not say how long they are, as far as the limit."""
    total = 0

    async def counted() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > most:
            _refuse_length(most)
        return message

    return counted


def _sealed(send: Send) -> Send:
    """Answers that no browser takes for something else."""

    async def sealed(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
        await send(message)

    return sealed
