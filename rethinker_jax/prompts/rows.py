"""One row of a dataset → a problem, under any of the layouts that are read as they are."""

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rethinker_jax.errors import UserError
from rethinker_jax.prompts.template import IMAGE_TAG
from rethinker_jax.types import Problem

REQUIRED = ("question", "answer")
# Field → column names, the first one present wins. ViRL39K has qid and image, EasyR1's Geometry3K problem and images.
ALIASES: dict[str, tuple[str, ...]] = {
    "id": ("id", "qid", "problem_id", "question_id", "uid"),
    "question": ("question", "problem", "query"),
    "answer": ("answer", "gt_answer", "ground_truth", "final_answer"),
    "images": ("images", "image", "image_path"),
    "choices": ("choices", "options"),
    "type": ("type", "answer_type"),
    "source": ("source", "data_source", "category"),
}
VIDEO_COLUMNS = ("videos", "video")


class BadField(Exception):
    """A value that makes its row unusable; `kind` is counted, `why` is shown."""

    def __init__(self, kind: str, why: str):
        super().__init__(why)
        self.kind = kind
        self.why = why


@dataclasses.dataclass(frozen=True)
class Columns:
    """Field → column of one source; optional fields may be missing. `id` missing means rows are numbered."""

    of: Mapping[str, str]

    def value(self, row: Mapping[str, Any], field: str) -> Any:
        return row.get(self.of[field]) if field in self.of else None


def match_columns(
    found: Iterable[str], chosen: Mapping[str, str], where: str, required: Iterable[str] = REQUIRED
) -> Columns:
    """Which column holds which field: the one `chosen` names, else the first alias present.

    Raises UserError for chosen fields or columns that do not exist and for required fields without a column.
    """
    names = list(dict.fromkeys(found))
    for field, column in chosen.items():
        if field not in ALIASES:
            raise UserError(
                f"unknown field {field!r} in the column names; fields are {', '.join(ALIASES)}{_near(field)}"
            )
        if column not in names:
            raise UserError(
                f"{where} has no column {column!r} for the field {field!r}; it has {', '.join(names)}"
                f"{_near(column, names)}"
            )
    of = dict(chosen)
    for field, aliases in ALIASES.items():
        column = next((alias for alias in aliases if alias in names), None)
        if field not in of and column is not None:
            of[field] = column
    missing = [field for field in required if field not in of]
    if missing:
        asked = "; ".join(f"{field} (or {', '.join(ALIASES[field][1:])})" for field in missing)
        near = "".join(_near(alias, names) for field in missing for alias in ALIASES[field][:1])
        raise UserError(f"{where} lacks the column {asked}; it has {', '.join(names) or 'no columns'}{near}")
    return Columns(of)


def _near(name: str, known: Iterable[str] = tuple(ALIASES)) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def read_row(
    row: Mapping[str, Any],
    columns: Columns,
    *,
    where: str,
    row_id: str,
    image_root: str | None,
    required: Iterable[str] = REQUIRED,
) -> Problem:
    """The problem in a row; its answer is "" where none is required.

    `row_id` names it where the source has no id column; `image_root` is a resolved folder.

    `Problem.row` is the row without its image column, whose content is in `Problem.images`. Raises BadField for a row
    to be counted and left out, UserError for one with videos.
    """
    for name in VIDEO_COLUMNS:
        if row.get(name):
            raise UserError(
                f"{where} has videos (column {name!r}), and videos cannot be decoded yet: remove these rows, or give "
                f"their frames as images"
            )
    question = _text(columns.value(row, "question"), "question")
    answer = _text(columns.value(row, "answer"), "answer") if "answer" in required else ""
    images = tuple(_image_ref(value, image_root) for value in _image_values(columns.value(row, "images")))
    tags = question.count(IMAGE_TAG)
    if tags and tags != len(images):
        raise BadField("image_count", f"the question has {tags} {IMAGE_TAG} tags, the row {len(images)} images")
    return Problem(
        id=_text(columns.value(row, "id"), "id").strip() if "id" in columns.of else row_id,
        question=question,
        answer=answer,
        images=images,
        choices=_choices(columns.value(row, "choices")),
        type=str(columns.value(row, "type") or "auto"),
        source=str(columns.value(row, "source") or ""),
        row={name: value for name, value in row.items() if name != columns.of.get("images")},
    )


def _text(value: Any, field: str) -> str:
    """Text as it stands, numbers written out. Raises BadField empty_FIELD or bad_FIELD."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadField(f"empty_{field}", f"the {field} is empty")
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise BadField(f"bad_{field}", f"wanted text or a number as {field}, found {type(value).__name__}")


def _choices(value: Any) -> tuple[str, ...]:
    """Texts of the choices in their order; {"A": text, ...} gives the texts."""
    if value is None:
        return ()
    if isinstance(value, Mapping):
        # Parquet gives every row the keys of all rows, None where a row has no such choice.
        value = [text for text in value.values() if text is not None]
    if not isinstance(value, list | tuple):
        raise BadField("bad_choices", f"wanted a list of choices, found {type(value).__name__}")
    return tuple(str(choice) for choice in value)


def _image_values(value: Any) -> list[Any]:
    """One image or a list of them, without the empty ones that stand for "no image"."""
    values = value if isinstance(value, list | tuple) else [value]
    return [one for one in values if one is not None and one != "" and one != {"bytes": None, "path": None}]


def _image_ref(value: Any, image_root: str | None) -> bytes | str:
    """Encoded bytes, or the checked absolute path. Raises BadField."""
    if isinstance(value, Mapping):
        data = value.get("bytes")
        value = data if data else value.get("path")
    if isinstance(value, bytes):
        if not value:
            raise BadField("bad_image", "an image of 0 bytes")
        return value
    if not isinstance(value, str) or not value:
        raise BadField("bad_image", f"wanted a path or bytes as image, found {type(value).__name__}")
    return checked_path(value, image_root)


def checked_path(path: str, image_root: str | None) -> str:
    """Absolute path of an image file below `image_root`, links followed. Raises BadField for any other."""
    if "://" in path or path.startswith("data:"):
        raise BadField("image_url", f"{path[:80]!r} is an address; images are read from files or the row itself")
    if image_root is None:
        raise BadField("image_path", f"{path!r} is a path, but there is no folder it could be in: set data.image_root")
    if "\0" in path:
        raise BadField("image_path", f"{path!r} is not a file name")
    real = os.path.realpath(Path(image_root) / path)
    if os.path.commonpath([real, image_root]) != image_root:
        raise BadField("image_path", f"{path!r} leads out of the image root {image_root}, to {real}")
    if not os.path.isfile(real):
        raise BadField("image_missing", f"{path!r}: there is no file {real}")
    return real
