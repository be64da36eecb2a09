"""EMMA (arXiv 2501.05444): mathematics, physics, chemistry and coding that cannot be solved by text alone."""

from rethinker_jax.benchmarks.adapters.fields import (
    Place,
    Row,
    categories_of,
    letter_gold,
    make_problem,
    numbered_images,
    options_of,
    place_images,
    text_of,
)
from rethinker_jax.benchmarks.items import Item


def read_emma(row: Row, place: Place) -> list[Item]:
    """`options` is a list or a list written as text, by dump; `type` is "Multiple Choice" or "Multiple choice", or
    "Open-ended"; a category of Coding may be several, parted by `;`, and so may an answer."""
    kind = text_of(row, "type", "").strip().lower()
    options = () if kind.startswith("open") else options_of(row)
    context = text_of(row, "context", "").strip()
    question = text_of(row, "question")
    texts = [f"{context}\n{question}" if context else question, *options]
    (shown, *choices), images = place_images(texts, numbered_images(row, place))
    answer = text_of(row, "answer").strip()
    problem = make_problem(
        row, place, id=text_of(row, "pid", place.row_id), question=shown,
        answer=letter_gold(answer, options) if options else answer, images=images, choices=tuple(choices),
        type="mcq" if options else "auto",
    )  # fmt: skip
    subject = text_of(row, "subject", place.config)
    found = {"subject": subject, "type": "multiple choice" if options else "open"} | categories_of(
        row, {"task": "task"}
    )
    names = [name.strip() for name in text_of(row, "category", "").split(";") if name.strip()]
    if len(names) > 1 or subject == "Coding":
        found |= {f"category: {name}": "yes" for name in names}
    elif names:
        found["category"] = names[0]
    return [Item(problem, "", found)]
