"""Prompts made captions by a language model: people write few words, and models were trained on many.

Movie Gen does so at inference (section 3.4.1): the scene in one fixed order, rare words replaced by plain
ones, as much detail as the captions of training have. The model is a causal one of transformers, or behind a
server that speaks OpenAI's protocol; both answer greedily.
"""

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kinoflow.conditioning.encoders import quiet
from kinoflow.conditioning.prompt import quoted_text
from kinoflow.configs.chat import Answer, ChatServer
from kinoflow.configs.errors import UserError, one_line
from kinoflow.configs.pretrained import resolve_folder

MOST_TOKENS, MOST_CHARACTERS = 320, 2000
_SECONDS = 120  # that a server may take
_READ = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
_WORDS, _FEW_WORDS = 100, 25
_INSTRUCTION = """\
You rewrite a prompt for a text-to-video model as one of the captions that it was trained on.
- Say what is seen, in this order: the subject and its looks, what it does and how fast, what else is there, \
the background, the camera.
- Keep all that the prompt asks for. Where it leaves something open, add a fitting detail that can be seen.
- Put plain words in the place of rare, abstract and figurative ones.
- Copy words in quotes letter by letter, with their quotes: they are written in the video. Quote nothing else.
- Answer with the caption alone: one paragraph, at most {most} words."""
_KNOWN = "\n- Use no words but these: {words}."
_EXAMPLES = (
    (
        "cat surfing",
        "A ginger cat stands on a white surfboard and rides a small blue wave towards the shore. Its fur is "
        "wet and its tail is raised. Water sprays behind the board. The sea is calm under a clear sky in the "
        "warm light of the morning. The camera follows from the side.",
    ),
)
_FEW_EXAMPLES = (("my heart gets bigger", "a red heart grows slowly on a black background"),)


@runtime_checkable
class Model(Protocol):
    """A language model: `name` goes into metadata."""

    name: str

    def __call__(self, instruction: str, examples: Sequence[tuple[str, str]], prompt: str) -> Answer: ...


class Rewriter:
    """Makes captions of prompts.

    Args:
        words: all that the captions may have; None where the video model takes any.
    """

    def __init__(self, model: Model, words: Collection[str] | None = None) -> None:
        self._model, self.name = model, model.name
        self._instruction = _INSTRUCTION.format(most=_WORDS if words is None else _FEW_WORDS)
        self._examples: Sequence[tuple[str, str]] = _EXAMPLES
        if words is not None:
            listed = sorted(word for word in words if word.isalpha())
            self._instruction += _KNOWN.format(words=", ".join(listed))
            known = [pair for pair in _FEW_EXAMPLES if set(pair[1].split()) <= set(listed)]
            self._examples = known

    def __call__(self, prompt: str) -> tuple[str, str | None]:
        """The caption, and a line where it is the prompt itself, because quoted words did not survive.

        Raises:
            UserError: no model or server, an answer that is empty or too long, or no text.
        """
        answer = self._model(self._instruction, self._examples, prompt)
        caption = _plain(answer.text, prompt)
        asked = _shown(prompt)
        if not caption:
            raise UserError(f"rewrite: {self.name} has no answer to {asked}; reword it, or do without")
        if not answer.whole or len(caption) > MOST_CHARACTERS:
            raise UserError(
                f"rewrite: {self.name} finds no end with {asked}; take a model that follows instructions"
            )
        lost, new = _quotes(prompt) - _quotes(caption), _quotes(caption) - _quotes(prompt)
        if lost or new:
            what = f"lost {_shown(min(lost))}" if lost else f"added {_shown(min(new))}"
            said = f"rewrite: {self.name} {what} of the words to be written; {asked} stays as it is"
            return prompt, said
        return caption, None


def open_model(source: str, *, device: torch.device | str = "cpu", key: str | None = None) -> Model:
    """A server where `source` is an address, else the model of a folder or hub id.

    `http://host:8000/v1#name` picks one of a server's models, else it is the first that it lists; `key` is
    sent to it.

    Raises:
        UserError: neither is there, or a checkpoint that is damaged or of another kind.
    """
    if re.match(r"https?://", source):
        return Server(source, key)
    return LocalModel(source, device)


class LocalModel:
    """A causal language model of transformers.

    Raises:
        UserError: no such folder or hub id, or one that holds no such model.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        folder = resolve_folder(source, _READ)
        self.name = Path(source).name if Path(source).is_dir() else source
        try:
            with quiet():
                self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
                model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            said = f"rewrite: {source}: holds no causal language model that can be read ({one_line(error)})"
            raise UserError(f"{said}; give its folder or hub id") from error
        self._model = model.to(device).eval()

    @torch.no_grad()
    def __call__(self, instruction: str, examples: Sequence[tuple[str, str]], prompt: str) -> Answer:
        """The most likely answer; without a chat template the next line of a text of examples."""
        chat = self._tokenizer.chat_template is not None
        tokens = (
            self._chat(instruction, examples, prompt) if chat else self._text(instruction, examples, prompt)
        )
        tokens, start = {k: v.to(self._model.device) for k, v in tokens.items()}, tokens["input_ids"].shape[1]

        def ended(ids: Tensor, *_: object, **__: object) -> Tensor:
            line = not chat and "\n" in self._said(ids[0, start:]).lstrip()
            return torch.full((1,), line, dtype=torch.bool, device=ids.device)

        with quiet():
            found = self._model.generate(
                **tokens, do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
                max_new_tokens=MOST_TOKENS, pad_token_id=self._end[0] if self._end else 0,
                stopping_criteria=[ended],
            )[0, start:]  # fmt: skip
        text = self._said(found)
        if chat:
            return Answer(text=text, whole=bool(len(found)) and int(found[-1]) in self._end)
        line, newline, _ = text.lstrip().partition("\n")
        return Answer(text=line, whole=bool(newline) or (bool(len(found)) and int(found[-1]) in self._end))

    @property
    def _end(self) -> list[int]:
        """Tokens that end an answer."""
        ends = self._model.generation_config.eos_token_id
        ends = self._tokenizer.eos_token_id if ends is None else ends
        return [] if ends is None else ends if isinstance(ends, list) else [ends]

    def _said(self, ids: Tensor) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _chat(self, instruction: str, examples: Sequence[tuple[str, str]], prompt: str) -> Any:
        messages = conversation(instruction, examples, prompt)
        # Of models that think first, the answer alone.
        how = {
            "add_generation_prompt": True,
            "return_dict": True,
            "return_tensors": "pt",
            "enable_thinking": False,
        }
        try:
            return self._tokenizer.apply_chat_template(messages, **how)
        except TemplateError:  # one without a system's part
            (system, first, *rest) = messages
            first = first | {"content": f"{system['content']}\n\n{first['content']}"}
            return self._tokenizer.apply_chat_template([first, *rest], **how)

    def _text(self, instruction: str, examples: Sequence[tuple[str, str]], prompt: str) -> Any:
        pairs = "".join(f"Prompt: {asked}\nCaption: {said}\n\n" for asked, said in examples)
        text = f"{instruction}\n\n{pairs}Prompt: {' '.join(prompt.split())}\nCaption:"
        tokens = self._tokenizer(text, return_tensors="pt")
        return {key: tokens[key] for key in ("input_ids", "attention_mask")}


class Server:
    """Models behind an address ending in /v1."""

    def __init__(self, address: str, key: str | None = None) -> None:
        self._server = ChatServer(address, key, option="rewrite", prefix="rewrite: ", seconds=_SECONDS)
        self.name = f"{self._server.model} of {self._server.host}"

    def __call__(self, instruction: str, examples: Sequence[tuple[str, str]], prompt: str) -> Answer:
        """Its answer."""
        return self._server.answer(conversation(instruction, examples, prompt), MOST_TOKENS)


def conversation(instruction: str, examples: Sequence[tuple[str, str]], prompt: str) -> list[dict[str, str]]:
    """The instruction, each example as a question and its answer, the prompt."""
    messages = [{"role": "system", "content": instruction}]
    for asked, said in examples:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return [*messages, {"role": "user", "content": prompt}]


def _plain(text: str, prompt: str) -> str:
    """An answer in one line, without its thoughts, and without quotes around all of it."""
    caption = " ".join(re.sub(r"<think>.*?</think>", " ", text, flags=re.DOTALL).split())
    inside = re.fullmatch(r'["“]([^"“”]*)["”]', caption)
    if inside and inside[1] not in _quotes(prompt):
        return inside[1].strip()
    return caption


def _quotes(text: str) -> set[str]:
    return set(quoted_text(text))


def _shown(text: str) -> str:
    return json.dumps(text if len(text) <= 40 else f"{text[:40]}…", ensure_ascii=False)
