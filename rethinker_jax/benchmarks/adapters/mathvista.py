"""MathVista (arXiv 2310.02255): multiple choice by the option's text, integers, decimals of stated precision, lists."""

import math

from rethinker_jax.benchmarks.adapters.fields import (
    Place,
    Row,
    categories_of,
    make_problem,
    options_of,
    text_gold,
    text_of,
)
from rethinker_jax.benchmarks.items import Item
from rethinker_jax.prompts.rows import BadField

MAX_DECIMALS = 12


def read_mathvista(row: Row, place: Place) -> list[Item]:
    choices = options_of(row, "choices")
    answer = _answer(row)
    if choices:
        gold, kind = text_gold(answer, choices), "mcq"
    elif row.get("answer_type") == "float":
        gold, kind = rounded(answer, row.get("precision")), "number"
    else:
        gold, kind = answer, "number" if row.get("answer_type") == "integer" else "auto"
    image = place.media.image(row.get("decoded_image")) or place.media.image(row.get("image"))
    problem = make_problem(
        row, place, id=text_of(row, "pid", place.row_id), question=text_of(row, "question"), answer=gold,
        images=[image] if image else [], choices=choices, type=kind,
    )  # fmt: skip
    return [Item(problem, text_of(row, "query", ""), _categories(row))]


def _answer(row: Row) -> str:
    """The gold; a list is written as the benchmark's own text, `[1, 2]`."""
    value = row.get("answer")
    return str(list(value)) if isinstance(value, list | tuple) else text_of(row, "answer")


def rounded(answer: str, precision: object) -> str:
    """A decimal gold with as many decimals as `precision` says (a float in the published rows, or null).

    The benchmark rounds the response to these decimals and compares the texts, so that "12.4" of precision 2 is 12.40:
    12.37 is wrong, though it rounds to the gold as it is printed. Raises BadField.
    """
    try:
        value = float(answer)
    except ValueError as error:
        raise BadField("bad_answer", f"the answer {answer[:40]!r} of type float is no number") from error
    if precision is None:
        return answer
    if not isinstance(precision, int | float) or not math.isfinite(precision) or not 0 <= precision <= MAX_DECIMALS:
        raise BadField("bad_precision", f"wanted a number of decimals as precision, found {str(precision)[:40]!r}")
    return f"{round(value, int(precision)):.{int(precision)}f}"


def _categories(row: Row) -> dict[str, str]:
    metadata = row.get("metadata")
    if not isinstance(metadata, dict):
        return categories_of(row, {"question_type": "question_type"})
    names = ("task", "category", "context", "grade", "language", "source")
    found = categories_of(metadata, {name: name for name in names}) | categories_of(row, {"answer_type": "answer_type"})
    skills = metadata.get("skills")
    # A problem may want several skills, and counts for each.
    return found | {f"skill: {skill}": "yes" for skill in (skills if isinstance(skills, list) else [])}
