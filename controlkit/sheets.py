"""Contact sheets: labelled grids of pictures, for eyes."""

import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from controlkit.images import resize

Cell = tuple[np.ndarray, str | Sequence[str]]
"""A picture, uint8 (H, W, 3), and its label, or the lines of it; "" for none."""

_PAPER, _INK, _FRAME = (255, 255, 255), (32, 33, 36), (218, 220, 224)
_GAP = 16
_ALIKE = {  # letters that are no others with marks, in those of Pillow's own font
    "ß": "ss",
    "æ": "ae",
    "Æ": "AE",
    "œ": "oe",
    "Œ": "OE",
    "þ": "th",
    "Þ": "Th",
    **dict(zip("øØłŁđĐðÐı×–—−‚", "oOlLdDdDix---,", strict=True)),
}


def contact_sheet(rows: Sequence[Sequence[Cell]], *, title: str = "", cell: int = 256) -> np.ndarray:
    """Return a labelled grid of pictures as one picture, uint8 (H, W, 3).

    Every picture is fitted into a square of ``cell`` pixels with its aspect kept: small ones are enlarged by
    whole factors without interpolation (pixels stay square and crisp), large ones are averaged down. Labels
    stand below the pictures, each of their lines shortened where it does not fit; rows may differ in length.
    Letters that Pillow's own font lacks are written without their marks (é as e), or else as "?".

    Raises:
        ValueError: there is no picture at all, or ``cell`` is below 16.
    """
    if cell < 16:
        raise ValueError(f"a contact sheet's cell of {cell} pixels is too small; at least 16")
    columns = max((len(row) for row in rows), default=0)
    if columns == 0:
        raise ValueError("a contact sheet needs at least one picture")
    font_size = max(11, cell // 17)
    width = _GAP + columns * (cell + _GAP)
    bands = [_title(title, width=width, font_size=round(font_size * 1.5))] if title else []
    bands += [_row(row, width=width, cell=cell, font_size=font_size) for row in rows]
    return np.concatenate([*bands, _paper(width, _GAP)])


def _title(title: str, *, width: int, font_size: int) -> np.ndarray:
    font = ImageFont.load_default(font_size)
    band = Image.fromarray(_paper(width, _GAP + font_size + _GAP // 4))
    text = _shorten(title, font, width - 2 * _GAP)
    ImageDraw.Draw(band).text((_GAP, band.height), text, fill=_INK, font=font, anchor="ld")
    return np.array(band)


def _row(row: Sequence[Cell], *, width: int, cell: int, font_size: int) -> np.ndarray:
    font = ImageFont.load_default(font_size)
    line_height = round(font_size * 1.6)
    lines = max(len(_lines(label)) for _, label in row)
    band = Image.fromarray(_paper(width, _GAP + cell + lines * line_height))
    draw = ImageDraw.Draw(band)
    for column, (picture, label) in enumerate(row):
        left = _GAP + column * (cell + _GAP)
        shown = Image.fromarray(fitted(picture, cell))
        x, y = left + (cell - shown.width) // 2, _GAP + (cell - shown.height) // 2
        draw.rectangle((x - 1, y - 1, x + shown.width, y + shown.height), outline=_FRAME)
        band.paste(shown, (x, y))
        for number, line in enumerate(_lines(label)):
            middle = (left + cell / 2, _GAP + cell + (number + 0.6) * line_height)
            draw.text(middle, _shorten(line, font, cell), fill=_INK, font=font, anchor="mm")
    return np.array(band)


def _lines(label: str | Sequence[str]) -> Sequence[str]:
    return ([label] if label else []) if isinstance(label, str) else label


def _paper(width: int, height: int) -> np.ndarray:
    return np.full((height, width, 3), _PAPER, np.uint8)


def fitted(picture: np.ndarray, cell: int) -> np.ndarray:
    """Scale a picture to fit into a square: up by a whole factor, or down by averaging."""
    height, width = picture.shape[:2]
    factor = cell // max(height, width)
    if factor >= 1:
        return picture.repeat(factor, axis=0).repeat(factor, axis=1)
    shrink = cell / max(height, width)
    return resize(picture, max(1, round(width * shrink)), max(1, round(height * shrink)))


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Cut ``text``, with an ellipsis, to at most ``width`` pixels; line ends become blanks."""
    text = "".join(map(_writable, unicodedata.normalize("NFC", " ".join(text.split()))))
    if len(text) <= width and font.getlength(text) <= width:
        return text

    def is_too_long(count: int) -> bool:
        return font.getlength(f"{text[: count + 1]}...") > width

    # By halving, of no more letters than pixels: a prompt may be long, and a grid's sheet is drawn often.
    count = bisect_left(range(min(len(text), width)), True, key=is_too_long)
    return text[:count].rstrip() + "..."


@cache
def _writable(letter: str) -> str:
    """A letter, or what stands for one that the font lacks, which would be drawn as a box."""
    if letter.isascii() or _is_drawn(letter):
        return letter
    parts = unicodedata.normalize("NFKD", _ALIKE.get(letter, letter))
    # marks, joiners and variants of a letter add nothing to what stands for it
    kept = [part for part in parts if unicodedata.category(part) not in ("Mn", "Me", "Cf")]
    return "".join(part if part.isascii() or _is_drawn(part) else "?" for part in kept)


def _is_drawn(letter: str) -> bool:
    font = ImageFont.load_default(16)
    return bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))  # a letter that no font has
