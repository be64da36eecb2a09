"""MATH-Vision (arXiv 2402.14804): competition problems, `<image1>` in the question."""

from rethinker_jax.benchmarks.adapters.fields import (
    Place,
    Row,
    categories_of,
    letter_gold,
    make_problem,
    options_of,
    place_images,
    text_of,
)
from rethinker_jax.benchmarks.items import Item


def read_mathvision(row: Row, place: Place) -> list[Item]:
    """Options may be nothing but the letters (they are drawn in the picture); a free-form gold may be a letter."""
    options = options_of(row)
    image = place.media.image(row.get("decoded_image")) or place.media.image(row.get("image"))
    images = {1: image} if image else {}
    (question, *choices), order = place_images([text_of(row, "question"), *options], images)
    answer = text_of(row, "answer").strip()
    problem = make_problem(
        row, place, id=text_of(row, "id", place.row_id), question=question,
        answer=letter_gold(answer, options) if options else answer, images=order, choices=tuple(choices),
        type="mcq" if options else "auto",
    )  # fmt: skip
    return [Item(problem, "", categories_of(row, {"subject": "subject", "level": "level"}))]
