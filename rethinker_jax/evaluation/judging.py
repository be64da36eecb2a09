"""Records, judged: strictly, by the rule of the training reward, and leniently, where any stated answer counts.

A protocol may say where a response's answer stands; strictly, it counts only there. A record with several golds is
right where it agrees with one of them.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from rethinker_jax import __version__, benchmarks, verify
from rethinker_jax.benchmarks.lenient import lenient_response
from rethinker_jax.benchmarks.protocols import Extraction
from rethinker_jax.benchmarks.records import Record
from rethinker_jax.config import VerifierConfig
from rethinker_jax.output_files import Row, versions
from rethinker_jax.types import Verdict, VerdictName
from rethinker_jax.verify.judge import JudgeItem
from rethinker_jax.verify.pool import PendingVerdicts, VerifierPool

JUDGE_PACKAGES = ("rethinker_jax", "math-verify", "sympy", "latex2sympy2_extended")
# What counts among the verdicts of one response, by several readings and golds: first to last.
WEIGHT: tuple[VerdictName, ...] = ("correct", "timeout", "crash", "wrong", "no_answer", "bad_gold")


class Judging:
    """Records on their way through the verifier's pool: `submit` returns at once, `ready` has what was judged since."""

    def __init__(self, pool: VerifierPool, extraction: Extraction = "boxed"):
        self._pool = pool
        self._extraction: Extraction = extraction
        self._waiting: list[tuple[Record, list[PendingVerdicts]]] = []

    def submit(self, records: Sequence[Record]) -> None:
        """Asks for all verdicts of the records; those that they have are not looked at."""
        for record in records:
            readings = [as_judged(record.completion, self._extraction), [lenient_response(record.completion)]]
            if record.forced:
                readings.append(as_judged(record.forced, self._extraction))
            self._waiting.append((record, [self._ask(record, texts) for texts in readings]))

    def _ask(self, record: Record, texts: Sequence[str]) -> PendingVerdicts:
        """Every reading of a response against every gold."""
        golds = (record.answer, *record.alternatives)
        return self._pool.submit(
            [JudgeItem(text, gold, record.choices, record.type) for text in texts for gold in golds]
        )

    def ready(self, *, wait: bool = False) -> list[Record]:
        """The records whose verdicts are all there, in the order in which they were submitted; with `wait`, all."""
        ready, waiting = [], []
        for record, pending in self._waiting:
            if wait or all(one.done() for one in pending):
                ready.append(_judged(record, pending))
            else:
                waiting.append((record, pending))
        self._waiting = waiting
        return ready


def as_judged(response: str, extraction: Extraction) -> list[str]:
    """The readings of a response by a protocol's extraction, as texts whose answer the verifier finds.

    boxed is the training rule. answer_tag: from the last <answer> to the </answer> that follows it, and nothing where
    either is missing. boxed_or_line: the training rule, or what follows the last "Answer:"; any of them may be right.
    """
    if extraction == "boxed":
        return [response]
    if extraction == "answer_tag":
        start = response.rfind("<answer>")
        end = response.find("</answer>", start) if start >= 0 else -1
        return [response[start : end + len("</answer>")] if end >= 0 else ""]
    _, found, line = response.rpartition("Answer:")
    line = line.strip().partition("\n")[0].strip()
    return [response, f"<answer>{line}</answer>"] if found and line else [response]


def _judged(record: Record, pending: Sequence[PendingVerdicts]) -> Record:
    strict, lenient, *forced = (_best(one.result()) for one in pending)
    record = dataclasses.replace(
        record,
        verdict=strict.verdict,
        extracted=strict.extracted,
        rule=strict.rule,
        lenient="correct" if strict.correct else lenient.verdict,
    )
    if not forced:
        return record
    return dataclasses.replace(record, forced_verdict=forced[0].verdict, forced_extracted=forced[0].extracted)


def _best(verdicts: Sequence[Verdict]) -> Verdict:
    """The first of those that say most.

    One that is right decides; where none is, a failure of the judge goes before `wrong`, because it may hide a right
    one. A reading without an answer, and a bad gold, say nothing where another reading or gold is judged.
    """
    return min(verdicts, key=lambda verdict: WEIGHT.index(verdict.verdict))


def judge_identity(config: VerifierConfig) -> Row:
    """Who judged: a hash of the rules' sources, the packages that they use, and the limits that decide."""
    sources = sorted(Path(verify.__file__).parent.glob("*.py"))
    sources += [Path(benchmarks.__file__).parent / "lenient.py", Path(__file__)]
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.name.encode() + b"\n" + source.read_bytes())
    return {
        "name": "rethinker_jax.verify",
        "version": __version__,
        "rules": digest.hexdigest(),
        "cpu_limit_s": config.cpu_limit_s,
        "deadline_s": config.deadline_s,
        "memory_mb": config.memory_mb,
        **versions(JUDGE_PACKAGES),
    }
