"""Two evaluations of one benchmark, item by item: is the one better, by how much, and where do they part.

On the same items most of the noise is common to both, so the interval of the difference is far narrower than the two
intervals suggest.
"""

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rethinker_jax.benchmarks.accuracy import clusters_of
from rethinker_jax.benchmarks.boundary import SolvableSets, shared_items, solvable_sets
from rethinker_jax.benchmarks.groups import ItemSamples, group_records, item_of
from rethinker_jax.benchmarks.intervals import Interval, mean_intervals
from rethinker_jax.benchmarks.record_files import generations_path, read_records
from rethinker_jax.benchmarks.records import Record
from rethinker_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """One evaluation: its name in tables, its result file's content, and the scored items behind it."""

    name: str
    result: Mapping[str, Any]
    items: tuple[ItemSamples, ...]


@dataclasses.dataclass(frozen=True)
class Flip:
    """An item on which the two differ: shares of right samples, and the most frequent answer of each (None = none)."""

    id: str
    gold: str
    accuracy_a: float
    accuracy_b: float
    answer_a: str | None
    answer_b: str | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """b against a, over the items that both have.

    difference         mean over items of accuracy b - a, with its cluster-bootstrap interval.
    a_better, b_better numbers of items; p_value is of the two-sided sign test on them, which for one sample an item is
                       McNemar's exact test. It takes items as independent: with clusters trust the interval.
    only_in_a, _b      ids that the other does not have; `changed`: the same id with another question or answer.
    protocol           key → the two values, where they differ.
    flips              largest difference first.
    """

    a: str
    b: str
    num_paired: int
    difference: Interval
    a_better: int
    b_better: int
    equal: int
    p_value: float
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    changed: tuple[str, ...]
    protocol: Mapping[str, tuple[Any, Any]]
    flips: tuple[Flip, ...]
    solvable: SolvableSets


def read_run(path: Path, name: str = "") -> Run:
    """A result file and the generations beside it. Raises UserError."""
    result = read_result(path)
    generations = generations_path(path)
    items = tuple(item for item in group_records(read_records(generations)) if item.first.scored)
    if len(items) != result["num_problems"]:
        raise UserError(
            f"{path} is over {result['num_problems']} scored items, and {generations} holds {len(items)}: they do not "
            "belong together. Judge the generations again (--regrade), or evaluate again."
        )
    return Run(name or path.stem, result, items)


def read_result(path: Path) -> dict[str, Any]:
    """The object of a result file with the keys that tables and comparisons need. Raises UserError."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"wanted a result file of `evaluate`, got {path} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"wanted a result file of `evaluate`, got {path}, which is not JSON ({error})") from error
    problem = _result_problem(found)
    if problem:
        raise UserError(f"wanted a result file of `evaluate`, got {path}: {problem}")
    return found


def _result_problem(found: Any) -> str:
    if not isinstance(found, dict):
        return f"a JSON object is wanted, not {type(found).__name__}"
    if not isinstance(found.get("benchmark"), str):
        return "benchmark is not a text"
    if not isinstance(found.get("protocol"), dict):
        return "protocol is not an object"
    for key in ("accuracy", "lenient_accuracy"):
        if not _is_interval(found.get(key)):
            return f"{key} is not an object with the numbers value, low and high"
    for key in ("num_problems", "num_samples"):
        if not _is_number(found.get(key)):
            return f"{key} is not a number"
    curve, categories = found.get("pass@k"), found.get("per_category")
    if not isinstance(curve, dict) or not all(map(_is_number, curve.values())):
        return "pass@k is not an object of numbers"
    if not isinstance(categories, dict) or not all(map(_is_category, categories.values())):
        return "per_category is not an object of dimensions with the accuracy of each value"
    return ""


def _is_category(found: Any) -> bool:
    return isinstance(found, dict) and all(
        isinstance(one, dict) and _is_number(one.get("num_problems")) and _is_interval(one.get("accuracy"))
        for one in found.values()
    )


def _is_interval(found: Any) -> bool:
    return isinstance(found, dict) and all(_is_number(found.get(key)) for key in ("value", "low", "high"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def compare_all(runs: Sequence[Run]) -> list[Comparison]:
    """Every pair of two or more runs, in their order."""
    if len(runs) < 2:
        raise UserError(f"a comparison wants two or more evaluations, came {len(runs)}")
    return [compare(a, b) for a, b in itertools.combinations(runs, 2)]


def compare(a: Run, b: Run) -> Comparison:
    """Raises UserError where the benchmarks differ or no item is shared."""
    if a.result["benchmark"] != b.result["benchmark"]:
        raise UserError(
            f"wanted two evaluations of one benchmark, came {a.name} of {a.result['benchmark']!r} and {b.name} of "
            f"{b.result['benchmark']!r}"
        )
    shared = shared_items(a.items, b.items)
    pairs = [(left, right) for left, right in shared if _same_item(left.first, right.first)]
    if not pairs:
        raise UserError(f"{a.name} and {b.name} have no item in common: compare evaluations of the same data")
    differences = np.array([right.accuracy - left.accuracy for left, right in pairs])
    clusters = clusters_of([left for left, _ in pairs])
    (interval,) = mean_intervals(differences[:, None], clusters, shares=False)
    losses, wins = int((differences < 0).sum()), int((differences > 0).sum())
    ids_a, ids_b = {item.id for item in a.items}, {item.id for item in b.items}
    paired = {left.id for left, _ in pairs}
    return Comparison(
        a=a.name,
        b=b.name,
        num_paired=len(pairs),
        difference=interval,
        a_better=losses,
        b_better=wins,
        equal=len(pairs) - losses - wins,
        p_value=sign_test(wins, losses),
        only_in_a=tuple(sorted(ids_a - ids_b)),
        only_in_b=tuple(sorted(ids_b - ids_a)),
        changed=tuple(left.id for left, _ in shared if left.id not in paired),
        protocol=_differing(a.result["protocol"], b.result["protocol"]),
        flips=_flips(pairs),
        solvable=solvable_sets([left for left, _ in pairs], [right for _, right in pairs]),
    )


def _same_item(a: Record, b: Record) -> bool:
    """Gold boxes are in pixels of the image that each model saw, so they may differ in nothing but scale."""
    if a.type == b.type == "bbox" or ("bbox" in a.answer and "bbox" in b.answer):
        b = dataclasses.replace(b, answer=a.answer)
    return item_of(a) == item_of(b)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of as uneven a split under even odds; 1 where nothing differs."""
    num, fewer = wins + losses, min(wins, losses)
    term = total = 1  # binomial coefficients one from the other: whole numbers, exact for any size
    for i in range(fewer):
        term = term * (num - i) // (i + 1)
        total += term
    return min(1.0, 2 * total / 2**num)


def _flips(pairs: Sequence[tuple[ItemSamples, ItemSamples]]) -> tuple[Flip, ...]:
    flips = [
        Flip(left.id, left.first.answer, left.accuracy, right.accuracy, _usual(left), _usual(right))
        for left, right in pairs
        if left.accuracy != right.accuracy
    ]
    return tuple(sorted(flips, key=lambda flip: (-abs(flip.accuracy_a - flip.accuracy_b), flip.id)))


def _usual(item: ItemSamples) -> str | None:
    """The most frequent extracted answer, as text; None where there is none."""
    counts = Counter(record.extracted for record in item.records if record.extracted is not None)
    return min(counts, key=lambda answer: (-counts[answer], answer)) if counts else None


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (a.get(key), b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key)}
