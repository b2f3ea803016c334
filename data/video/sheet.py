"""Contact sheets: a few frames of several clips on one PNG."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.configs.files import replacing

_GAP = 4
_FONT_SIZE = 12
_INK, _PAPER = (20, 20, 20), (255, 255, 255)


def contact_sheet(
    path: str | os.PathLike[str],
    clips: Sequence[UInt8[np.ndarray, "_ _ _ 3"]],
    *,
    columns: int,
    captions: Sequence[str] | None = None,
    info: PngInfo | None = None,
) -> None:
    """Write a PNG with one row per clip: `columns` evenly spaced frames, first and last among them.

    A clip with fewer frames than columns leaves the rest of its row blank. Captions stand above their row;
    `info` goes into the file.

    Raises:
        UserError: nothing to show, captions that do not match, or a file that cannot be written.
    """
    path = Path(path)
    if not clips or columns < 1:
        raise UserError(f"{path}: nothing to show; give at least one clip and one column")
    if captions is not None and len(captions) != len(clips):
        raise UserError(f"captions: {len(captions)} for {len(clips)} clips; give one for each clip")
    rows = [_row(np.asarray(clip), columns) for clip in clips]
    width = max(row.width for row in rows)
    texts = [_wrapped(text, width) for text in captions] if captions is not None else [""] * len(rows)
    sheet = _stacked(rows, texts, width)
    try:
        with replacing(path) as aside:
            sheet.save(aside, format="PNG", pnginfo=info)
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error


def _row(clip: np.ndarray, columns: int) -> Image.Image:
    frames, height, width, _ = clip.shape
    chosen = np.unique(np.linspace(0, frames - 1, min(columns, frames)).round().astype(int))
    row = Image.new("RGB", (columns * (width + _GAP) - _GAP, height), _PAPER)
    for column, index in enumerate(chosen):
        row.paste(Image.fromarray(np.ascontiguousarray(clip[index])), (column * (width + _GAP), 0))
    return row


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=_FONT_SIZE)


def _wrapped(text: str, width: int) -> str:
    font, lines = _font(), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _stacked(rows: Sequence[Image.Image], texts: Sequence[str], width: int) -> Image.Image:
    line = _FONT_SIZE + _GAP
    heads = [line * (text.count("\n") + 1) if text else 0 for text in texts]
    height = sum(row.height + head + _GAP for row, head in zip(rows, heads, strict=True)) - _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw, top = ImageDraw.Draw(sheet), 0
    for row, head, text in zip(rows, heads, texts, strict=True):
        draw.multiline_text((0, top), text, fill=_INK, font=_font(), spacing=_GAP)
        sheet.paste(row, (0, top + head))
        top += row.height + head + _GAP
    return sheet
