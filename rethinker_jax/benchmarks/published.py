"""Numbers that papers print, to stand beside one's own: `published.json`, each with its table and its protocol.

They are quoted, not reproduced here. Protocols differ (prompt, number of tokens, judge), and on MathVerse alone the
judge moves accuracy by some six points, so a difference of a point or two says nothing.
"""

import dataclasses
import json
import re
from functools import lru_cache
from importlib import resources


@dataclasses.dataclass(frozen=True)
class PublishedNumber:
    """`value` is an accuracy in percent, as printed; `source` names paper and table."""

    model: str
    benchmark: str
    value: float
    source: str
    protocol: str


@lru_cache(maxsize=1)
def published_numbers() -> tuple[PublishedNumber, ...]:
    """All of them, in the order of the tables."""
    text = (resources.files("rethinker_jax.benchmarks") / "published.json").read_text(encoding="utf-8")
    found = json.loads(text)
    return tuple(
        PublishedNumber(
            row["model"],
            benchmark,
            value,
            found["sources"][row["source"]]["name"],
            found["sources"][row["source"]]["protocol"],
        )
        for row in found["numbers"]
        for benchmark, value in row["values"].items()
    )


def benchmark_key(name: str) -> str:
    """What a benchmark's name is compared by: `MMMU-Pro` and `mmmu_pro` are one."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
