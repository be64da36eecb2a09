"""CURE (arXiv 2309.04461): a final question about a region of a picture, and the sub-questions that lead to it."""

import posixpath
import urllib.parse
from collections.abc import Mapping
from typing import Any

from rethinker_jax.benchmarks.adapters.fields import LETTERS, Image, Place, Row, make_problem, options_of, text_of
from rethinker_jax.benchmarks.consistency_scores import CHAIN, FINAL, ROLE, STEP
from rethinker_jax.benchmarks.items import Item
from rethinker_jax.prompts.images import BadImage, open_image
from rethinker_jax.prompts.rows import BadField

# The rows have no text for the final question, only its six answers. The clue is not shown: it answers the first step.
# A model sees a resized picture, so the size that the corners belong to is said.
FINAL_QUESTION = (
    "Which of these can be inferred about the region {box} (x1, y1, x2, y2 in pixels, the image being {size}) of the "
    "image?"
)
MAX_STEPS = 16


def read_cure(row: Row, place: Place) -> list[Item]:
    """Every question of a chain is an item of its own; its categories tell chain and role, its cluster the chain."""
    image = _image(row, place)
    steps = row.get("cot_inference")
    chain = steps.get("chain") if isinstance(steps, Mapping) else None
    if not isinstance(chain, list) or not 0 < len(chain) <= MAX_STEPS:
        raise BadField("bad_cot_inference", f"wanted a chain of 1 to {MAX_STEPS} steps")
    name = text_of(row, "id", place.row_id)
    final = FINAL_QUESTION.format(box=_region(row), size=_size(image))
    questions = [(FINAL, final, row.get("inference")), *((STEP, "", step) for step in chain)]
    items = []
    for number, (role, question, part) in enumerate(questions):
        if not isinstance(part, Mapping):
            raise BadField("bad_cot_inference", f"wanted an object with candidate and gt, found {type(part).__name__}")
        choices = options_of(part, "candidate")
        gold = part.get("gt")
        if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
            raise BadField("not_an_option", f"gt {str(gold)[:40]!r} is no place in {len(choices)} candidates")
        problem = make_problem(
            part, place, id=f"{name}-{role}" + (f"-{number}" if role == STEP else ""),
            question=question or text_of(part, "question"), answer=LETTERS[gold], images=[image], choices=choices,
            type="mcq",
        )  # fmt: skip
        items.append(Item(problem, "", {CHAIN: name, ROLE: role}, name))
    return items


def _region(row: Row) -> str:
    """The first box, as the paper does, by its corners. Raises BadField."""
    boxes = row.get("bboxes")
    first: Any = boxes[0] if isinstance(boxes, list) and boxes else None
    names = ("left", "top", "width", "height")
    if not isinstance(first, Mapping) or not all(isinstance(first.get(name), int | float) for name in names):
        raise BadField("bad_bboxes", "wanted a box with left, top, width and height")
    left, top, width, height = (first[name] for name in names)
    return f"[{left:g}, {top:g}, {left + width:g}, {top + height:g}]"


def _size(image: Image) -> str:
    """`500 x 375`, of the file as it is. Raises BadField."""
    try:
        with open_image(image) as found:
            width, height = found.size
    except BadImage as error:
        raise BadField("bad_image", str(error)) from error
    return f"{width} x {height}"


def _image(row: Row, place: Place) -> Image:
    """The picture: rows give an address; a file of that name is looked for, with ever fewer of the address's folders.

    Nothing is downloaded. Raises BadField.
    """
    value = row.get("image")
    address = value.get("url") if isinstance(value, Mapping) else None
    if not isinstance(address, str):
        image = place.media.image(value)
        if image is None:
            raise BadField("image_count", "a row without its image")
        return image
    parts = [part for part in urllib.parse.urlparse(address).path.split("/") if part not in ("", ".", "..")]
    for start in range(len(parts)):
        try:
            return place.media.path(posixpath.join(*parts[start:]))
        except BadField as error:
            if error.kind != "image_missing":
                raise
    raise BadField("image_missing", f"no file for {address[:120]!r}: download it into the image root")
