"""A judged generation: one line of FILE.generations.jsonl, and all that the numbers are made of."""

import dataclasses
from collections.abc import Mapping

from rethinker_jax.types import FinishReason, VerdictName


@dataclasses.dataclass(frozen=True)
class Record:
    """One sample of one item, judged.

    question, answer, choices, type   the item's problem, so that a file can be judged again by itself.
    categories, cluster, scored       as in `Item`.
    completion, finish_reason         what the model wrote, and why it ended; num_tokens with the end token.
    verdict, extracted, rule          strict: by the rule of the training reward.
    lenient                           the verdict where any stated answer counts, boxed or not.
    alternatives                      other golds, as in `Item`.
    forced, forced_*                  the whole text with a second look that was forced, and its verdict ("" = none).
    """

    id: str
    sample: int
    question: str
    answer: str
    choices: tuple[str, ...]
    type: str
    categories: Mapping[str, str]
    cluster: str
    scored: bool
    completion: str
    finish_reason: FinishReason
    num_tokens: int
    verdict: VerdictName
    extracted: str | None
    rule: str
    lenient: VerdictName
    alternatives: tuple[str, ...] = ()
    forced: str = ""
    forced_num_tokens: int = 0
    forced_verdict: VerdictName | None = None
    forced_extracted: str | None = None

    @property
    def correct(self) -> bool:
        return self.verdict == "correct"
