"""How responses are written and what the verifier made of them: counts that say why an accuracy is what it is."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import get_args

from rethinker_jax.benchmarks.records import Record
from rethinker_jax.rewards.inputs import RewardInput
from rethinker_jax.rewards.shaping import repetition
from rethinker_jax.types import Problem, Verdict, VerdictName
from rethinker_jax.verify.extract import ANSWER_TAG, BOXED, BOXED_LIST, extract

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_EMPTY_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{\s*\}")
LOOPING = 0.5  # a response of which more than half of the n-grams are repeated runs in circles


def share(flags: Iterable[bool]) -> float:
    """The share of True; 0 of nothing."""
    found = list(flags)
    return sum(found) / len(found) if found else 0.0


def no_answer_share(records: Sequence[Record]) -> float:
    return share(record.verdict == "no_answer" for record in records)


def truncated_share(records: Sequence[Record]) -> float:
    return share(record.finish_reason == "length" for record in records)


def format_rates(records: Sequence[Record]) -> dict[str, float]:
    r"""Shares of the responses.

    box: a complete, non-empty `\boxed{}`; several_boxes: more than one is opened; empty_box: one holds nothing;
    answer_tag: the answer is taken from `<answer>`; end_token: ended by itself; looping: more than half of the n-grams
    of words are repetitions. repeated_ngrams is the mean share of those.
    """
    rules = [extract(record.completion).rule for record in records]
    repeated = [repeated_ngrams(record) for record in records]
    return {
        "box": share(rule in (BOXED, BOXED_LIST) for rule in rules),
        "several_boxes": share(len(_BOX.findall(record.completion)) > 1 for record in records),
        "empty_box": share(_EMPTY_BOX.search(record.completion) is not None for record in records),
        "answer_tag": share(rule == ANSWER_TAG for rule in rules),
        "end_token": share(record.finish_reason == "stop" for record in records),
        "looping": share(value > LOOPING for value in repeated),
        "repeated_ngrams": sum(repeated) / len(repeated) if repeated else 0.0,
    }


def repeated_ngrams(record: Record) -> float:
    """Share of the n-grams of words that stood there before, as the reward term `repetition` counts them."""
    verdict = Verdict(record.verdict, 0.0, record.extracted, record.rule)
    problem = Problem(record.id, record.question, record.answer)
    return max(0.0, -repetition(RewardInput(verdict, record.completion, problem)))


def verdict_counts(records: Sequence[Record]) -> dict[str, int]:
    """Number of responses by the verifier's word, those that did not occur included."""
    found = Counter(record.verdict for record in records)
    return {name: found[name] for name in get_args(VerdictName)}


def mean_tokens(records: Sequence[Record]) -> dict[str, float | None]:
    """Mean length in tokens of all, of right and of other responses; None where there are none."""

    def mean(chosen: Sequence[Record]) -> float | None:
        return sum(record.num_tokens for record in chosen) / len(chosen) if chosen else None

    return {
        "all": mean(records),
        "correct": mean([record for record in records if record.correct]),
        "not_correct": mean([record for record in records if not record.correct]),
    }
