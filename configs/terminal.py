"""What a person at a terminal sees while a command works: one kind of progress bar, one kind of warning."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeVar

from kinoflow.configs.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

T = TypeVar("T")


def progress_bar(
    *, quiet: bool = False, figures: bool = False, below: Callable[[], Iterable[RenderableType]] = tuple
) -> Progress:
    """A bar on stderr, gone when it is done; hidden when `quiet`, and where a terminal does not show it.

    With `figures` each task has a field of that name, text behind the bar. What `below` gives stands under
    the bars.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    class Bars(Progress):
        def get_renderables(self) -> Iterable[RenderableType]:
            yield from super().get_renderables()
            yield from below()

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    if figures:
        columns.append(TextColumn("{task.fields[figures]}"))
    console = Console(stderr=True)
    # Without a terminal a bar would leave stray lines.
    return Bars(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)


def print_json(figures: Mapping[str, Any]) -> None:
    """One JSON object on a line of its own, in ASCII: any terminal and any script can take it."""
    print(json.dumps(figures))


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Our own warnings as one line each on stderr; those of libraries stay silent."""

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if category.__module__.partition(".")[0] == "kinoflow":
            print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


def argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A parser of words as argparse wants it: what it says of a mistake is what the user reads."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def parse_rate(text: str) -> Fraction:
    """Frames a second, such as "16" or "24000/1001".

    Raises:
        UserError: no number above 0.
    """
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{text!r} is not a frame rate; write 16 or 24000/1001") from None
    if rate <= 0:
        raise UserError(f"{text!r}: use a rate above 0")
    return rate
