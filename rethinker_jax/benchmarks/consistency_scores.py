"""Consistency of a chain of reasoning with its sub-questions (CURE, arXiv 2309.04461).

A chain is one final question and the sub-questions that lead to it, each an item of its own. An item says which chain
it belongs to, and whether it is the final question, in its categories.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rethinker_jax.benchmarks.groups import ItemSamples
from rethinker_jax.benchmarks.intervals import Interval, ratio_intervals
from rethinker_jax.errors import UserError

CHAIN, ROLE = "chain", "role"  # dimensions of the categories
FINAL, STEP = "final", "step"  # values of ROLE


@dataclasses.dataclass(frozen=True)
class ChainScores:
    """Shares over chains and samples, sample s of the final question with sample s of its steps.

    final R_h, steps R_cot (all steps right), both R_o; forward C_f = P(final right | all steps right), backward
    C_b = P(all steps right | final right), None where the condition never holds. `num_incomplete` chains have lost
    their final question or all steps to rows that could not be used, and are in none of the shares.
    """

    num_chains: int
    num_incomplete: int
    final: Interval
    steps: Interval
    both: Interval
    forward: Interval | None
    backward: Interval | None


def chain_scores(items: Sequence[ItemSamples]) -> ChainScores | None:
    """None where no item belongs to a complete chain.

    Raises UserError for a chain with two final questions or an item of no role, and where the samples differ.
    """
    chains: dict[str, list[ItemSamples]] = {}
    for item in items:
        if CHAIN in item.first.categories:
            chains.setdefault(item.first.categories[CHAIN], []).append(item)
    found_shares = [_chain_shares(name, chains[name]) for name in sorted(chains)]
    shares = np.array([one for one in found_shares if one is not None])  # [chains, 3]
    if not len(shares):
        return None
    final, steps, both = shares.T
    ones = np.ones(len(shares))
    tops = np.stack([final, steps, both, both, both], axis=1)
    bottoms = np.stack([ones, ones, ones, steps, final], axis=1)
    found = ratio_intervals(tops, bottoms, np.arange(len(shares)))
    first, second, third = (interval for interval in found[:3] if interval is not None)
    return ChainScores(len(shares), len(chains) - len(shares), first, second, third, found[3], found[4])


def _chain_shares(name: str, items: Sequence[ItemSamples]) -> tuple[float, float, float] | None:
    """Of a chain's samples, the shares with the final answer, all steps, and both right; None where a part is gone."""
    finals = [item for item in items if item.first.categories.get(ROLE) == FINAL]
    steps = [item for item in items if item.first.categories.get(ROLE) == STEP]
    if len(finals) > 1 or len(finals) + len(steps) != len(items):
        raise UserError(
            f"chain {name!r}: wanted one item with {ROLE} {FINAL!r} and the others with {STEP!r}, came {len(finals)} "
            f"and {len(steps)} of {len(items)}; check the categories of its items"
        )
    if not finals or not steps:
        return None
    numbers = [record.sample for record in finals[0].records]
    for step in steps:
        if [record.sample for record in step.records] != numbers:
            raise UserError(
                f"chain {name!r}: item {step.id!r} has other samples than {finals[0].id!r}; finish the generations"
            )
    final = np.array([record.correct for record in finals[0].records])
    all_steps = np.all([[record.correct for record in step.records] for step in steps], axis=0)
    return float(final.mean()), float(all_steps.mean()), float((final & all_steps).mean())
