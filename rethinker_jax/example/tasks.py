"""Problems of the embedded example: a function of (seed, index, part) and nothing else.

The parts train, validation and test are told apart by what a problem shows (its digits, shapes or heights, whatever
the colours of the digits and bars, the noise and the question), so nothing that is tested was ever trained on, not even
among the thousand possible text problems.
"""

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from rethinker_jax.errors import UserError
from rethinker_jax.example.render import BAR_NAMES, COLOURS, MAX_BAR, SHAPES, Cell, bar_picture, grid_picture
from rethinker_jax.example.solutions import Task, describe, work
from rethinker_jax.types import Problem

KINDS = ("sum", "count", "tallest", "pair", "text")
# Kinds by index: every 20 consecutive problems hold each kind in its share (40, 25, 15, 10 and 10 %).
KIND_CYCLE = tuple(KINDS[place] for place in (0, 1, 0, 2, 0, 1, 3, 0, 4, 1, 0, 2, 0, 1, 0, 4, 3, 0, 1, 2))
PARTS: Mapping[str, range] = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}  # tenths


@dataclasses.dataclass(frozen=True)
class Member:
    """Another mixture of the family: kinds by index as in `KIND_CYCLE`, and the contrast of its pictures."""

    kinds: tuple[str, ...] = KIND_CYCLE
    contrast: float = 1.0


# Members that no model was ever taught. `faint` has the pictures of the family at half their contrast, under the same
# noise. `long` asks for five or six digits where "pair" asks for four. In `steep` nearly all prompts ask for nine,
# which the warm start never adds up, and one in ten is of a kind that it was taught.
SHIPPED = Member()
MEMBERS: Mapping[str, Member] = {
    "faint": Member(contrast=0.5),
    "long": Member(("add5", "add6")),
    "steep": Member(("sum", *("add9",) * 9, "count", *("add9",) * 9)),
}

COUNT_EMPTY, COUNT_ASKED = 0.25, 0.35  # odds that a cell is empty, or of the colour asked for


@dataclasses.dataclass(frozen=True)
class _Scene:
    """A problem before it is drawn. `shown` decides the part; `grids` are pictures of cells, `bars` colours of bars."""

    question: str
    numbers: tuple[int, ...]
    shown: tuple[object, ...]
    grids: tuple[tuple[tuple[Cell, ...], ...], ...] = ()
    bars: tuple[str, ...] = ()


def _colours(rng: np.random.Generator, count: int) -> list[str]:
    names = tuple(COLOURS)
    return [names[place] for place in rng.integers(len(names), size=count)]


def _digit_cells(rng: np.random.Generator, digits: list[int]) -> list[Cell]:
    return [(colour, str(digit)) for colour, digit in zip(_colours(rng, len(digits)), digits, strict=True)]


def _rows(cells: list[Cell], width: int) -> tuple[tuple[Cell, ...], ...]:
    return tuple(tuple(cells[start : start + width]) for start in range(0, len(cells), width))


def _sum_scene(rng: np.random.Generator) -> _Scene:
    digits = rng.integers(10, size=9).tolist()
    line, down = int(rng.integers(3)), bool(rng.integers(2))
    numbers = digits[line::3] if down else digits[3 * line : 3 * line + 3]
    question = f"sum {'column' if down else 'row'} {line + 1}?"
    return _Scene(question, tuple(numbers), tuple(digits), (_rows(_digit_cells(rng, digits), 3),))


def _count_scene(rng: np.random.Generator) -> _Scene:
    names = list(COLOURS)
    asked = names.pop(int(rng.integers(len(names))))
    cells: list[Cell] = []
    for fate, other, shape in zip(
        rng.random(9), rng.integers(len(names), size=9), rng.integers(3, size=9), strict=True
    ):
        colour = asked if fate < COUNT_EMPTY + COUNT_ASKED else names[other]
        cells.append(None if fate < COUNT_EMPTY else (colour, SHAPES[shape]))
    flags = tuple(int(cell is not None and cell[0] == asked) for cell in cells)
    return _Scene(f"count {asked}?", flags, tuple(cells), (_rows(cells, 3),))


def _tallest_scene(rng: np.random.Generator) -> _Scene:
    heights = tuple((rng.permutation(MAX_BAR)[:3] + 1).tolist())
    return _Scene("tallest bar?", heights, heights, bars=tuple(_colours(rng, 3)))


def _adding_scene(rng: np.random.Generator, pictures: Sequence[tuple[int, int]]) -> _Scene:
    """All digits of several pictures, (rows, columns) each."""
    sizes = [rows * columns for rows, columns in pictures]
    digits = rng.integers(10, size=sum(sizes)).tolist()
    cells = iter(_digit_cells(rng, digits))
    grids = [_rows([next(cells) for _ in range(rows * columns)], columns) for rows, columns in pictures]
    return _Scene("add all digits?", tuple(digits), tuple(digits), tuple(grids))


def _text_scene(rng: np.random.Generator) -> _Scene:
    digits = tuple(rng.integers(10, size=3).tolist())
    return _Scene(f"add {digits[0]} {digits[1]} {digits[2]}?", digits, digits)


_SCENES = {
    "sum": _sum_scene,
    "count": _count_scene,
    "tallest": _tallest_scene,
    "pair": functools.partial(_adding_scene, pictures=((1, 2), (1, 2))),
    "text": _text_scene,
    "add5": functools.partial(_adding_scene, pictures=((1, 3), (1, 2))),
    "add6": functools.partial(_adding_scene, pictures=((1, 3), (1, 3))),
    "add9": functools.partial(_adding_scene, pictures=((3, 3),)),
}


def _tenth(kind: str, scene: _Scene) -> int:
    return zlib.crc32(f"{kind} {scene.shown}".encode()) % 10


def _caption(scene: _Scene) -> str:
    if scene.bars:
        bars = zip(BAR_NAMES, scene.bars, scene.numbers, strict=True)
        return " ".join(f"{name} {colour}{height}" for name, colour, height in bars)
    return describe([cell for grid in scene.grids for row in grid for cell in row])


def cell_names(grid: tuple[tuple[Cell, ...], ...]) -> tuple[str, ...]:
    """The colours of the cells in reading order, "no" where there is none."""
    return tuple("no" if cell is None else cell[0] for row in grid for cell in row)


def make_task(seed: int, index: int, part: str = "train", member: Member = SHIPPED) -> Task:
    """The index-th task of a seed, from one part of all there is (`PARTS`). About 0.3 ms.

    Raises UserError for an unknown part.
    """
    if part not in PARTS:
        raise UserError(f"the example has the parts {', '.join(PARTS)}, not {part!r}")
    rng = np.random.default_rng([seed, index])
    kind = member.kinds[index % len(member.kinds)]
    scene = _SCENES[kind](rng)
    while _tenth(kind, scene) not in PARTS[part]:
        scene = _SCENES[kind](rng)
    images = [grid_picture(grid, rng, member.contrast) for grid in scene.grids]
    if scene.bars:
        images.append(bar_picture(scene.bars, scene.numbers, rng, member.contrast))
    names = cell_names(scene.grids[0]) if kind == "count" else ()
    working, answer = work(kind, scene.numbers, names=names)
    choices = BAR_NAMES if kind == "tallest" else ()
    problem = Problem(
        id=f"{kind}-{seed}-{index}",
        question="<image>" * len(images) + scene.question,
        answer=answer,
        images=tuple(images),
        choices=choices,
        type="mcq" if choices else "number",
        source=kind,
    )
    return Task(problem, kind, working, scene.numbers, _caption(scene), names)


def make_tasks(seed: int, count: int, part: str = "train", member: Member = SHIPPED) -> list[Task]:
    return [make_task(seed, index, part, member) for index in range(count)]
