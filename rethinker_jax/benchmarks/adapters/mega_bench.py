"""MEGA-Bench (arXiv 2410.10563): 505 tasks, each with its own format and metric; what rules can judge is scored.

A row asks for one or several named fields, each with a metric of the benchmark. An item is scored where there is one
field and its metric is a matter of right and wrong that a kind of the verifier decides; partial credit (Jaccard, edit
distance, sequence similarity), several fields, running code, and judgement by a model are left unscored.
"""

from collections.abc import Mapping
from typing import Any

from rethinker_jax.benchmarks.adapters.fields import (
    Image,
    Place,
    Row,
    list_of,
    literal,
    make_problem,
    place_images,
    text_of,
)
from rethinker_jax.benchmarks.items import Item
from rethinker_jax.prompts.rows import BadField
from rethinker_jax.verify.judge import check_gold

# Metric of the benchmark (megabench/metrics/metric_type.py) → kind of the verifier. Exact strings go by the gold's own
# looks ("auto"). Numbers: theirs takes 1 % off for right, ours what rounds to the gold. One box: theirs is the mean
# IoU, ours the share with IoU of at least 0.5.
KIND_OF = {
    "exact_str_match": "auto",
    "exact_str_match_case_insensitive": "auto",
    "simple_str_match": "auto",
    "text_with_latex_expr_equality": "auto",
    "latex_expr_equality": "expression",
    "general_single_numerical_match": "number",
    "boxed_single_numerical_match": "number",
    "positive_int_match": "number",
    "set_equality": "set",
    "set_equality_case_insensitive": "set",
    "str_set_equality_line_break": "set",
    "str_set_equality_comma": "set",
    "sequence_equality": "tuple",
    "sequence_equality_case_insensitive": "tuple",
    "nbbox_iou_single": "bbox",
}
SEVERAL, NO_METRIC = "several fields", "none"
MAX_MEDIA = 64


def read_mega_bench(row: Row, place: Place) -> list[Item]:
    """The task's description with its pictures, the worked example with its own, then the question."""
    metric, gold, kind = _judging(row)
    question, images = _prompt(row, place)
    task = text_of(row, "task_name")
    problem = make_problem(
        row, place, id=text_of(row, "id", place.row_id), question=question, answer=gold, images=images,
        type=kind or "text",
    )  # fmt: skip
    scored = kind != "" and not place.config.startswith("open") and not check_gold(gold, (), kind)
    return [Item(problem, "", {"task": task, "metric": metric}, task, scored)]


def _judging(row: Row) -> tuple[str, str, str]:
    """(metric, gold, kind) of a row; kind "" where no rule of ours decides it. Raises BadField."""
    info, answer = _mapping(row, "metric_info"), _mapping(row, "answer")
    functions = info.get("field_score_function")
    if not isinstance(functions, Mapping) or not functions:
        return NO_METRIC, str(answer), ""
    if len(functions) > 1 or len(answer) > 1:
        return SEVERAL, str(answer), ""
    metric = str(next(iter(functions.values())))
    value = next(iter(answer.values()), "")
    kind = KIND_OF.get(metric, "")
    if kind in ("set", "tuple"):
        gold = _written(value, kind, metric)
        return metric, gold or str(value), kind if gold else ""
    gold = str(value).strip()
    if kind == "auto" and len(gold) == 1 and "A" <= gold <= "Z":
        kind = "mcq"
    return metric, gold, kind


def _written(value: Any, kind: str, metric: str) -> str:
    """A list as the verifier reads it, {a, b} or (a, b); "" where its parts have commas or brackets of their own."""
    parts: list[Any] = []
    if isinstance(value, str) and metric.startswith("str_set_equality"):
        parts = value.split("\n" if metric.endswith("line_break") else ",")
    elif isinstance(value, str) and value.strip()[:1] in ("[", "(", "{"):
        try:
            found = literal(value, "answer")
        except BadField:
            return ""
        parts = list(found) if isinstance(found, list | tuple | set) else []
    elif isinstance(value, list | tuple):
        parts = list(value)
    texts = [str(part).strip() for part in parts]
    if not texts or any(not text or set(text) & set(",;()[]{}\n") for text in texts):
        return ""
    return "{" + ", ".join(sorted(texts)) + "}" if kind == "set" else "(" + ", ".join(texts) + ")"


def _mapping(row: Row, name: str) -> Mapping[str, Any]:
    """A column that holds a dict, or one as text. Raises BadField."""
    value = row.get(name)
    if isinstance(value, str):
        value = literal(value, name)
    if not isinstance(value, Mapping):
        raise BadField(f"bad_{name}", f"wanted a dict as {name}, found {type(value).__name__}")
    return value


def _prompt(row: Row, place: Place) -> tuple[str, list[Image]]:
    """The text with one tag an image, and the images in that order. Raises BadField, of kind video for videos."""
    parts: list[str] = []
    images: list[Image] = []
    for text, media, heading in (
        ("task_description", "global_media", ""),
        ("example_text", "example_media", "Example of the task:\n"),
        ("query_text", "query_media", "Answer the new question.\n"),
    ):
        paths = [str(path) for path in list_of(row.get(media), media)]
        if len(paths) + len(images) > MAX_MEDIA:
            raise BadField("image_count", f"more than {MAX_MEDIA} images")
        given = text_of(row, text, "").replace("<video>", "video")
        found = {number: place.media.path(path) for number, path in enumerate(paths, 1)}
        if not given and not found:
            continue
        (placed,), shown = place_images([given], found, always=True)
        parts.append(heading + placed)
        images += shown
    if not text_of(row, "query_text", "") and not images:
        raise BadField("empty_query_text", "neither a question nor a picture")
    return "\n\n".join(parts), images
