"""Options in the text of a question: written below it, and read off it."""

import re
import string
from collections.abc import Sequence

LETTERS = string.ascii_uppercase
_HEAD = re.compile(r"\n?[ \t]*choices?\s*[::][ \t]*\n?", re.IGNORECASE)
_OPTION = re.compile(r"(?:^|\n)[ \t]*\(?([A-Z])[):.:][ \t]*")


def with_choices(question: str, choices: Sequence[str]) -> str:
    """The question with its options below it, as MathVista, VL-Rethinker and OpenVLThinker write them."""
    if not choices:
        return question
    lines = [f"({LETTERS[place]}) {choice}" for place, choice in enumerate(choices)]
    return "\n".join([*([question] if question else []), "Choices:", *lines])


def split_choices(text: str) -> tuple[str, tuple[str, ...]]:
    """(question, options) of "...\\nChoices:\\nA:30°\\nB:45°"; no options where the letters do not run from A."""
    heads = list(_HEAD.finditer(text))
    if not heads:
        return text, ()
    tail = text[heads[-1].end() :]
    marks = list(_OPTION.finditer(tail))
    ends = [mark.start() for mark in marks[1:]] + [len(tail)]
    options = tuple(tail[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True))
    if len(marks) < 2 or "".join(mark.group(1) for mark in marks) != LETTERS[: len(marks)] or not all(options):
        return text, ()
    return text[: heads[-1].start()], options
