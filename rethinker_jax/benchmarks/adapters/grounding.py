"""Referring expressions (RefCOCO and its kin): find the box of what a sentence describes; right is IoU ≥ 0.5.

Golds are in pixels of the image as it is published.
"""

import math
from collections.abc import Mapping
from typing import Any

from rethinker_jax.benchmarks.adapters.fields import Place, Row, list_of, make_problem, text_of
from rethinker_jax.benchmarks.items import Item
from rethinker_jax.prompts.rows import BadField

# VLM-R1 (arXiv 2504.07615), evaluation of referring expressions.
REQUEST = "Please provide the bounding box coordinate of the region this sentence describes: "
BOX_COLUMNS = ("bbox", "bbox_2d", "box", "gt_bbox", "solution", "answer")
EXPRESSION_COLUMNS = (
    "expression",
    "referring_expression",
    "sentence",
    "sentences",
    "normal_caption",
    "caption",
    "phrase",
)
QUESTION_COLUMNS = ("problem", "question")
# COCO's annotations give corner, width and height; tables that carry their other columns do as well.
COCO_COLUMNS = ("segmentation", "iscrowd")


def read_refcoco(row: Row, place: Place) -> list[Item]:
    """One item an expression: the published tables list several of one object."""
    box = _box(row)
    image = place.media.image(row.get("image")) or place.media.image(row.get("image_path"))
    if image is None:
        raise BadField("image_count", "a row without its image")
    own_id = text_of(row, "question_id", text_of(row, "id", place.row_id))
    name = text_of(row, "file_name", "") or (row["image"] if isinstance(row.get("image"), str) else "")
    questions = _questions(row)
    items = []
    for number, question in enumerate(questions):
        problem = make_problem(
            row, place, id=f"{own_id}-{number}" if len(questions) > 1 else own_id, question=question,
            answer=f"[{', '.join(f'{side:.10g}' for side in box)}]", images=[image], type="bbox",
        )  # fmt: skip
        items.append(Item(problem, "", {"split": place.config} if place.config else {}, name))
    return items


def _questions(row: Row) -> list[str]:
    """Whole questions as they are, expressions with the request before them. Raises BadField."""
    answers = row.get("answer")
    # lmms-lab's tables answer a captioning question by a list of expressions, so their question is of no use.
    if isinstance(answers, list) and answers and all(isinstance(one, str) for one in answers):
        return [REQUEST + one.strip() for one in dict.fromkeys(answers) if one.strip()]
    for column in EXPRESSION_COLUMNS:
        value = row.get(column)
        listed = value if isinstance(value, list) else [value]
        found = [one.get("raw") or one.get("sent") if isinstance(one, Mapping) else one for one in listed]
        texts = [one.strip() for one in found if isinstance(one, str) and one.strip()]
        if texts:
            return [REQUEST + text for text in dict.fromkeys(texts)]
    for column in QUESTION_COLUMNS:
        if text_of(row, column, ""):
            return [text_of(row, column)]
    raise BadField("empty_question", "no expression: wanted one of " + ", ".join(EXPRESSION_COLUMNS + QUESTION_COLUMNS))


def _box(row: Row) -> tuple[float, float, float, float]:
    """(x1, y1, x2, y2) of the first column that holds a box. Raises BadField."""
    for column in BOX_COLUMNS:
        value = row.get(column)
        if isinstance(value, str) and value.strip()[:1] in ("[", "("):
            value = list_of(value, column)
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
            value = value[0]
        found = _corners(value, row)
        if found is not None:
            x1, y1, x2, y2 = found
            if not all(map(math.isfinite, found)) or x2 <= x1 or y2 <= y1:
                raise BadField("bad_box", f"{column} is no box of positive size: {found}")
            return found
    raise BadField("empty_box", "no box: wanted one of " + ", ".join(BOX_COLUMNS))


def _corners(value: Any, row: Row) -> tuple[float, float, float, float] | None:
    if isinstance(value, Mapping):
        names = ("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax")
        for corners in names:
            if all(name in value for name in corners):
                return _numbers([value[name] for name in corners])
        for corner in (("left", "top", "width", "height"), ("x", "y", "w", "h"), ("x", "y", "width", "height")):
            if all(name in value for name in corner):
                return _from_size(_numbers([value[name] for name in corner]))
        return None
    if not isinstance(value, list | tuple) or len(value) != 4:
        return None
    numbers = _numbers(list(value))
    with_size = row.get("bbox_format") == "xywh" or any(row.get(name) is not None for name in COCO_COLUMNS)
    return _from_size(numbers) if with_size else numbers


def _numbers(values: list[Any]) -> tuple[float, float, float, float] | None:
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return None
    a, b, c, d = (float(value) for value in values)
    return a, b, c, d


def _from_size(box: tuple[float, float, float, float] | None) -> tuple[float, float, float, float] | None:
    return None if box is None else (box[0], box[1], box[0] + box[2], box[1] + box[3])
