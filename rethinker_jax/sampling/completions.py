"""From the loop's arrays to completions: texts, stop strings, first responses as they would have stood alone.

Stop strings are sought in each response alone, in what was drawn: a trigger or a prefix that holds one stops nothing.
Where a completion is cut does not depend on when the host looks.
"""

import bisect
import dataclasses

import numpy as np

from rethinker_jax.prompts.template import ChatTokenizer
from rethinker_jax.sampling.slots import FINISH_REASONS, Outputs
from rethinker_jax.types import FIRST, SECOND, TRIGGER, Completion, FinishReason


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A completion, and the first response as it would have stood alone (None unless a trigger was inserted here)."""

    completion: Completion
    first: Completion | None = None


@dataclasses.dataclass(frozen=True)
class _Stop:
    """A stop string that was drawn: tokens up to it, it included, and the text of its response in front of it."""

    length: int
    text: str


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads rows of `Outputs` that the host holds. `strings` are the stop strings."""

    tokenizer: ChatTokenizer
    strings: tuple[str, ...] = ()

    def stops(self, host: Outputs, row: int, inserted: int) -> bool:
        """Does what was drawn so far hold a stop string, behind the `inserted` first tokens."""
        length = host.lengths[row]
        return self._find_stop(host.tokens[row, :length], host.segments[row, :length], inserted) is not None

    def read(self, host: Outputs, row: int, inserted: int) -> Drawn:
        length = host.lengths[row]
        tokens, segments = host.tokens[row, :length], host.segments[row, :length]
        log_probs, truncated = host.log_probs[row, :length], host.truncated[row, :length]
        stop = self._find_stop(tokens, segments, inserted)
        reason = FINISH_REASONS[host.finish[row]] if stop is None else "stop_string"
        completion = self._completion(tokens, log_probs, truncated, segments, reason, stop)
        if host.first_end_token[row] < 0 or not completion.forced:
            return Drawn(completion)
        count = int((completion.segments == FIRST).sum())
        first = self._completion(
            np.append(completion.token_ids[:count], host.first_end_token[row]).astype(np.int32),
            np.append(log_probs[:count], host.first_end_log_prob[row]).astype(np.float32),
            np.append(truncated[:count], host.first_end_truncated[row]).astype(np.float32),
            np.full(count + 1, FIRST, np.int8),
            "stop",
        )
        return Drawn(completion, first)

    def _find_stop(self, tokens: np.ndarray, segments: np.ndarray, inserted: int) -> _Stop | None:
        """Where the first stop string ends that was drawn behind the `inserted` first tokens."""
        if not self.strings:
            return None
        for segment in (FIRST, SECOND):
            places = np.flatnonzero(segments == segment)
            drawn = places[places >= inserted]

            def text(count: int, drawn: np.ndarray = drawn) -> str:
                return self.tokenizer.decode(tokens[drawn[:count]])

            def holds(count: int, drawn: np.ndarray = drawn) -> bool:
                return any(string in text(count, drawn) for string in self.strings)

            if holds(len(drawn)):
                count = bisect.bisect_left(range(len(drawn) + 1), True, key=holds)
                whole = text(count)
                cut = min(whole.find(string) for string in self.strings if string in whole)
                before = self.tokenizer.decode(tokens[places[places < inserted]])
                return _Stop(int(drawn[count - 1]) + 1, before + whole[:cut])
        return None

    def _completion(
        self,
        token_ids: np.ndarray,
        log_probs: np.ndarray,
        truncated: np.ndarray,
        segments: np.ndarray,
        reason: FinishReason,
        stop: _Stop | None = None,
    ) -> Completion:
        length = len(token_ids) if stop is None else stop.length
        token_ids, log_probs, segments = token_ids[:length], log_probs[:length], segments[:length]
        shown = length - (reason == "stop")  # without the end token
        ids = token_ids[:shown]
        parts = [(n, ids[segments[:shown] == n]) for n in (FIRST, TRIGGER, SECOND)]
        texts = [(number, self.tokenizer.decode(part)) for number, part in parts if len(part)]
        if stop is not None:
            texts[-1] = (texts[-1][0], stop.text)
            text = "".join(text for _, text in texts)
        else:
            text = texts[0][1] if len(texts) == 1 else self.tokenizer.decode(ids)
        return Completion(token_ids, log_probs, segments, reason, text, tuple(texts), truncated[:length])
