"""Records for the tests of the benchmarks' numbers, with the fields that a case does not care about filled in."""

from typing import Any

from rethinker_jax.benchmarks.records import Record
from rethinker_jax.types import VerdictName


def record(
    id: str = "q",
    sample: int = 0,
    verdict: VerdictName = "correct",
    extracted: str | None = "1",
    completion: str = "So \\boxed{1}.",
    **others,
) -> Record:
    fields: dict[str, Any] = {
        "id": id,
        "sample": sample,
        "question": f"What is {id}?",
        "answer": "1",
        "choices": (),
        "type": "number",
        "categories": {},
        "cluster": "",
        "scored": True,
        "completion": completion,
        "finish_reason": "stop",
        "num_tokens": 5,
        "verdict": verdict,
        "extracted": None if verdict == "no_answer" else extracted,
        "rule": "number:integer",
        "lenient": verdict,
        **others,
    }
    return Record(**fields)


def samples(id: str, marks: str, **others) -> list[Record]:
    """One sample a sign: `+` right, `-` wrong, `0` no answer, `!` a judge's timeout."""
    verdicts: dict[str, VerdictName] = {"+": "correct", "-": "wrong", "0": "no_answer", "!": "timeout"}
    return [
        record(id, number, verdicts[mark], "1" if mark == "+" else "2", **others) for number, mark in enumerate(marks)
    ]
