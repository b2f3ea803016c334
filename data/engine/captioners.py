"""Who writes captions: a server that speaks OpenAI's protocol, or a model of transformers."""

import base64
import io
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urldefrag, urlsplit

from kinoflow.configs.errors import UserError, one_line
from kinoflow.configs.files import folder_fingerprint
from kinoflow.configs.pretrained import resolve_folder

MOST_TOKENS = 320  # of an answer; 100 words are some 140
_READ = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
_SECONDS = 300  # that a server may take
_MOST_BYTES = 2**20
_WAITS = (2.0, 10.0)  # seconds before a server that is busy is asked again
_BUSY = 429, 500, 502, 503, 504
_FORBIDDEN = 401, 403


@runtime_checkable
class Captioner(Protocol):
    """Describes pictures: `name` is told to people, `key` is another text for another model."""

    name: str
    key: str

    def __call__(self, prompt: str, pictures: Sequence[bytes]) -> str:
        """The caption, in one line, of JPEG pictures in the order of time.

        Raises:
            UserError: no answer, or an empty one.
        """
        ...


def open_captioner(source: str, key: str | None = None) -> Captioner:
    """A server where `source` is an address, else the model of a folder or hub id.

    `http://host:8000/v1#name` picks one of a server's models, else it is the first that it lists; `key` is
    sent to it.

    Raises:
        UserError: neither is there, or a checkpoint that is damaged or of another kind.
    """
    if re.match(r"https?://", source):
        return Server(source, key)
    return LocalModel(source)


class Server:
    """A model behind an address ending in /v1, as OpenAI, vLLM, llama.cpp and Ollama serve them."""

    def __init__(self, address: str, key: str | None = None) -> None:
        try:
            place, model = urldefrag(address)
            urlsplit(place)
        except ValueError as error:
            raise UserError(f"--model: {address}: {one_line(error)}; write http://HOST:PORT/v1") from None
        self._address = place.rstrip("/")
        self._head = {"Content-Type": "application/json"}
        self._head |= {"Authorization": f"Bearer {key}"} if key else {}
        self.name = self.key = model or self._first()

    def __call__(self, prompt: str, pictures: Sequence[bytes]) -> str:
        """As `Captioner`."""
        urls = [f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}" for picture in pictures]
        shown = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        found = self._ask("chat/completions", {
            "model": self.key, "temperature": 0, "max_tokens": MOST_TOKENS,
            "messages": [{"role": "user", "content": [*shown, {"type": "text", "text": prompt}]}],
        })  # fmt: skip
        try:
            choice = found["choices"][0]
            text, why = choice["message"]["content"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._strange() from None
        if not isinstance(text, str | None):
            raise self._strange()
        return plain(text or "", whole=why != "length", name=self.name)

    def _first(self) -> str:
        try:
            return str(self._ask("models")["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise self._strange() from None

    def _ask(self, what: str, body: dict[str, Any] | None = None) -> Any:
        """Its answer; one that is busy or away is asked again after some seconds."""
        data = None if body is None else json.dumps(body).encode()
        for wait in (*_WAITS, None):
            try:
                request = urllib.request.Request(f"{self._address}/{what}", data, self._head)
                with urllib.request.urlopen(request, timeout=_SECONDS) as reply:
                    return json.loads(reply.read(_MOST_BYTES))
            except urllib.error.HTTPError as error:
                with error:
                    said = " ".join(error.read(300).decode(errors="replace").split())
                if error.code not in _BUSY or wait is None:
                    remedy = (
                        "set OPENAI_API_KEY" if error.code in _FORBIDDEN else "see that it serves that model"
                    )
                    raise UserError(f"{self._address}/{what}: {error.code} {said}; {remedy}") from None
            except (OSError, HTTPException) as error:
                if wait is None:
                    said = f"{self._address}: cannot be asked ({one_line(error)})"
                    raise UserError(f"{said}; see that it runs, and the address") from None
            except ValueError:
                raise self._strange() from None
            time.sleep(wait)
        raise AssertionError("the last attempt answers or raises")

    def _strange(self) -> UserError:
        return UserError(f"{self._address}: no answer of OpenAI's protocol; end the address in /v1")


class LocalModel:
    """A model of transformers that is asked about pictures; on the GPU where there is one.

    Raises:
        UserError: no such folder or hub id, or one that holds no such model.
    """

    def __init__(self, source: str) -> None:
        from safetensors import SafetensorError
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from kinoflow.configs.devices import parse_device

        folder = resolve_folder(source, _READ)
        self.name = Path(source).name if Path(source).is_dir() else source
        self.key = folder_fingerprint(folder)
        try:
            self._processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                folder, dtype="auto", local_files_only=True
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError,
                SafetensorError) as error:  # fmt: skip
            said = f"--model: {source}: holds no model of pictures that can be read ({one_line(error)})"
            raise UserError(f"{said}; give its folder or hub id") from error
        if getattr(self._processor, "chat_template", None) is None:
            raise UserError(
                f"--model: {source}: has no chat template; give a model that follows instructions"
            )
        self._model = model.to(parse_device("auto")).eval()
        self._one_at_a_time = threading.Lock()

    def __call__(self, prompt: str, pictures: Sequence[bytes]) -> str:
        """As `Captioner`: the most likely answer."""
        import torch
        from PIL import Image

        shown = [{"type": "image", "image": Image.open(io.BytesIO(data)).convert("RGB")} for data in pictures]
        messages = [{"role": "user", "content": [*shown, {"type": "text", "text": prompt}]}]
        with self._one_at_a_time, torch.no_grad():
            tokens = self._processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ).to(self._model.device, self._model.dtype)
            found = self._model.generate(**tokens, **self._how())[0, tokens["input_ids"].shape[1] :]
        text = self._processor.decode(found, skip_special_tokens=True)
        return plain(text, whole=len(found) < MOST_TOKENS, name=self.name)

    def _how(self) -> dict[str, Any]:
        return {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None,
                "max_new_tokens": MOST_TOKENS}  # fmt: skip


def plain(text: str, *, whole: bool, name: str) -> str:
    """An answer in one line, without its thoughts, and without quotes around all of it.

    Of one that was cut at its limit, the sentences that are whole.

    Raises:
        UserError: nothing is left.
    """
    text = text.encode(errors="replace").decode()  # JSON may hold halves of characters
    caption = " ".join(re.sub(r"<think>.*?(</think>|$)", " ", text, flags=re.DOTALL).split())
    if inside := re.fullmatch(r'["“]([^"“”]*)["”]?', caption):
        caption = inside[1].strip()
    if not whole:
        ended = re.match(r".*[.!?](?=\s|$)", caption)
        caption = ended[0] if ended else ""
    if not caption:
        said = "says nothing" if whole else "finds no end"
        raise UserError(f"{name} {said} of it; take a model that follows instructions")
    return caption
