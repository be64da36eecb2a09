r"""One response against one gold answer: the verdict, the extracted answer, the rule that decided.

What counts as correct:

 * The answer is the last complete, non-empty `\boxed{}`; boxes with only separators between them are one list. Text
   outside never rescues it. Without a box, `<answer>...</answer>`.
 * Values are exact. A decimal gold accepts what rounds to it; an integer gold wants the integer.
 * A unit may be missing on one side. Another unit is wrong unless the converted value agrees; another dimension is.
 * 25% is 0.25. The sign may be missing on one side, but 0.25 is not 0.25%.
 * Options: the letter, the letter with its own text, the text or value of exactly one option. Naming two is wrong.
 * Expressions are equal where the gold has a value. `\log` without a base is natural where the gold writes `\ln`.
 * Text: case, articles and punctuation are free; any other word counts. No fuzzy matching.
 * `( )` is ordered, `{ }` and comma lists are not. Boxes: as many as the gold has, each with IoU ≥ 0.5; a gold of
   four numbers in brackets that can only be a box is one without a `type`.
 * A gold that is empty or cannot be compared is `bad_gold`, whatever the response says.

Pure: it reads no clock but to report milliseconds. It may run long on hostile text: that is what the pool is for.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from functools import lru_cache

from rethinker_jax.types import Verdict, VerdictName
from rethinker_jax.verify import boxes, guards
from rethinker_jax.verify.choices import chosen_letters, gold_letters, option_texts
from rethinker_jax.verify.extract import extract
from rethinker_jax.verify.kinds import KINDS, compare, kind_of, refuse_gold, same
from rethinker_jax.verify.normalize import clean, key
from rethinker_jax.verify.texts import is_yes_no

logger = logging.getLogger(__name__)
_ALIASES = {
    "multiple_choice": "mcq",
    "choice": "mcq",
    "yes_no": "yesno",
    "unit": "units",
    "numeric": "number",
    "integer": "number",
}
_warned: set[str] = set()


@dataclasses.dataclass(frozen=True)
class JudgeItem:
    """What one verdict needs. `type` is `auto` or one of `kinds.KINDS`; anything else is `auto`, with a warning."""

    response: str
    answer: str
    choices: tuple[str, ...] = ()
    type: str = "auto"


@dataclasses.dataclass(frozen=True)
class Gold:
    """A gold answer, read once. `problem` says why it cannot be judged ("" when it can)."""

    kind: str
    text: str
    options: tuple[str, ...] = ()
    letters: frozenset[str] = frozenset()
    problem: str = ""


def resolve_type(name: str) -> str:
    """The kind that a row's `type` names; an unknown one is `auto`, said once."""
    if name in KINDS or name == "auto":
        return name
    lowered = name.strip().lower()
    if lowered in KINDS or lowered in ("", "auto"):
        return lowered or "auto"
    if lowered in _ALIASES:
        return _ALIASES[lowered]
    if name not in _warned and len(_warned) < 100:
        _warned.add(name)
        logger.warning("unknown answer type %r is judged as 'auto'; known types: %s", name, ", ".join(KINDS))
    return "auto"


@lru_cache(maxsize=8192)
def read_gold(answer: str, choices: tuple[str, ...] = (), type: str = "auto") -> Gold:
    """The gold's kind and its cleaned text; with a `problem` where no answer could be judged against it."""
    kind = resolve_type(type)
    if len(answer) > (guards.MAX_TEXT_CHARS if kind == "bbox" else guards.MAX_LIST_CHARS):
        return Gold("text", "", problem="too_long")
    unboxed = extract(answer).text if "\\boxed" in answer else None
    text = clean(unboxed if unboxed is not None else answer)
    if not key(text):
        return Gold(kind, "", problem="empty")
    if kind == "bbox" or (kind == "auto" and not choices and ("bbox" in answer or boxes.is_one_box(text))):
        return Gold("bbox", answer, problem="" if boxes.parse_boxes(answer) else "invalid_box")
    if kind == "mcq" or (kind == "auto" and choices):
        return _read_choice(text, choices, strict=kind == "mcq")
    if kind == "auto":
        kind = kind_of(text)
    if kind == "mcq":
        return Gold("mcq", text, (), gold_letters(text, (), same) or frozenset())
    if kind == "yesno" and not is_yes_no(text):
        kind = kind_of(text)
    return Gold(kind, text, problem=_problem(kind, text))


def _read_choice(text: str, choices: Sequence[str], strict: bool) -> Gold:
    if len(choices) > guards.MAX_CHOICES or max(map(len, choices), default=0) > guards.MAX_LIST_CHARS:
        return Gold("mcq", text, problem="choices_too_many" if len(choices) > guards.MAX_CHOICES else "too_long")
    options = option_texts(tuple(clean(choice) for choice in choices))
    letters = gold_letters(text, options, same, letters_wanted=strict)
    if letters:
        return Gold("mcq", text, options, letters)
    if strict and options:
        return Gold("mcq", text, options, problem="not_an_option")
    kind = kind_of(text)
    if kind == "mcq":  # a letter beyond the last option
        return Gold("mcq", text, options, problem="not_an_option")
    return Gold(kind, text, problem=_problem(kind, text))


def _problem(kind: str, text: str) -> str:
    guard = refuse_gold(kind, text)
    return f"guard_{guard}" if guard else ""


def check_gold(answer: str, choices: Sequence[str] = (), type: str = "auto") -> str:
    """Why this gold cannot be judged, or "" when it can: for loaders that drop such rows by name."""
    return read_gold(answer, tuple(choices), type).problem


def judge(response: str, answer: str, choices: Sequence[str] = (), type: str = "auto") -> Verdict:
    """The verdict on one response, in this process and without limits on time (see `pool.VerifierPool` for those)."""
    found = extract(response)
    return judge_extracted(found.text, found.rule, answer, choices, type)


def judge_extracted(
    extracted: str | None, rule: str, answer: str, choices: Sequence[str] = (), type: str = "auto"
) -> Verdict:
    """The same for an answer that is extracted already; `rule` says how, and is the verdict's where there is none."""
    started = time.perf_counter()

    def verdict(name: VerdictName, why: str) -> Verdict:
        return Verdict(name, float(name == "correct"), extracted, why, (time.perf_counter() - started) * 1000)

    gold = read_gold(answer, tuple(choices), type)
    if gold.problem:
        return verdict("bad_gold", gold.problem)
    if extracted is None:
        return verdict("no_answer", rule)
    if len(extracted) > (guards.MAX_TEXT_CHARS if gold.kind == "bbox" else guards.MAX_LIST_CHARS):
        return verdict("wrong", "guard_length")
    if gold.kind == "bbox":
        right, why = compare("bbox", gold.text, extracted)
    else:
        text = clean(extracted)
        right, why = _choose(gold, text) if gold.kind == "mcq" else compare(gold.kind, gold.text, text)
    return verdict("correct" if right else "wrong", f"{gold.kind}:{why}")


def _choose(gold: Gold, answer: str) -> tuple[bool, str]:
    letters, rule = chosen_letters(answer, gold.options, same, multiple=len(gold.letters) > 1)
    return letters == gold.letters, rule
