"""Who writes captions: a server that speaks OpenAI's protocol, or a model of transformers."""

import base64
import io
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from kinoflow.configs.chat import ChatServer
from kinoflow.configs.errors import UserError, one_line
from kinoflow.configs.files import folder_fingerprint
from kinoflow.configs.pretrained import resolve_folder

MOST_TOKENS = 320  # of an answer; 100 words are some 140
_READ = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
_SECONDS = 300  # that a server may take
_WAITS = (2.0, 10.0)  # seconds before a server that is busy is asked again


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
    """A model behind an address ending in /v1."""

    def __init__(self, address: str, key: str | None = None) -> None:
        self._server = ChatServer(address, key, option="--model", seconds=_SECONDS, waits=_WAITS)
        self.name = self.key = self._server.model

    def __call__(self, prompt: str, pictures: Sequence[bytes]) -> str:
        """As `Captioner`."""
        urls = [f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}" for picture in pictures]
        shown = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content = [*shown, {"type": "text", "text": prompt}]
        found = self._server.answer([{"role": "user", "content": content}], MOST_TOKENS)
        return plain(found.text, whole=found.whole, name=self.name)


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
