"""What goes wrong for a client, in the form that OpenAI's API has."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_SERVER_ERROR = 500


class ApiError(Exception):
    """An answer other than the one that was asked for.

    Args:
        status: of HTTP.
        message: one line that says what to do.
        param: the parameter that is to blame.
        code: for programs.
        headers: go with the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def response(self) -> Response:
        """The answer."""
        fallback = "server_error" if self.status >= _SERVER_ERROR else "invalid_request_error"
        kind = _TYPES.get(self.status, fallback)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return answer({"error": error}, self.status, self.headers)


def answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII: a lone surrogate that a client sent goes back as it came."""
    return Response(json.dumps(value), status, headers, media_type="application/json")
