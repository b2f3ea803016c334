"""The words that a small release knows, and what to say of a prompt that has others.

The tokenizer tells: one that has a token for each word it was trained on, and only letters and pairs of
letters for the rest, knows no other word. One with longer pieces, as the large encoders have, knows them all.
"""

import difflib
import json
import re
import string
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kinoflow.conditioning.prompt import quoted_text, without_quoted

_START = "▁"  # by which a Unigram's tokens begin a word
_LONGEST_REST = 2
_NEAR = 0.7
_SHOWN, _LONGEST_SHOWN = 5, 30


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """All words that prompts may have, in lower case.

    `written` is a regular expression for what the release writes where a prompt quotes it; empty: anything.
    """

    words: frozenset[str]
    written: str = ""

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt outside its quotes that are not known, each once, as they stand there."""
        found = (word for word in _words(without_quoted(prompt)) if _normalized(word) not in self.words)
        return list(dict.fromkeys(found))

    def advice(self, prompt: str) -> str | None:
        """One line on the words that the release does not know, or cannot write; None where all is well."""
        said, unknown = [], self.unknown(prompt)
        if unknown:
            more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
            said.append(f"this release does not know {', '.join(map(self._named, unknown[:_SHOWN]))}{more}")
        wrong = [text for text in quoted_text(prompt) if self.written and not self._writes(text)]
        if wrong:
            said.append(f"this release writes {self.written}, not {_shown(wrong[0])}")
        perhaps = [*wrong, *(word for word in unknown if self._near(word) is None)]
        example = next(
            (word.upper() for word in perhaps if self.written and self._writes(word.upper())), None
        )
        if example:
            said.append(f'a word to be written goes in quotes and capitals, as in "{example}"')
        return "; ".join(said) or None

    def _named(self, word: str) -> str:
        near = self._near(word)
        return _shown(word) if near is None else f'{_shown(word)} (it knows "{near}")'

    def _near(self, word: str) -> str | None:
        known = sorted(self.words)  # among equals always the same
        return next(iter(difflib.get_close_matches(_normalized(word), known, n=1, cutoff=_NEAR)), None)

    def _writes(self, text: str) -> bool:
        return re.fullmatch(self.written, text) is not None


def known_words(folder: Path) -> frozenset[str] | None:
    """The words of a checkpoint's tokenizer; None where it has another kind, or none."""
    try:
        table = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        pieces = [str(piece) for piece, _ in table["vocab"]] if table["type"] == "Unigram" else []
    except (OSError, ValueError, KeyError, TypeError):
        return None
    rest = [piece for piece in pieces if not piece.startswith((_START, "<"))]
    words = frozenset(piece[1:] for piece in pieces if piece.startswith(_START) and len(piece) > 1)
    return words if words and max(map(len, rest), default=0) <= _LONGEST_REST else None


def _words(text: str) -> Iterator[str]:
    for word in text.split():
        bare = word.strip(string.punctuation + "“”„«»‘’…–—")
        if bare:
            yield bare


def _normalized(word: str) -> str:
    """Without case and accents, as the tokenizers of small releases read."""
    letters = unicodedata.normalize("NFKD", word.lower())
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def _shown(text: str) -> str:
    return json.dumps(
        text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…", ensure_ascii=False
    )
