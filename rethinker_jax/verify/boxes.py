"""Bounding boxes as `[x1, y1, x2, y2]`, alone or in a list, plain or as JSON with labels. Right means IoU ≥ 0.5."""

import json
import re
from collections.abc import Sequence

MIN_IOU = 0.5
MAX_BOXES = 64

Box = tuple[float, float, float, float]
_NUMBER = r"\s*[-+]?\d{1,7}(?:\.\d{1,9})?\s*"
_BOX = re.compile(rf"[\[(<]({_NUMBER}(?:,{_NUMBER}){{3}})[\])>]")
_NAMES = re.compile(r"\\(?:left|right|text|mathrm)(?![a-z])|\\[,;! ]|[xy]_?\{?(?:[12]|min|max)\}?\s*=|\$")
_ONLY_BRACKETS = re.compile(r"[-+\d.,;\s()\[\]{}<>\\]*")
_KEYS = ("bbox_2d", "bbox", "box", "box_2d")


def parse_boxes(text: str) -> list[tuple[Box, str]] | None:
    """The valid boxes of a text with their labels ("" where none), or None where there is none or one is degenerate."""
    if len(text) > 20_000:
        return None
    labelled = _from_json(text)
    text = _NAMES.sub("", text)
    if labelled is None and len(re.findall(r"\d+(?:\.\d+)?", text)) == 4:
        numbers = re.findall(_NUMBER, text)
        labelled = [(_box(numbers), "")] if len(numbers) == 4 and _ONLY_BRACKETS.fullmatch(text) else None
    if labelled is None:
        stripped = _BOX.sub("", text)
        found = [(_box(match.group(1).split(",")), "") for match in _BOX.finditer(text)]
        if not found:
            bare = re.fullmatch(rf"{_NUMBER}(?:,{_NUMBER}){{3}}", text)
            found = [(_box(text.split(",")), "")] if bare else []
            stripped = "" if bare else stripped
        if re.search(r"\d", stripped):
            return None  # five numbers, half a box: not a list of boxes
        labelled = found
    if not labelled or len(labelled) > MAX_BOXES or not all(_valid(box) for box, _ in labelled):
        return None
    return labelled


def is_one_box(text: str) -> bool:
    """Can `[a, b, c, d]` be nothing but a box: of ten pixels and more, or within the unit square; no sequence?"""
    if not text.startswith("[") or not _BOX.fullmatch(text):
        return False
    box = _box(text[1:-1].split(","))
    x1, y1, x2, y2 = box
    large = min(x2 - x1, y2 - y1) >= 10 or (max(box) <= 1 and "." in text)
    return _valid(box) and min(box) >= 0 and large and len({y1 - x1, x2 - y1, y2 - x2}) > 1


def _from_json(text: str) -> list[tuple[Box, str]] | None:
    text = text.replace(r"\{", "{").replace(r"\}", "}").replace(r"\_", "_").strip("` \n")
    text = text.removeprefix("json").strip()
    if "bbox" not in text and "box" not in text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    rows = value if isinstance(value, list) else [value]
    found = []
    for row in rows:
        if not isinstance(row, dict):
            return None
        box = next((row[name] for name in _KEYS if name in row), None)
        if not isinstance(box, list) or len(box) != 4 or not all(type(n) in (int, float) for n in box):
            return None
        found.append((_box(box), str(row.get("label", "")).strip().lower()))
    return found


def _box(numbers: Sequence[str | int | float]) -> Box:
    x1, y1, x2, y2 = (float(n) for n in numbers)
    return x1, y1, x2, y2


def _valid(box: Box) -> bool:
    x1, y1, x2, y2 = box
    return all(abs(n) < 1e7 for n in box) and x2 > x1 and y2 > y1


def iou(left: Box, right: Box) -> float:
    """Intersection over union of two valid boxes, corners in continuous coordinates."""
    width = min(left[2], right[2]) - max(left[0], right[0])
    height = min(left[3], right[3]) - max(left[1], right[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (left, right))
    return shared / (areas - shared)


def same_boxes(gold: list[tuple[Box, str]], answer: list[tuple[Box, str]]) -> bool:
    """As many boxes as the gold has, each paired one to one with IoU ≥ 0.5 (and its label, where both have one)."""
    if len(gold) != len(answer):
        return False
    options = [
        [j for j, (b, name) in enumerate(answer) if iou(a, b) >= MIN_IOU and (not label or not name or label == name)]
        for a, label in gold
    ]
    owner: dict[int, int] = {}

    def place(i: int, seen: set[int]) -> bool:
        """One augmenting path of bipartite matching."""
        for j in options[i]:
            if j not in seen:
                seen.add(j)
                if j not in owner or place(owner[j], seen):
                    owner[j] = i
                    return True
        return False

    return all(place(i, set()) for i in range(len(gold)))
