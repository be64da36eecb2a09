"""What filters work on: a problem with its judged samples. Nothing here changes once it is made."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from rethinker_jax.types import FinishReason, VerdictName


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One completion of a problem.

    mean_log_prob  per token, natural log, full softmax at temperature 1, under the model that wrote it.
    same_answer    is it right by the rule of OpenVLThinker's generator; None where nobody asked.
    None           in the other fields: the input does not say.
    """

    number: int
    completion: str
    verdict: VerdictName
    finish_reason: FinishReason | None = None
    num_tokens: int | None = None
    mean_log_prob: float | None = None
    same_answer: bool | None = None

    @property
    def correct(self) -> bool:
        return self.verdict == "correct"

    @property
    def num_words(self) -> int:
        """By white space, as OpenVLThinker's generator counts."""
        return len(self.completion.split())


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """A problem and those of its samples that are left.

    row          its place among the rows that were read.
    num_samples  all samples of it that were judged, and num_correct those with the verdict `correct`: filters do not
                 change these two. Verdicts `bad_gold`, `timeout` and `crash` count as not correct.
    difficulty   the label of its source, "" where there is none.
    columns      the columns of the row that filters ask for.
    """

    row: int
    id: str
    source: str
    samples: tuple[Sample, ...] = ()
    num_samples: int = 0
    num_correct: int = 0
    difficulty: str = ""
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def pass_rate(self) -> float | None:
        return self.num_correct / self.num_samples if self.num_samples else None


def draw(seed: int, *names: object) -> int:
    """A number of 64 bits that depends on the seed and the names alone."""
    text = "\0".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
