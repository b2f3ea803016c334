"""From a prompt to the text that each encoder reads.

UL2 and MetaCLIP read the whole prompt with the frame rate in front; ByT5 reads only what is quoted,
the words to be seen in the video (Movie Gen, section 3.1.3).
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from kinoflow.configs.errors import UserError

_FPS_DECIMALS = 3

# One alternative a kind of quote. A mark next to a letter is an apostrophe or an inch mark: it opens
# nothing, and between two letters it closes nothing either.
_QUOTED = re.compile(
    r"""
      (?<!\w)(?:["“]|”(?=\w))(?P<double>[^"“”]*)["”]
    | „(?P<low>[^"“”„]*)["“”]
    | ‚(?P<low_single>[^‘’‚]*)[‘’]
    | «(?P<angle>[^«»]*)»
    | (?<!\w)»(?=\S)(?P<inward>[^«»]*)(?<=\S)«(?!\w)
    | 「(?P<corner>[^「」]*)」
    | (?<!\w)‘(?P<curly>(?:[^‘’]|’(?=\w))*)’(?!\w)
    | (?<!\w)'(?=\S)(?P<single>(?:[^']|'(?=\w))+)(?<=\S)'(?!\w)
    """,
    re.VERBOSE,
)


@dataclass(frozen=True, kw_only=True)
class PromptTexts:
    """The text for each encoder; all empty for the null prompt."""

    ul2: str
    byt5: str
    metaclip: str


def format_fps(fps: Fraction) -> str:
    """The rate as prompts write it: "16", "12.5", "29.97" for 30000/1001, "23.976" for 24000/1001.

    Raises:
        UserError: when the rate is not positive, or rounds to zero at three decimals.
    """
    text = f"{float(fps):.{_FPS_DECIMALS}f}".rstrip("0").rstrip(".")
    if fps <= 0 or text == "0":
        raise UserError(f"fps: {fps} is not a frame rate; use a positive number such as 16 or 30000/1001")
    return text


def fps_prefix(prompt: str, fps: Fraction) -> str:
    """Write the frame rate in front, "FPS-16 a red star", as in training (Movie Gen, section 3.2.1)."""
    return f"FPS-{format_fps(fps)} {prompt.strip()}"


def quoted_text(prompt: str) -> list[str]:
    """The strings in quotes, in order, without their marks; [] when nothing is quoted.

    Knows "…", “…”, ”…”, „…“, «…», »…«, ‘…’, ‚…‘, 「…」 and '…'. A mark without its partner
    quotes nothing, an apostrophe in or after a word opens nothing, and inside a quotation other kinds of mark
    are plain text.
    """
    found = (match[match.lastgroup or 0].strip() for match in _QUOTED.finditer(prompt))
    return [text for text in found if text]


def without_quoted(prompt: str) -> str:
    """The prompt with a space in the place of each quotation."""
    return _QUOTED.sub(" ", prompt)


def is_null(prompt: str) -> bool:
    """Whether the prompt is the null prompt of classifier-free guidance: nothing but white space."""
    return not prompt.strip()


def prepare(prompt: str, fps: Fraction) -> PromptTexts:
    """The texts of one prompt at a frame rate (frames per second).

    The null prompt has no frame rate: it must be the same point whatever it guides. Length is no matter
    here: each tokenizer has its own limit, and the encoder tells what it cut.

    Raises:
        UserError: when the prompt is not valid Unicode, or the frame rate not positive.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"prompt: character {error.start + 1} is not valid text; write the prompt in UTF-8"
        ) from error
    if is_null(prompt):
        return PromptTexts(ul2="", byt5="", metaclip="")
    prefixed = fps_prefix(prompt, fps)
    return PromptTexts(ul2=prefixed, byt5=" ".join(quoted_text(prompt)), metaclip=prefixed)
