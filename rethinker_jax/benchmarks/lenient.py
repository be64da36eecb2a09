"""Any stated answer, boxed or not: what a response means to answer, for the verdict beside the strict one.

The gap between the two is a matter of form. A response with an answer that the training rule takes keeps it; nothing
here guesses among the options or maps to the nearest one.
"""

import re

from rethinker_jax.verify.extract import extract

MAX_ANSWER_CHARS = 300
MAX_WORDS = 4  # of a last line that is taken as a whole

# "The final answer is 12", "Answer: B", "答案：B"; the last one counts, up to the end of its line.
_PHRASE = re.compile(
    r"(?:answer|correct (?:option|choice)|答案)[*_\s]{0,4}(?:is|are|:|=|：|是|为)[*_\s]{0,4}[:：]?[*_ \t]{0,4}([^\n]+)",
    re.IGNORECASE,
)
# A sentence's end, or where a reason begins; the point of a decimal number is followed by no blank.
_END = re.compile(r"[.;!?。；！](?:\s|$)|[,，]?\s(?:because|since|as shown|which)\b", re.IGNORECASE)
_LETTER = re.compile(r"\(([A-J])\)|(?<![\w'])([A-J])(?=[.):*]{0,3}(?:\s|$))(?![.:)]?\s+[a-z])")
_VALUE = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:\s?/\s?\d+)?\s?%?")
_TAG = re.compile(r"</?answer>")


def lenient_answer(response: str) -> str | None:
    """The answer by the training rule, else behind the last "answer is", else the last line's final value or letter.

    A last line of few words without either is itself the answer. None where nothing is left.
    """
    found = extract(response).text
    if found is not None:
        return found
    text = _TAG.sub(" ", response)
    phrases = [match.group(1) for match in _PHRASE.finditer(text)]
    for phrase in reversed(phrases):
        answer = _trimmed(_END.split(phrase, maxsplit=1)[0])
        if answer:
            return answer
    lines = [line for line in map(_trimmed, text.splitlines()) if line]
    return _final(lines[-1]) if lines else None


def lenient_response(response: str) -> str:
    """A response that the verifier judges as `lenient_answer` reads this one."""
    if extract(response).text is not None:
        return response
    answer = lenient_answer(response)
    return response if answer is None else f"<answer>{answer}</answer>"


def _final(line: str) -> str | None:
    last = max([*_LETTER.finditer(line), *_VALUE.finditer(line)], key=lambda match: match.end(), default=None)
    if last is not None:
        return _trimmed(next((group for group in last.groups() if group), last.group()))
    return line if len(line.split()) <= MAX_WORDS else None


def _trimmed(text: str) -> str:
    return text.strip(" \t*_`\"'“”").rstrip(".。,，;:").strip(" \t*_`\"'“”")[:MAX_ANSWER_CHARS]
