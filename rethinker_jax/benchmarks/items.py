"""What a benchmark is made of: items, read from its published schema.

published row → Item → (protocol) → Problem → prompt → completions → Record → numbers
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from rethinker_jax.types import Problem

# How the items' accuracies become the one number that is reported: over all items, or over the means of a category.
Headline = Literal["mean", "macro"]


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    problem     `question` is the bare question with its <image> tags, no options; `choices` are the options' texts,
                `answer` the gold as the verifier judges it, `type` its kind, `id` unique in the benchmark.
    query       the benchmark's own wording of the whole question (hint, question, options), "" where it has none.
    categories  dimension → value, as in {"task": "geometry problem solving", "grade": "high school"}.
    cluster     items of one cluster are drawn together when intervals are made; "" = the item stands alone.
    alternatives  other golds that are right as well (MMMU's open questions), judged by the same type.
    scored      False: generated and shown, and reported apart (MEGA-Bench's open tasks).
    """

    problem: Problem
    query: str = ""
    categories: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cluster: str = ""
    scored: bool = True
    alternatives: tuple[str, ...] = ()
