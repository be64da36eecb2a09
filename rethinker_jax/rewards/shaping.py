"""Terms that shape how a response is written: its length, its repetitions, its script."""

import math
import re
from collections import Counter

from rethinker_jax.config_rewards import Script
from rethinker_jax.rewards.inputs import RewardInput

MAX_CHARS = 200_000  # of a text that is looked at; of a longer one the two ends
MAX_GRAMS = 16_384  # the last ones of a text
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# A long run without spaces is cut, so that "aaaa..." is a repetition and not one word.
_PIECE = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]{{1,16}}")
_RANGES: dict[Script, tuple[tuple[int, int], ...]] = {
    "latin": ((0x41, 0x5A), (0x61, 0x7A), (0xAA, 0xAA), (0xBA, 0xBA), (0xC0, 0x24F), (0x1E00, 0x1EFF)),
    "han": ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)),
    "japanese": ((0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)),
    "hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF)),
    "cyrillic": ((0x400, 0x52F),),
    "greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "arabic": ((0x600, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF)),
    "hebrew": ((0x590, 0x5FF),),
    "devanagari": ((0x900, 0x97F),),
    "thai": ((0xE00, 0xE7F),),
}


def length(given: RewardInput) -> float:
    """The cosine length reward of Yeo et al. (arXiv 2502.03373) §4.1, or a straight line between the same ends.

    value(t) = long + (short - long) / 2 * (1 + cos(pi * t / T)), with the ends of right or of wrong answers; `over` for
    t >= T. A wrong answer never gets those of a right one, and never more than 0.
    """
    settings, end = given.settings.length, given.settings.length.max_tokens
    if given.num_tokens >= end:
        value = settings.over
    else:
        share = given.num_tokens / end
        left = (1 + math.cos(math.pi * share)) / 2 if settings.shape == "cosine" else 1 - share
        right = given.verdict.correct
        short = settings.correct_short if right else settings.wrong_short
        long = settings.correct_long if right else settings.wrong_long
        value = long + (short - long) * left
    return value if given.verdict.correct else min(value, 0.0)


def soft_overlong(given: RewardInput) -> float:
    """DAPO (arXiv 2503.14476) eq. 13: 0 up to max - buffer tokens, then linearly down to -1 at max, -1 beyond."""
    settings = given.settings.soft_overlong
    over = given.num_tokens - (settings.max_tokens - settings.buffer_tokens)
    return max(min(-over / settings.buffer_tokens, 0.0), -1.0)


def repetition(given: RewardInput) -> float:
    """-(1 - distinct / all) of the n-grams of words: Yeo et al.'s penalty (arXiv 2502.03373) as VLM-R1 has it.

    0 for a response shorter than n words, near -1 for a loop. Of a long response the last 16,384 n-grams count.
    """
    n = given.settings.repetition.ngram
    pieces = _PIECE.findall(_bounded(given.response).lower())[-(MAX_GRAMS + n - 1) :]
    grams = list(zip(*(pieces[start:] for start in range(n)), strict=False))
    return len(set(grams)) / len(grams) - 1.0 if grams else 0.0


def language(given: RewardInput) -> float:
    """The share of the response's letters that are of the wanted script; 0 without any letter.

    DeepSeek-R1 (arXiv 2501.12948) §2.3.2 rewards the share of words in the wanted language; MAYE (arXiv 2504.02587)
    takes 0.1 * the share of Chinese characters. LaTeX commands are left out.
    """
    ranges = _RANGES[given.settings.language.script]
    wanted = letters = 0
    for character, count in Counter(_COMMAND.sub(" ", _bounded(given.response))).items():
        if character.isalpha():
            letters += count
            wanted += count * any(first <= ord(character) <= last for first, last in ranges)
    return wanted / letters if letters else 0.0


def _bounded(text: str) -> str:
    return text if len(text) <= MAX_CHARS else f"{text[: MAX_CHARS // 2]} {text[-MAX_CHARS // 2 :]}"
