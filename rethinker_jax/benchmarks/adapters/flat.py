"""Flat rows of question, images and answer: Geometry3K, MM-Math, and VL-Rethinker's own evaluation files."""

import dataclasses
import re

from rethinker_jax.benchmarks.adapters.fields import Place, Row
from rethinker_jax.benchmarks.items import Item
from rethinker_jax.benchmarks.wording import split_choices, with_choices
from rethinker_jax.errors import UserError
from rethinker_jax.prompts.rows import BadField, match_columns, read_row
from rethinker_jax.types import Problem

_LETTER = re.compile(r"\s*(?:\\boxed\{)?\s*\(?([A-Z])\)?\s*\}?\s*")


def read_flat(row: Row, place: Place) -> list[Item]:
    problem = _problem(row, place)
    return [Item(problem, "", {"category": str(row["category"])} if row.get("category") else {})]


def read_vl_rethinker(row: Row, place: Place) -> list[Item]:
    """The benchmark is what stands before the first hyphen of `qid`; options are part of the question's text.

    They become choices (so that an answer by an option's text is known) only where writing them back gives the very
    text of the row: what the model reads must not change.
    """
    problem = _problem(row, place)
    question, choices = split_choices(problem.question)
    gold = _LETTER.fullmatch(problem.answer)
    if (
        gold
        and choices
        and gold.group(1) <= chr(64 + len(choices))
        and with_choices(question, choices) == problem.question
    ):
        problem = dataclasses.replace(problem, question=question, choices=choices, answer=gold.group(1), type="mcq")
    return [Item(problem, "", {"benchmark": problem.id.partition("-")[0]})]


def _problem(row: Row, place: Place) -> Problem:
    try:
        columns = match_columns(row, {}, "the row")
    except UserError as error:
        raise BadField("missing_column", str(error)) from error
    problem = read_row(row, columns, where="a row", row_id=place.row_id, image_root=place.media.root)
    return dataclasses.replace(problem, source=place.benchmark)
