"""The result of `evaluate`: from judged generations to the numbers of its output file.

The same records give the same bytes, whatever order they are in. There is no NaN in it: what is not defined is null or
left out.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rethinker_jax.benchmarks import accuracy, formats, intervals, majority
from rethinker_jax.benchmarks.accuracy import Accuracy
from rethinker_jax.benchmarks.consistency_scores import chain_scores
from rethinker_jax.benchmarks.groups import ItemSamples, flat, group_records
from rethinker_jax.benchmarks.items import Headline
from rethinker_jax.benchmarks.majority import Same
from rethinker_jax.benchmarks.pass_at_k import pass_at_k_curve, sizes
from rethinker_jax.benchmarks.records import Record
from rethinker_jax.benchmarks.reflection import reflection_numbers
from rethinker_jax.benchmarks.second_look import second_look
from rethinker_jax.errors import UserError

Json = dict[str, Any]


def evaluation_numbers(
    records: Sequence[Record],
    *,
    benchmark: str,
    protocol: Mapping[str, Any],
    headline: Headline = "mean",
    macro_over: str = "",
    same: Same | None = None,
) -> Json:
    """All numbers of one benchmark, as the result file has them.

    `macro_over` is the dimension of a macro headline. `same` groups answers for maj@k; None compares them as texts, and
    the result says so. Items that are not scored are apart, under `unscored`. `num_samples` is of one problem (the
    smallest, should they differ), `num_records` of all. Raises UserError where there is nothing to score.
    """
    items = group_records(records)
    scored = [item for item in items if item.first.scored]
    if not scored:
        raise UserError(
            f"{benchmark}: wanted judged generations of at least one scored item, came {len(records)} records and no "
            f"such item"
        )
    weights = accuracy.headline_weights(scored, headline, macro_over)
    numbers = {
        "benchmark": benchmark,
        "num_problems": len(scored),
        "num_samples": min(item.num_samples for item in scored),
        "num_records": len(flat(scored)),
        "num_uneven": _num_uneven(scored),
        "protocol": dict(protocol),
        "headline": headline,
        "macro_over": macro_over,
        **_scored(scored, weights),
        **_sampled(scored, weights, same),
        **_optional(scored, weights),
        "unscored": _unscored([item for item in items if not item.first.scored]),
    }
    return plain(numbers)


def numbers_text(numbers: Mapping[str, Any]) -> str:
    """The result file: JSON in ASCII, and the same text for the same numbers."""
    return json.dumps(numbers, indent=2, allow_nan=False) + "\n"


def _scored(items: Sequence[ItemSamples], weights: np.ndarray | None) -> Json:
    """What every result has."""
    records = flat(items)
    headline = accuracy.accuracy_of(items, weights)
    lenient = accuracy.lenient_accuracy(items, weights)
    strict = headline.interval
    return {
        "accuracy": strict,
        "intervals": {
            "level": intervals.LEVEL,
            "method": headline.method,
            "num_clusters": len(np.unique(accuracy.clusters_of(items))),
            "resamples": intervals.RESAMPLES,
            "seed": intervals.SEED,
        },
        "no_answer_share": formats.no_answer_share(records),
        "truncated_share": formats.truncated_share(records),
        "per_category": {
            dimension: {value: _accuracy(found) for value, found in values.items()}
            for dimension, values in accuracy.accuracy_by_category(items).items()
        },
        "accuracy_over_items": accuracy.accuracy_of(items).interval,
        "lenient_accuracy": lenient,
        "lenient_gap": lenient.value - strict.value,
        "judged_accuracy": accuracy.judged_accuracy(items),
        "verdicts": formats.verdict_counts(records),
        "format": formats.format_rates(records),
        "mean_tokens": formats.mean_tokens(records),
        "reflection": reflection_numbers(records),
    }


def _sampled(items: Sequence[ItemSamples], weights: np.ndarray | None, same: Same | None) -> Json:
    """What several samples of an item tell; pass@1 alone where there is one."""
    clusters = accuracy.clusters_of(items)
    curve = pass_at_k_curve(items, clusters, weights)
    num = max(curve)
    found: Json = {
        "pass@k": {str(k): interval.value for k, interval in curve.items()},
        "pass@k_intervals": {str(k): interval for k, interval in curve.items()},
        f"avg@{num}": curve[1].value,
    }
    if num == 1:
        found["pass@k_intervals"]["1"] = accuracy.accuracy_of(items, weights).interval
        return found
    groups = majority.candidate_groups(items, same or majority.same_text)
    ks = sizes(num)
    values = intervals.mean_intervals(majority.majority_values(items, groups, ks), clusters, weights)
    entropies = [entropy for votes in groups if (entropy := majority.answer_entropy(votes)) is not None]
    return {
        **found,
        "maj@k": {str(k): interval.value for k, interval in zip(ks, values, strict=True)},
        "maj@k_intervals": {str(k): interval for k, interval in zip(ks, values, strict=True)},
        "answers_grouped_by": "text" if same is None else "verified equivalence",
        "answer_entropy": math.fsum(entropies) / len(entropies) if entropies else None,
        "agreement": math.fsum(majority.agreement(votes) for votes in groups) / len(groups),
        "solve_shares": accuracy.solve_shares(items),
        "difficulty": accuracy.difficulty_bins(items),
    }


def _optional(items: Sequence[ItemSamples], weights: np.ndarray | None) -> Json:
    """What only some benchmarks or protocols have: kinds of question, forced second looks, chains of sub-questions."""
    found: Json = {}
    choosing = [item for item in items if item.is_multiple_choice]
    free = [item for item in items if not item.is_multiple_choice]
    if choosing and free:
        # Guessing lifts pass@k of options towards 1, so the curve is also made without them (arXiv 2504.13837).
        found["free_form"] = _part(free)
        found["multiple_choice"] = {**_part(choosing), "chance": accuracy.chance(choosing)}
    elif choosing:
        found["chance"] = accuracy.chance(choosing)
    looked = second_look(items, weights)
    if looked is not None:
        found["second_look"] = looked
    chains = chain_scores(items)
    if chains is not None:
        found["chains"] = chains
    return found


def _part(items: Sequence[ItemSamples]) -> Json:
    """Accuracy and pass@k of some of the items, over items."""
    curve = pass_at_k_curve(items, accuracy.clusters_of(items))
    return {
        **_accuracy(accuracy.accuracy_of(items)),
        "pass@k": {str(k): interval.value for k, interval in curve.items()},
    }


def _unscored(items: Sequence[ItemSamples]) -> Json:
    records = flat(items)
    return {
        "num_problems": len(items),
        "num_records": len(records),
        "no_answer_share": formats.no_answer_share(records),
        "truncated_share": formats.truncated_share(records),
    }


def _accuracy(found: Accuracy) -> Json:
    return {"num_problems": found.num_problems, "accuracy": found.interval}


def _num_uneven(items: Sequence[ItemSamples]) -> int:
    """Items with more samples than the fewest: 0 in a finished file."""
    fewest = min(item.num_samples for item in items)
    return sum(item.num_samples != fewest for item in items)


def plain(value: Any) -> Any:
    """As JSON has it: dataclasses become objects, numpy numbers Python's. Raises ValueError for what is not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a result holds finite numbers, came {value}")
    return value
