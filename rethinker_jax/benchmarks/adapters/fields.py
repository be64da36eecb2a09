"""What the adapters share: reading fields of untrusted rows, lists written as text, and images in their places."""

import ast
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rethinker_jax.benchmarks.items import Item
from rethinker_jax.benchmarks.media import Media
from rethinker_jax.benchmarks.wording import LETTERS
from rethinker_jax.prompts.rows import BadField
from rethinker_jax.prompts.template import IMAGE_TAG
from rethinker_jax.types import Problem

Row = Mapping[str, Any]
Image = bytes | str

MAX_LITERAL_CHARS = 50_000
MAX_LITERAL_NESTING = 12
# `<image 1>` (MMMU), `<image_1>` (EMMA), `<image1>` (MathVision), `<image>` (MEGA-Bench).
MARKER = re.compile(r"<image[ _]?(\d{0,3})>")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a row stands: its benchmark, the dataset's config, the id it gets if it has none, and its media."""

    benchmark: str
    config: str
    row_id: str
    media: Media


Reader = Callable[[Row, Place], list[Item]]


def text_of(row: Row, name: str, default: str | None = None) -> str:
    """A field as text, numbers written out. Raises BadField where it is missing or empty and has no default."""
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        if default is None:
            raise BadField(f"empty_{name}", f"the {name} is empty")
        return default
    if not isinstance(value, str):
        raise BadField(f"bad_{name}", f"wanted text as {name}, found {type(value).__name__}")
    return value


def literal(text: str, name: str) -> Any:
    """The Python literal that a field holds as text: read, never run, within bounds of length and nesting."""
    if len(text) > MAX_LITERAL_CHARS:
        raise BadField(f"bad_{name}", f"the {name} has {len(text)} characters, more than {MAX_LITERAL_CHARS}")
    depth = deepest = 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAX_LITERAL_NESTING:
        raise BadField(f"bad_{name}", f"the {name} nests brackets {deepest} deep")
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise BadField(f"bad_{name}", f"the {name} is no Python literal: {text[:80]!r}") from error


def list_of(value: Any, name: str) -> list[Any]:
    """A list that may be written as text ("['a', 'b']"); nothing at all is an empty list. Raises BadField."""
    if isinstance(value, str):
        value = literal(value, name) if value.strip() else []
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise BadField(f"bad_{name}", f"wanted a list as {name}, found {type(value).__name__}")
    return list(value)


def options_of(row: Row, name: str = "options") -> tuple[str, ...]:
    """The texts of the options; at most 26. Raises BadField."""
    options = list_of(row.get(name), name)
    if len(options) > len(LETTERS) or not all(isinstance(option, str | int | float) for option in options):
        raise BadField(f"bad_{name}", f"wanted at most {len(LETTERS)} texts as {name}, found {str(options)[:80]}")
    return tuple(str(option) for option in options)


def letter_gold(answer: str, options: Sequence[str]) -> str:
    """An answer that is a letter (or several: `A;C`), checked against the options. Raises BadField."""
    letters = [part.strip().strip("().").upper() for part in re.split(r"[;,]", answer) if part.strip()]
    last = LETTERS[: len(options)] if options else LETTERS
    if not letters or not all(len(letter) == 1 and letter in last for letter in letters):
        raise BadField("not_an_option", f"the answer {answer[:40]!r} is no letter of {len(options)} options")
    return ", ".join(letters)


def text_gold(answer: str, options: Sequence[str]) -> str:
    """The letter of the option whose text the answer is. Raises BadField."""
    for place, option in enumerate(options):
        if option.strip() == answer.strip():
            return LETTERS[place]
    raise BadField("not_an_option", f"the answer {answer[:40]!r} is none of the {len(options)} choices")


def place_images(
    texts: Sequence[str], images: Mapping[int, Image], *, always: bool = False
) -> tuple[tuple[str, ...], tuple[Image, ...]]:
    """Numbered markers in texts that follow each other → `<image>` tags, and the images in the order of their tags.

    A marker without a number takes the next image that no other names. An image that is named again, or that is not
    there, is named in words: there is one tag an image. Images that nothing names get their tags in front of the first
    text, or, where no text names any and not `always`, no tags at all (then all stand in front anyway).
    """
    named = {int(number) for text in texts for number in MARKER.findall(text) if number}
    unnamed = [number for number in sorted(images) if number not in named]
    bare = sum(1 for text in texts for number in MARKER.findall(text) if not number)
    waiting, front = unnamed[:bare], unnamed[bare:]
    shown = list(front)

    def tag(match: re.Match[str]) -> str:
        number = int(match.group(1)) if match.group(1) else (waiting.pop(0) if waiting else 0)
        if number in images and number not in shown:
            shown.append(number)
            return IMAGE_TAG
        return f"image {shown.index(number) + 1}" if number in shown else f"image {match.group(1)}".strip()

    placed = [MARKER.sub(tag, text) for text in texts]
    order = tuple(images[number] for number in shown)
    if len(shown) > len(front) or (always and front):
        placed[0] = IMAGE_TAG * len(front) + ("\n" if front and placed[0] else "") + placed[0]
    return tuple(placed), order


def unmarked(text: str) -> str:
    """Text whose markers are words: for options that stand in the picture itself."""
    return MARKER.sub(lambda match: f"image {match.group(1)}".strip(), text)


def numbered_images(row: Row, place: Place, prefix: str = "image_", most: int = 9) -> dict[int, Image]:
    """The images of the columns image_1, image_2, ... that are there, by number. Raises BadField."""
    found = {number: place.media.image(row.get(f"{prefix}{number}")) for number in range(1, most + 1)}
    return {number: image for number, image in found.items() if image is not None}


def make_problem(
    row: Row, place: Place, *, id: str, question: str, answer: str, images: Sequence[Image],
    choices: tuple[str, ...] = (), type: str = "auto",
) -> Problem:  # fmt: skip
    """The problem of a row; `Problem.row` keeps its columns of text and numbers."""
    kept = {name: value for name, value in row.items() if not _holds_bytes(value)}
    return Problem(id, question, answer, tuple(images), choices, type, place.benchmark, kept)


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_bytes(one) for one in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_bytes(one) for one in value)
    return isinstance(value, bytes)


def categories_of(row: Row, names: Mapping[str, str]) -> dict[str, str]:
    """dimension → value for the columns that say something: {"task": "task"} reads row["task"]."""
    found = {dimension: row.get(column) for dimension, column in names.items()}
    return {dimension: str(value).strip() for dimension, value in found.items() if value not in (None, "", [])}
