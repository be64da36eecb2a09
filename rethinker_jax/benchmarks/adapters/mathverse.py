"""MathVerse (arXiv 2403.14624): one problem in versions that move what it says from the text into the picture."""

from rethinker_jax.benchmarks.adapters.fields import Place, Row, categories_of, letter_gold, make_problem, text_of
from rethinker_jax.benchmarks.items import Item
from rethinker_jax.benchmarks.wording import split_choices


def read_mathverse(row: Row, place: Place) -> list[Item]:
    """The options stand in the question's text. Vision Only has no question: its options are read from
    `question_for_eval`, for judging; what is shown is the picture."""
    shown = text_of(row, "question", "")
    question, choices = split_choices(shown)
    if not choices:
        choices = split_choices(text_of(row, "question_for_eval", ""))[1]
    multiple = text_of(row, "question_type", "").lower().replace("_", "-") == "multi-choice"
    answer = text_of(row, "answer").strip()
    image = place.media.image(row.get("image"))
    problem = make_problem(
        row, place, id=text_of(row, "sample_index", place.row_id), question=question if choices else shown,
        answer=letter_gold(answer, choices) if multiple else answer, images=[image] if image else [],
        choices=choices if multiple else (), type="mcq" if multiple else "auto",
    )  # fmt: skip
    metadata = row.get("metadata")
    categories = categories_of(row, {"version": "problem_version", "question_type": "question_type"})
    if isinstance(metadata, dict):
        categories |= categories_of(metadata, {"subject": "subject", "subfield": "subfield"})
    return [Item(problem, text_of(row, "query_cot", ""), categories, text_of(row, "problem_index", ""))]
