"""Language models behind a server that speaks OpenAI's protocol, as OpenAI, vLLM, llama.cpp and Ollama do."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import urldefrag, urlsplit

from kinoflow.configs.errors import UserError, one_line

_MOST_BYTES = 2**20
_BUSY = 429, 500, 502, 503, 504
_FORBIDDEN = 401, 403


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said; `whole` is False where it was cut at its limit."""

    text: str
    whole: bool


class ChatServer:
    """A model behind an address ending in /v1: its `model` name, and its `host`.

    Args:
        address: `http://host:8000/v1#name` picks one of a server's models, else it is the first it lists.
        key: is sent to it.
        option: what the address was given as, for the line that refuses it.
        prefix: what the other lines begin with.
        seconds: that it may take.
        waits: seconds before it is asked again while it is busy or away.

    Raises:
        UserError: no address, or no answer.
    """

    def __init__(
        self,
        address: str,
        key: str | None = None,
        *,
        option: str,
        prefix: str = "",
        seconds: float,
        waits: Sequence[float] = (),
    ) -> None:
        try:
            place, model = urldefrag(address)
            self.host = urlsplit(place).hostname
        except ValueError as error:
            raise UserError(f"{option}: {address}: {one_line(error)}; write http://HOST:PORT/v1") from None
        self._address, self._prefix = place.rstrip("/"), prefix
        self._seconds, self._waits = seconds, waits
        self._head = {"Content-Type": "application/json"}
        self._head |= {"Authorization": f"Bearer {key}"} if key else {}
        self.model = model or self._first()

    def answer(self, messages: Sequence[dict[str, Any]], most_tokens: int) -> Answer:
        """The most likely answer to a conversation.

        Raises:
            UserError: none, or one of another protocol.
        """
        found = self._ask("chat/completions", {
            "model": self.model, "temperature": 0, "max_tokens": most_tokens, "messages": list(messages),
        })  # fmt: skip
        try:
            choice = found["choices"][0]
            text, why = choice["message"]["content"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._strange() from None
        if not isinstance(text, str | None):
            raise self._strange()
        return Answer(text=text or "", whole=why != "length")

    def _first(self) -> str:
        try:
            return str(self._ask("models")["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise self._strange() from None

    def _ask(self, what: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        for wait in (*self._waits, None):
            try:
                request = urllib.request.Request(f"{self._address}/{what}", data, self._head)
                with urllib.request.urlopen(request, timeout=self._seconds) as reply:
                    return json.loads(reply.read(_MOST_BYTES))
            except urllib.error.HTTPError as error:
                with error:
                    said = " ".join(error.read(300).decode(errors="replace").split())
                if error.code not in _BUSY or wait is None:
                    forbidden = error.code in _FORBIDDEN
                    remedy = "set OPENAI_API_KEY" if forbidden else "see that it serves that model"
                    line = f"{self._prefix}{self._address}/{what}: {error.code} {said}; {remedy}"
                    raise UserError(line) from None
            except (OSError, HTTPException) as error:
                if wait is None:
                    said = f"{self._prefix}{self._address}: cannot be asked ({one_line(error)})"
                    raise UserError(f"{said}; see that it runs, and the address") from None
            except ValueError:
                raise self._strange() from None
            time.sleep(wait)
        raise AssertionError("the last attempt answers or raises")

    def _strange(self) -> UserError:
        said = f"{self._prefix}{self._address}: no answer of OpenAI's protocol"
        return UserError(f"{said}; end the address in /v1")
