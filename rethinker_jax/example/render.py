"""Pictures of the embedded example, as PNG bytes. Pure numpy.

A cell is 28x28 px, which is one merged visual token (patch 14, merge 2). The background is mid-grey because a white one
becomes, after normalisation, a large constant in every patch that a small model first has to unlearn.
"""

import functools
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

CELL = 28
JITTER = 1  # px, each way, of a symbol within its cell
BACKGROUND = 128
NOISE_SIGMA = 0.08 * 255
NOISE_STEP = 12  # the noise is rounded to multiples of this: a third of the bytes on disk, no less noisy

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (235, 25, 25),
    "green": (20, 215, 50),
    "blue": (35, 50, 245),
    "yellow": (250, 235, 20),
}
SHAPES = ("circle", "square", "triangle")
BAR_NAMES = ("A", "B", "C")
MAX_BAR = 9
UNIT = 7  # px of bar per unit of height; the last pixel row of a unit stays empty so that units can be counted

# Seven rows of five pixels each, top to bottom.
FONT = {
    "0": ".###. #...# #...# #...# #...# #...# .###.",
    "1": "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    "2": ".###. #...# ....# ...#. ..#.. .#... #####",
    "3": "####. ....# ....# .###. ....# ....# ####.",
    "4": "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": ".###. #.... #.... ####. #...# #...# .###.",
    "7": "##### ....# ...#. ..#.. ..#.. ..#.. ..#..",
    "8": ".###. #...# #...# .###. #...# #...# .###.",
    "9": ".###. #...# #...# .#### ....# ....# .###.",
    "A": ".###. #...# #...# ##### #...# #...# #...#",
    "B": "####. #...# #...# ####. #...# #...# ####.",
    "C": ".###. #...# #.... #.... #.... #...# .###.",
}

Cell = tuple[str, str] | None  # (colour, digit or shape), or nothing there


@functools.cache
def _glyph(name: str, scale: int) -> np.ndarray:
    """bool [7 * scale, 5 * scale]."""
    rows = [[pixel == "#" for pixel in row] for row in FONT[name].split()]
    return np.kron(np.array(rows), np.ones((scale, scale))).astype(bool)


def _shape(name: str, size: int = 21) -> np.ndarray:
    """bool [size, size]."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    if name == "square":
        return (abs(x) <= 8.5) & (abs(y) <= 8.5)
    if name == "circle":
        return x**2 + y**2 <= 10.0**2
    return (abs(x) <= (y + size / 2) / 2) & (y <= size / 2)


@functools.cache
def _symbols() -> Mapping[str, np.ndarray]:
    """What can stand in a cell, as masks of at most 21 px a side."""
    return {name: _glyph(name, 3) for name in "0123456789"} | {name: _shape(name) for name in SHAPES}


@functools.cache
def _noise_bank() -> np.ndarray:
    """int16 [256, 256, 3]; a picture takes a random window of it, which is several times faster than fresh normals."""
    noise = np.random.default_rng(20_25).normal(0.0, NOISE_SIGMA, (256, 256, 3))
    return (np.round(noise / NOISE_STEP) * NOISE_STEP).astype(np.int16)


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 [height, width, 3] → PNG. Unfiltered rows, Huffman coding alone: noise has no repeats worth a search.

    A third of the time of a general encoder, and the bytes do not depend on the version of one.
    """
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row begins with its filter type, 0
    rows[:, 1:] = pixels.reshape(height, 3 * width)
    packer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits a channel, RGB, not interlaced
    chunks = ((b"IHDR", header), (b"IDAT", packer.compress(rows.tobytes()) + packer.flush()), (b"IEND", b""))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in chunks:
        parts.append(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    return b"".join(parts)


def _add_noise(clean: np.ndarray, rng: np.random.Generator, contrast: float) -> np.ndarray:
    """uint8 [height, width, 3] → the same, faded to `contrast`, with a random window of the noise bank on it."""
    height, width, _ = clean.shape
    bank = _noise_bank()
    top, left = rng.integers(0, bank.shape[0] - height), rng.integers(0, bank.shape[1] - width)
    faded = clean.astype(np.int16) if contrast == 1 else np.int16(BACKGROUND + contrast * (clean - float(BACKGROUND)))
    noisy = faded + bank[top : top + height, left : left + width]
    return noisy.clip(0, 255).astype(np.uint8)


def grid_picture(cells: Sequence[Sequence[Cell]], rng: np.random.Generator, contrast: float = 1.0) -> bytes:
    """Rows of cells → PNG of 28 px a cell, each symbol centred up to the jitter."""
    num_rows, num_columns = len(cells), len(cells[0])
    canvas = np.full((num_rows * CELL, num_columns * CELL, 3), BACKGROUND, np.uint8)
    shifts = rng.integers(-JITTER, JITTER + 1, (num_rows, num_columns, 2))
    for row, line in enumerate(cells):
        for column, cell in enumerate(line):
            if cell is None:
                continue
            colour, name = cell
            mask = _symbols()[name]
            height, width = mask.shape
            top = row * CELL + (CELL - height) // 2 + shifts[row, column, 0]
            left = column * CELL + (CELL - width) // 2 + shifts[row, column, 1]
            canvas[top : top + height, left : left + width][mask] = COLOURS[colour]
    return encode_png(_add_noise(canvas, rng, contrast))


def bar_picture(
    colours: Sequence[str], heights: Sequence[int], rng: np.random.Generator, contrast: float = 1.0
) -> bytes:
    """Three bars of 1-9 stacked units over their letters → PNG of 84x84 px."""
    size = 3 * CELL
    floor = size - 2 * UNIT - 4  # px row under the lowest unit; the letters stand below it
    canvas = np.full((size, size, 3), BACKGROUND, np.uint8)
    for place, (name, colour, height) in enumerate(zip(BAR_NAMES, colours, heights, strict=True)):
        left = place * CELL + 6 + int(rng.integers(-JITTER, JITTER + 1))
        for unit in range(height):
            top = floor - (unit + 1) * UNIT
            canvas[top + 1 : top + UNIT, left : left + 16] = COLOURS[colour]
        letter = _glyph(name, 2)
        canvas[floor + 2 : floor + 16, left + 3 : left + 13][letter] = 255
    return encode_png(_add_noise(canvas, rng, contrast))
