"""A 5x7 bitmap font and the written words of the world."""

import numpy as np
from jaxtyping import Bool

WORDS = (
    "KITE", "MOON", "SUN", "CAT", "DOG", "FOX", "BEE", "OWL", "TREE", "LEAF", "RAIN", "SNOW",
    "WIND", "FIRE", "LAKE", "SEA", "SHIP", "BOAT", "CAR", "BUS", "TRAM", "BIKE", "ROAD", "PARK",
    "SHOP", "CAFE", "HOME", "DOOR", "LAMP", "BOOK", "PEN", "INK", "MAP", "TEA", "MILK", "EGG",
    "PIE", "JAM", "CAKE", "OPEN", "STOP", "EXIT", "PLAY", "HOPE", "ZOO", "QUIZ", "JAZZ", "VASE",
)  # fmt: skip

# Seven rows of five bits per letter, two hexadecimal digits a row, top row first.
_GLYPHS = {
    "A": "0E11111F111111", "B": "1E11111E11111E", "C": "0E11101010110E", "D": "1E11111111111E",
    "E": "1F10101E10101F", "F": "1F10101E101010", "G": "0E11101711110F", "H": "1111111F111111",
    "I": "0E04040404040E", "J": "0702020202120C", "K": "11121418141211", "L": "1010101010101F",
    "M": "111B1515111111", "N": "11111915131111", "O": "0E11111111110E", "P": "1E11111E101010",
    "Q": "0E11111115120D", "R": "1E11111E141211", "S": "0F10100E01011E", "T": "1F040404040404",
    "U": "1111111111110E", "V": "11111111110A04", "W": "1111111515150A", "X": "11110A040A1111",
    "Y": "1111110A040404", "Z": "1F01020408101F",
}  # fmt: skip
GLYPH_HEIGHT = 7
GLYPH_WIDTH = 5


def word_bitmap(word: str) -> Bool[np.ndarray, "7 columns"]:
    """The word as cells, True where ink is; letters one column apart: 6 columns a letter, less one.

    Raises KeyError for a character outside A-Z.
    """
    bitmap = np.zeros((GLYPH_HEIGHT, (GLYPH_WIDTH + 1) * len(word) - 1), dtype=bool)
    for position, letter in enumerate(word):
        rows = bytes.fromhex(_GLYPHS[letter])
        left = position * (GLYPH_WIDTH + 1)
        for y, row in enumerate(rows):
            for x in range(GLYPH_WIDTH):
                bitmap[y, left + x] = bool(row >> (GLYPH_WIDTH - 1 - x) & 1)
    return bitmap
