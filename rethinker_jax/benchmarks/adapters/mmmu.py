"""MMMU (arXiv 2311.16502) and MMMU-Pro (arXiv 2409.02813): up to seven pictures, named in question and options."""

import re

from rethinker_jax.benchmarks.adapters.fields import (
    Place,
    Row,
    letter_gold,
    list_of,
    make_problem,
    numbered_images,
    options_of,
    place_images,
    text_of,
    unmarked,
)
from rethinker_jax.benchmarks.items import Item
from rethinker_jax.prompts.rows import BadField
from rethinker_jax.verify.judge import judge, read_gold

# Six disciplines of thirty subjects (MMMU, table 3).
DISCIPLINES = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Psychology Sociology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
DISCIPLINE_OF = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects.split()}
MAX_ALTERNATIVES = 16
NUMBERS = ("number", "fraction", "units", "percent")  # kinds that are compared without algebra, so at once


def read_mmmu(row: Row, place: Place) -> list[Item]:
    """Standard rows: `<image k>` in question and options; without options the question is open."""
    options = options_of(row)
    answer = row.get("answer")
    is_open = text_of(row, "question_type", "").lower() == "open" or not options
    (question, *choices), images = place_images([text_of(row, "question"), *options], numbered_images(row, place))
    alternatives: tuple[str, ...] = ()
    if is_open:
        golds = _golds(answer if isinstance(answer, list) else text_of(row, "answer"))
        gold, *others = golds
        alternatives = tuple(others)
    else:
        gold = letter_gold(text_of(row, "answer"), options)
    problem = make_problem(
        row, place, id=text_of(row, "id", place.row_id), question=question, answer=gold, images=images,
        choices=() if is_open else tuple(choices), type="auto" if is_open else "mcq",
    )  # fmt: skip
    return [Item(problem, "", _categories(row), alternatives=alternatives)]


def read_mmmu_vision(row: Row, place: Place) -> list[Item]:
    """The picture is a screenshot of question and options: neither is shown, the options are for judging."""
    options = tuple(unmarked(option) for option in options_of(row))
    image = place.media.image(row.get("image"))
    if image is None:
        raise BadField("image_count", "a row of the vision config without its image")
    problem = make_problem(
        row, place, id=text_of(row, "id", place.row_id), question="",
        answer=letter_gold(text_of(row, "answer"), options), images=[image], choices=options, type="mcq",
    )  # fmt: skip
    return [Item(problem, "", _categories(row))]


def _golds(answer: str | list[object]) -> list[str]:
    """Golds any of which is right, "['24/7', '3.429']": of numbers, the one that accepts all others, if any does."""
    listed = answer if isinstance(answer, list) else None
    if isinstance(answer, str) and re.fullmatch(r"\s*\[\s*['\"].*\]\s*", answer, re.DOTALL):
        listed = list_of(answer, "answer")
    golds = [str(gold).strip() for gold in (listed if listed is not None else [answer])]
    golds = [gold for gold in dict.fromkeys(golds) if gold]
    if not golds or len(golds) > MAX_ALTERNATIVES:
        raise BadField("bad_answer", f"wanted 1 to {MAX_ALTERNATIVES} golds, found {len(golds)}")
    if all(read_gold(gold).kind in NUMBERS for gold in golds):
        for gold in golds:
            if all(judge(f"\\boxed{{{other}}}", gold).correct for other in golds if other != gold):
                return [gold]
    return golds


def _categories(row: Row) -> dict[str, str]:
    subject = text_of(row, "subject", "") or re.sub(r"^[a-z]+_|_\d+$", "", text_of(row, "id", ""))
    found = {"subject": subject} if subject else {}
    if subject in DISCIPLINE_OF:
        found["discipline"] = DISCIPLINE_OF[subject]
    for column in ("topic_difficulty", "question_type"):
        if text_of(row, column, ""):
            found[column] = text_of(row, column)
    return found
