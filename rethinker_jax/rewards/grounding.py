"""Terms for bounding boxes: IoU, mean average precision, and its form that objects to too many boxes.

Answers hold boxes in pixels of the original image. Responses hold them in pixels of the image that the model saw, which
was resized; they are converted by the sizes of the row's first image. Scaling both axes leaves an IoU as it is, so it
does not matter in whose pixels it is computed, but both boxes must be in the same.
"""

import json
from collections.abc import Mapping, Sequence

from rethinker_jax.config_rewards import RewardConfig
from rethinker_jax.errors import UserError
from rethinker_jax.rewards.inputs import ImageSize, RewardInput, gold_text
from rethinker_jax.types import Problem
from rethinker_jax.verify.boxes import Box, iou, parse_boxes

LabelledBox = tuple[Box, str]
THRESHOLDS = tuple(step / 20 for step in range(10, 20))  # 0.50, 0.55, ..., 0.95
NOTHING = ("none", "[]", "no objects", "no object")


def mean_iou(given: RewardInput) -> float:
    """IoU of the boxes, paired one to one: the sum over pairs / the larger number of boxes, in original pixels.

    VLM-R1's reward for referring expressions and VLAA-Thinking's IoU, for one box or many. Two labels that differ make
    no pair. A text that is no list of valid boxes, or has none where the gold has some, earns 0.
    """
    gold, answer = _both(given)
    if answer is None:
        return 0.0
    if not gold or not answer:
        return float(not gold and not answer)
    return sum(iou(a, b) for a, b in _pairs(gold, answer, 0.0)) / max(len(gold), len(answer))


def mean_average_precision(given: RewardInput) -> float:
    """Mean over labels and over the IoU thresholds 0.50 to 0.95 of the average precision: VLM-R1's map.

    All boxes of a response have one confidence, so the curve of precision over recall is one point, and its area is
    precision * recall. COCO's evaluation, which VLM-R1 calls, takes the order of listing for confidence, which makes
    every box after the right ones free; it also drops labels that the gold has not, which here have a precision of 0.
    Nothing where nothing is (`None`) earns 1.
    """
    gold, answer = _both(given)
    if answer is None:
        return 0.0
    if not gold or not answer:
        return float(not gold and not answer)
    gold_of, answer_of = _by_label(gold, answer)
    precisions = [
        _average_precision(gold_of.get(label, []), answer_of.get(label, []), threshold)
        for label in dict.fromkeys([*gold_of, *answer_of])
        for threshold in THRESHOLDS
    ]
    return sum(precisions) / len(precisions)


def od_length(given: RewardInput) -> float:
    """VLM-R1's odLength: mean average precision, times gold boxes / boxes where there are more than the gold has."""
    gold, answer = _both(given)
    value = mean_average_precision(given)
    return value * min(1.0, len(gold) / len(answer)) if answer and gold else value


def _average_precision(gold: list[LabelledBox], answer: list[LabelledBox], threshold: float) -> float:
    if not gold or not answer:
        return 0.0
    right = len(_pairs(gold, answer, threshold))
    return right / len(answer) * right / len(gold)


def _by_label(
    gold: Sequence[LabelledBox], answer: Sequence[LabelledBox]
) -> tuple[dict[str, list[LabelledBox]], dict[str, list[LabelledBox]]]:
    """Boxes by label; one class where the gold names none."""
    named = any(label for _, label in gold)
    classes: tuple[dict[str, list[LabelledBox]], dict[str, list[LabelledBox]]] = ({}, {})
    for found, boxes in zip(classes, (gold, answer), strict=True):
        for box, label in boxes:
            found.setdefault(label if named else "", []).append((box, label if named else ""))
    return classes


def _pairs(gold: Sequence[LabelledBox], answer: Sequence[LabelledBox], minimum: float) -> list[tuple[Box, Box]]:
    """One-to-one pairs, the largest IoU first, that have an IoU of at least `minimum` and above 0."""
    values = [
        (-value, i, j)
        for i, (a, name) in enumerate(gold)
        for j, (b, label) in enumerate(answer)
        if (not name or not label or name == label) and (value := iou(a, b)) > 0 and value >= minimum
    ]
    left, right, pairs = set(range(len(gold))), set(range(len(answer))), []
    for _, i, j in sorted(values):
        if i in left and j in right:
            left.remove(i)
            right.remove(j)
            pairs.append((gold[i][0], answer[j][0]))
    return pairs


def _both(given: RewardInput) -> tuple[list[LabelledBox], list[LabelledBox] | None]:
    """The boxes of the gold and of the response (None: it has no answer that could be read), in original pixels."""
    gold = gold_boxes(given.problem)
    answer = _read(given.answer) if given.answer is not None else None
    size = image_size(given.images, given.settings)
    return gold, answer if answer is None or size is None else _scaled(answer, size.resized, size.original)


def gold_boxes(problem: Problem) -> list[LabelledBox]:
    """The boxes of a row's answer. Raises UserError where it is neither boxes nor `None`."""
    boxes = _read(gold_text(problem))
    if boxes is None:
        raise UserError(
            f"row {problem.id!r}: its reward wants boxes [x1, y1, x2, y2] as answer, or None; it is "
            f"{problem.answer!r:.80}. Give other rows other terms by reward.by_type."
        )
    return boxes


def _read(text: str) -> list[LabelledBox] | None:
    """Boxes with labels, [] for a word that says that there are none, None for anything else."""
    return [] if text.strip("` \n.").lower() in NOTHING else parse_boxes(text)


def image_size(images: Sequence[ImageSize], settings: RewardConfig) -> ImageSize | None:
    """The sizes to convert by; None where responses are in the coordinates of the answer already."""
    known = images and settings.boxes.coordinates == "resized" and 0 not in (*images[0].original, *images[0].resized)
    return images[0] if known and images[0].original != images[0].resized else None


def _scaled(boxes: Sequence[LabelledBox], old: tuple[int, int], new: tuple[int, int]) -> list[LabelledBox]:
    """The boxes of an image of (width, height) `old` on the same image of size `new`."""
    x, y = new[0] / old[0], new[1] / old[1]
    return [((x1 * x, y1 * y, x2 * x, y2 * y), label) for (x1, y1, x2, y2), label in boxes]


def answer_as_seen(problem: Problem, images: Sequence[ImageSize], settings: RewardConfig) -> str:
    """The gold answer for the verifier, which compares boxes as they are written: in pixels of the resized image."""
    size = image_size(images, settings)
    if size is None or not (problem.type == "bbox" or (problem.type == "auto" and "bbox" in problem.answer)):
        return problem.answer
    boxes = parse_boxes(problem.answer)
    if boxes is None:  # the verifier says so: bad_gold
        return problem.answer
    rows: list[Mapping[str, object]] = [
        {"bbox_2d": [round(number, 3) for number in box]} | ({"label": label} if label else {})
        for box, label in _scaled(boxes, size.original, size.resized)
    ]
    return json.dumps(rows)
