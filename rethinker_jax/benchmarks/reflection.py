"""Signs of a second look in responses, by their words: MAYE's five ratios and VL-Rethinker's one.

MAYE (arXiv 2504.02587) looks for its 15 words as substrings, so that "await" and "yet another" count; that count is
kept beside one by whole words, because published numbers were made with it. It averages ratios over processes; here the
counts are pooled. Words are a proxy: what a second look changes is in `second_look`.
"""

import re
from collections.abc import Callable, Sequence

from rethinker_jax.benchmarks.formats import share
from rethinker_jax.benchmarks.records import Record
from rethinker_jax.rethink import rethinks
from rethinker_jax.rewards.answers import count_waits

MAYE_WORDS = (
    "re-check",
    "re-evaluate",
    "re-examine",
    "re-think",
    "recheck",
    "reevaluate",
    "reexamine",
    "reevaluation",
    "rethink",
    "check again",
    "think again",
    "try again",
    "verify",
    "wait",
    "yet",
)
_WHOLE_WORDS = re.compile(rf"\b(?:{'|'.join(MAYE_WORDS)})\b")


def has_substring(text: str) -> bool:
    """Is one of MAYE's words in the text, inside of others too: as its code counts."""
    lowered = text.lower()
    return any(word in lowered for word in MAYE_WORDS)


def has_word(text: str) -> bool:
    """Is one of MAYE's words in the text as a whole word."""
    return _WHOLE_WORDS.search(text.lower()) is not None


def maye_ratios(records: Sequence[Record], reflects: Callable[[str], bool]) -> dict[str, float]:
    """The five ratios under MAYE's names, over pooled counts; 0 where a denominator is 0, as in its code."""
    flags = [(reflects(record.completion), record.correct) for record in records]
    return {
        "reflection_ratio": share(reflected for reflected, _ in flags),
        "reflection_ratio_in_correct_answers": share(reflected for reflected, right in flags if right),
        "reflection_ratio_in_incorrect_answers": share(reflected for reflected, right in flags if not right),
        "correct_ratio_in_reflection_texts": share(right for reflected, right in flags if reflected),
        "correct_ratio_in_no_reflection_texts": share(right for reflected, right in flags if not reflected),
    }


def word_counts(records: Sequence[Record]) -> dict[str, int]:
    """How often each of MAYE's words occurs in all responses together, as a substring."""
    texts = [record.completion.lower() for record in records]
    return {word: sum(text.count(word) for text in texts) for word in MAYE_WORDS}


def reflection_numbers(records: Sequence[Record]) -> dict[str, object]:
    """All of them. `rethinking_ratio` is VL-Rethinker's: the share of responses with "wait," "wait a" or
    "alternatively"; `rethink_ratio` is what training logs, by whole words of a wider list.
    """
    return {
        "rethinking_ratio": share(count_waits(record.completion) > 0 for record in records),
        "rethink_ratio": share(rethinks(record.completion) for record in records),
        "maye_substring": maye_ratios(records, has_substring),
        "maye_words": maye_ratios(records, has_word),
        "word_counts": word_counts(records),
    }
