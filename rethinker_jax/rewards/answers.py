"""Terms that judge the final answer: by the verdict, by its number, by its words, by what it cites.

All of them read the answer that the verifier extracted and pay nothing where there is none. Those that compare it
themselves want a gold of their kind; `terms.check_row` names the rows that have another.
"""

import re
from collections.abc import Sequence
from decimal import Decimal

from rethinker_jax.errors import UserError
from rethinker_jax.rewards.inputs import RewardInput, gold_text
from rethinker_jax.rewards.words import MAX_WORDS, common_subsequence, edit_distance, words
from rethinker_jax.types import Problem
from rethinker_jax.verify.extract import extract

INVALID_REWARD = -0.1
WAIT_BONUS = 1.1
WAIT_COST = 0.2
MAX_WAITS = 5  # occurrences of the letters "wait" in a valid response
UNREASONED_REWARD = 0.5
MAX_NUMBER_CHARS = 64
MAX_CITATIONS = 100
MAX_CITATION_CHARS = 4000
_NUMBER = re.compile(r"[-+]?(?=[.\d])(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?", re.ASCII)
_CITED = re.compile(r"[\w.:/#-]+")


def accuracy(given: RewardInput) -> float:
    """1.0 if the verifier says correct, else 0.0: the reward of VL-Rethinker §2.1."""
    return 1.0 if given.verdict.correct else 0.0


def vl_rethinker_code(given: RewardInput) -> float:
    """VL-Rethinker's released code: invalid -0.1, one or two native waits 1.1, else 0.2 less per wait.

    The bonus is kept to valid responses; the code let it overwrite the penalty for an unfinished one, which is a bug.
    """
    num_waits = count_waits(given.response)
    valid = given.stopped and given.response.lower().count("wait") <= MAX_WAITS
    if not valid:
        return INVALID_REWARD
    if given.forced or not given.verdict.correct:
        return accuracy(given)
    if 0 < num_waits < 3:
        return WAIT_BONUS
    return max(1.0 - WAIT_COST * num_waits, INVALID_REWARD)


def count_waits(response: str) -> int:
    """The code's count of rethinking: `wait,`, `wait a` and `alternatively`, in any case."""
    lowered = response.lower()
    return sum(lowered.count(phrase) for phrase in ("wait,", "wait a", "alternatively"))


def openvlthinker(given: RewardInput) -> float:
    """OpenVLThinker's released reward: accuracy alone, halved where the final answer has no reasoning before it.

    Its quirks are kept: the *first* `<answer>` that closes on its own line counts, without one the whole response does,
    and text in a box but no tag is therefore wrong. 0.5 instead of 1 where nothing stands between the last `</think>`
    and `<answer>`. Whether an answer is equal is our verifier's to say, not MathRuler's.
    """
    tagged = _first_answer_line(given.response)
    stated = (given.response if tagged is None else tagged).strip()
    same = stated.lower() == given.problem.answer.strip().lower()
    judged = tagged is not None and extract(f"<answer>{stated}</answer>").text == given.answer
    if not (same or (judged and given.verdict.correct)):
        return 0.0
    if "</think>" in given.response and "<answer>" in given.response:
        after = given.response[given.response.rindex("</think>") + len("</think>") :]
        if not after.partition("<answer>")[0].strip():
            return UNREASONED_REWARD
    return 1.0


def _first_answer_line(response: str) -> str | None:
    """What the first `<answer>` holds that is closed on its line: the published pattern, which has no DOTALL."""
    for line in response.split("\n"):
        begin = line.find("<answer>")
        close = line.find("</answer>", begin + len("<answer>")) if begin >= 0 else -1
        if close >= 0:
            return line[begin + len("<answer>") : close]
    return None


def digit(given: RewardInput) -> float:
    """1.0 where the answer is a number in digits and that of the gold (VLAA-Thinking's and VLM-R1's digit reward)."""
    answer = read_number(given.answer)
    return 1.0 if answer is not None and answer == _gold_number(given.problem, "digit") else 0.0


def regression(given: RewardInput) -> float:
    """1 - min(1, |answer - gold| / |gold|), as Video-R1 rewards regression; with a gold of 0, 1.0 for 0 alone."""
    answer, gold = read_number(given.answer), _gold_number(given.problem, "regression")
    if answer is None:
        return 0.0
    if gold == 0:
        return 1.0 if answer == 0 else 0.0
    return 1.0 - float(min(Decimal(1), abs(answer - gold) / abs(gold)))


def read_number(text: str | None) -> Decimal | None:
    """A number in digits, alone but for `$`, spaces, a last full stop and separators of thousands. Exact."""
    if text is None or len(text) > MAX_NUMBER_CHARS:
        return None
    text = text.strip().strip("$").strip().replace("−", "-").removesuffix(".")
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def _gold_number(problem: Problem, term: str) -> Decimal:
    number = read_number(gold_text(problem))
    if number is None:
        raise UserError(f"{_row(problem, term)} wants a number in digits as answer; it is {problem.answer!r:.80}.")
    return number


def ocr(given: RewardInput) -> float:
    """1 - error rate, not below 0, as Video-R1 rewards reading text (OCR): edits / words or characters of the gold.

    Case and punctuation count, the amount of white space does not.
    """
    if given.answer is None:
        return 0.0
    gold, answer = (_units(text, given.settings.ocr.unit) for text in (gold_text(given.problem), given.answer))
    if len(answer) >= 2 * len(gold) or len(gold) > MAX_WORDS:  # that many insertions alone are an error rate of 1
        return 0.0
    return max(0.0, 1.0 - edit_distance(gold, answer) / len(gold))


def _units(text: str, unit: str) -> Sequence[str]:
    parts = text.split()
    return parts if unit == "word" else " ".join(parts)


def rouge(given: RewardInput) -> float:
    """Mean of the F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), as Video-R1 rewards free text.

    Whole words in lower case, no stemming. ROUGE-2 is left out of the mean where the gold has one word.
    """
    gold, answer = words(gold_text(given.problem)), words(given.answer or "")
    if not answer or not gold or max(len(answer), len(gold)) > MAX_WORDS:
        return 0.0
    scores = [_f1(_overlap(gold, answer, n), len(gold) - n + 1, len(answer) - n + 1) for n in (1, 2) if len(gold) >= n]
    scores.append(_f1(common_subsequence(gold, answer), len(gold), len(answer)))
    return sum(scores) / len(scores)


def _overlap(gold: Sequence[str], answer: Sequence[str], n: int) -> int:
    """How many n-grams the two share, each as often as it stands in both."""
    left: dict[tuple[str, ...], int] = {}
    for start in range(len(gold) - n + 1):
        gram = tuple(gold[start : start + n])
        left[gram] = left.get(gram, 0) + 1
    shared = 0
    for start in range(len(answer) - n + 1):
        gram = tuple(answer[start : start + n])
        if left.get(gram, 0) > 0:
            left[gram] -= 1
            shared += 1
    return shared


def _f1(shared: int, num_gold: int, num_answer: int) -> float:
    """2PR / (P + R), which is 2 * shared / (gold + answer); 0 where either is empty."""
    return 2 * shared / (num_gold + num_answer) if num_gold > 0 and num_answer > 0 else 0.0


def citation_f1(given: RewardInput) -> float:
    """How well the response cites, after RAG-RL (arXiv 2503.12759): the names in its last `<citations>` element.

    Form f1: F1 of the cited set against the row's. Form credit: `right` * recall - `wrong` * number of wrong citations,
    with RAG-RL's constants 5 and 2. A name counts once however often it is cited.
    """
    settings = given.settings.citation
    gold = read_citations(given.problem, settings.column)
    cited = _cited(given.response, settings.tag)
    if cited is None:
        return 0.0
    right, wrong = len(gold & cited), len(cited - gold)
    if settings.form == "f1":
        return _f1(right, len(gold), len(cited)) if gold else float(not cited)
    return settings.right * (right / len(gold) if gold else float(not cited)) - settings.wrong * wrong


def read_citations(problem: Problem, column: str) -> frozenset[str]:
    """The documents that support a row's answer. Raises UserError where the row does not say."""
    value = problem.row.get(column)
    if not isinstance(value, list | tuple):
        raise UserError(
            f"{_row(problem, 'citation_f1')} wants a list in the column {column!r} (reward.citation.column); it holds "
            f"{value!r:.80}."
        )
    return frozenset(str(one).strip() for one in value)


def _cited(response: str, tag: str) -> frozenset[str] | None:
    """The names in the last complete element, None where there is none or it holds too much to be a list."""
    close = response.rfind(f"</{tag}>")
    begin = response.rfind(f"<{tag}>", 0, max(close, 0))
    if begin < 0 or close - begin > MAX_CITATION_CHARS:
        return None
    found = frozenset(_CITED.findall(response[begin + len(tag) + 2 : close]))
    return found if len(found) <= MAX_CITATIONS else None


def _row(problem: Problem, term: str) -> str:
    return f"row {problem.id!r}: the reward term {term}"
