r"""The final answer of a response: its last complete, non-empty `\boxed{}`.

Boxes without words between them but joining ones (`\boxed{2} or \boxed{-2}`, `\boxed{2}, y=\boxed{3}`) are one list
answer, so that listing every option cannot be read as choosing the last one. Text outside the box never
counts. Without any box the last non-empty `<answer>...</answer>` is taken, and the rule says so. One pass over the
text: linear in its length.
"""

import dataclasses
import re

BOXED = "boxed"
BOXED_LIST = "boxed_list"
ANSWER_TAG = "answer_tag"
NO_ANSWER = "no_answer"
EMPTY_ANSWER = "empty_answer"


@dataclasses.dataclass(frozen=True)
class Extraction:
    """`text` is the answer as it was written (None: there is none), `rule` how it was found."""

    text: str | None
    rule: str


# A box's opening, an escaped brace or backslash (which closes nothing), or a brace.
_TOKEN = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\[\\{}](?!boxed|fbox)|[{}]")
# What keeps apart boxes that are stated together: punctuation, spaces and breaks, joining words.
_SEPARATOR = re.compile(
    r"\\[hv]space\*?\s*\{[^{}]*\}|\\[a-zA-Z]+|\\[^a-zA-Z]|<br\s*/?>|[\s$,;.&|*_~:{}()、。，；]"
    r"|(?<![^\W\d_])(?:and|or|also|maybe|else|either|both|或者|以及)(?![^\W\d_])",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]{2,}")
_EQUAL = re.compile(r"[\s$]*(=|\\approx|≈)[\s$]*")
MAX_GAP = 2000  # characters between two boxes of a list
MAX_SIGNS = 24  # of them that are no separators: numbers, operators, names (`, y=`)
_NOTHING = re.compile(r"(?:\s|[${}~]|\\[,;:!() ]|\\(?:text|mathrm|mathbf|textbf|quad|qquad)\b|\\hspace\{[^{}]*\})*")
_INNER_BOX = re.compile(r"\\{1,2}(?:boxed|fbox)\s*(?=\{)")


def extract(response: str) -> Extraction:
    """The answer that the response commits to, or None and why there is none."""
    boxes = _complete_boxes(response)
    filled = [(start, end, text) for start, end, text in boxes if not _NOTHING.fullmatch(text)]
    if filled:
        return _last_group(response, filled)
    tagged = _last_answer_tag(response)
    if tagged is not None:
        return Extraction(tagged, ANSWER_TAG)
    return Extraction(None, EMPTY_ANSWER if boxes else NO_ANSWER)


def _complete_boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of every outermost box whose braces balance, in order.

    An opening that never closes stays on the stack and does not disturb the boxes after it.
    """
    places = [place for place in (text.find("boxed"), text.find("fbox")) if place >= 0]
    if not places:
        return []
    # A box's end depends on nothing before it, so the reasoning is not looked at; a run of backslashes is not split.
    first = len(text[: min(places)].rstrip("\\"))
    stack: list[tuple[int, int, bool]] = []  # (start of the token, start of the content, is a box)
    found: list[tuple[int, int, str]] = []
    for token in _TOKEN.finditer(text, first):
        word = token.group()
        if word == "}":
            if not stack:
                continue
            start, content, is_box = stack.pop()
            if is_box:
                while found and found[-1][0] > start:  # those inside this one
                    found.pop()
                found.append((start, token.end(), text[content : token.start()]))
        elif word.endswith("{") and word != r"\{":
            stack.append((token.start(), token.end(), word != "{"))
    return found


def _last_group(text: str, boxes: list[tuple[int, int, str]]) -> Extraction:
    """The last box, with the boxes right before it that only separators keep apart."""
    parts = [boxes[-1][2]]
    start = boxes[-1][0]
    for left, right, content in reversed(boxes[:-1]):
        if start - right > MAX_GAP or not _separates(text[right:start]):
            break
        equal = _EQUAL.fullmatch(text, right, start)
        if equal:  # a chain, whose parts must be equal
            parts[-1] = f"{content} {equal.group(1)} {parts[-1]}"
        else:
            parts.append(content)
        start = left
    parts = [_INNER_BOX.sub("", part).strip(" \n") for part in reversed(parts)]
    distinct = list(dict.fromkeys(parts))
    if len(distinct) == 1:
        return Extraction(distinct[0], BOXED)
    return Extraction(", ".join(distinct), BOXED_LIST)


def _separates(gap: str) -> bool:
    """Does the text between two boxes hold no words but joining ones, and few signs besides separators?"""
    signs = _SEPARATOR.sub(" ", gap)
    return len(signs) - signs.count(" ") <= MAX_SIGNS and not _WORD.search(signs)


def _last_answer_tag(text: str) -> str | None:
    end = len(text)
    while True:
        close = text.rfind("</answer>", 0, end)
        if close < 0:
            return None
        begin = text.rfind("<answer>", 0, close)
        if begin < 0:
            return None
        content = text[begin + len("<answer>") : close].strip()
        if content and not _NOTHING.fullmatch(content):
            return content
        end = begin
