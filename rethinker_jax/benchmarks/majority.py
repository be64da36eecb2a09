r"""Votes among an item's samples: maj@k, agreement and entropy of the answers.

Answers are grouped by verified equivalence, so that 1/2 and 0.5 are one candidate. The verifier may run long on hostile
text, so the comparison is an argument: `verified_same` asks a pool of worker processes. A decimal gold accepts what
rounds to it, so "equal" has a direction there; two answers are one candidate only where each is right with the other as
the gold. The groups do not look at the gold. No answer is no candidate.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from rethinker_jax.benchmarks.groups import ItemSamples
from rethinker_jax.verify.extract import extract
from rethinker_jax.verify.pool import JudgeItem, VerifierPool

MAX_SUBSETS = 16_384  # up to this many subsets all are taken: n = 16 is exact for every k
NUM_DRAWN = 1_000  # subsets otherwise
MAX_LEADERS = 64  # of an item's answers, by frequency, with which the others are compared: 1,024 may all differ
SEED = 0
NO_CANDIDATE = -1


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two extracted answers to one item; are they the same?"""

    left: str
    right: str
    type: str
    choices: tuple[str, ...]


Same = Callable[[Sequence[Pair]], Sequence[bool]]


def verified_same(pool: VerifierPool) -> Same:
    r"""Equality by the verifier, both ways round, many pairs at a time.

    An answer that does not survive being boxed (one with a stray brace) equals none but itself.
    """

    def boxed(answer: str) -> str | None:
        response = f"\\boxed{{{answer}}}"
        return response if extract(response).text == answer.strip(" \n") else None

    def same(pairs: Sequence[Pair]) -> list[bool]:
        items, places = [], []
        for place, pair in enumerate(pairs):
            for answer, gold in ((pair.left, pair.right), (pair.right, pair.left)):
                response = boxed(answer)
                if response is not None:
                    items.append(JudgeItem(response, gold, pair.choices, pair.type))
                    places.append(place)
        right = Counter(place for place, verdict in zip(places, pool.judge_many(items), strict=True) if verdict.correct)
        return [right[place] == 2 for place in range(len(pairs))]

    return same


def same_text(pairs: Sequence[Pair]) -> list[bool]:
    """Equality as texts, for where no verifier is at hand."""
    return [pair.left.strip() == pair.right.strip() for pair in pairs]


def candidate_groups(items: Sequence[ItemSamples], same: Same) -> list[np.ndarray]:
    """For every item an int array [samples]: which candidate each sample votes for, NO_CANDIDATE without an answer.

    In rounds over all items at once: of each item the most frequent answer that has no group yet opens one, and all
    others that have none are compared with it. Past MAX_LEADERS groups the answers left over stand alone.
    """
    left = [Counter(r.extracted for r in item.records if r.extracted is not None) for item in items]
    group_of: list[dict[str, int]] = [{} for _ in items]
    number = 0
    while any(left):
        pairs: list[Pair] = []
        owners: list[tuple[int, str]] = []
        for place, counts in enumerate(left):
            if not counts:
                continue
            if number >= MAX_LEADERS:
                group_of[place] |= {answer: number + i for i, answer in enumerate(sorted(counts))}
                counts.clear()
                continue
            leader = min(counts, key=lambda answer, counts=counts: (-counts[answer], answer))
            del counts[leader]
            group_of[place][leader] = number
            first = items[place].first
            for answer in sorted(counts):
                pairs.append(Pair(leader, answer, first.type, first.choices))
                owners.append((place, answer))
        for (place, answer), equal in zip(owners, same(pairs) if pairs else [], strict=True):
            if equal:
                group_of[place][answer] = number
                del left[place][answer]
        number += 1
    return [
        np.array([NO_CANDIDATE if r.extracted is None else groups[r.extracted] for r in item.records], np.int64)
        for item, groups in zip(items, group_of, strict=True)
    ]


def majority_at_k(groups: np.ndarray, correct: np.ndarray, k: int) -> float:
    """Expected credit of the largest group among k of the samples, drawn without replacement.

    `groups` int [samples] as of `candidate_groups`, `correct` bool [samples]. Tied groups share the credit evenly; a
    group is credited with the share of its votes that are right (1 or 0, unless the verifier contradicts itself);
    nothing where no sample has an answer. Exact where there are few subsets, else by fixed-seed subsets.
    """
    members = _subsets(len(groups), k)
    names = np.unique(groups[groups != NO_CANDIDATE])
    if not len(names):
        return 0.0
    votes = (groups[:, None] == names).astype(np.float32)  # [samples, candidates]
    counts, right = members @ votes, members @ (votes * correct[:, None].astype(np.float32))
    most = counts.max(axis=1, keepdims=True)
    tied = (counts == most) & (most > 0)
    credit = np.divide(right, counts, out=np.zeros_like(right), where=tied).sum(axis=1, dtype=np.float64)
    return float((credit / np.maximum(tied.sum(axis=1), 1)).mean())


@lru_cache(maxsize=64)
def _subsets(n: int, k: int) -> np.ndarray:
    """float32 [subsets, n]: 1 where a sample belongs to the subset; the same subsets for every item."""
    if not 1 <= k <= n:
        raise ValueError(f"maj@{k} wants at least {k} samples, came {n}")
    if math.comb(n, k) <= MAX_SUBSETS:
        places = np.array(list(itertools.combinations(range(n), k)))
    else:
        rng = np.random.default_rng([SEED, n, k])
        places = rng.permuted(np.tile(np.arange(n), (NUM_DRAWN, 1)), axis=1)[:, :k]
    members = np.zeros((len(places), n), np.float32)
    np.put_along_axis(members, places, 1.0, axis=1)
    return members


def majority_values(items: Sequence[ItemSamples], groups: Sequence[np.ndarray], ks: Sequence[int]) -> np.ndarray:
    """float [items, ks]: maj@k of every item."""
    found = np.zeros((len(items), len(ks)))
    for row, (item, votes) in enumerate(zip(items, groups, strict=True)):
        correct = np.array([record.correct for record in item.records])
        for column, k in enumerate(ks):
            found[row, column] = majority_at_k(votes, correct, k)
    return found


def agreement(groups: np.ndarray) -> float:
    """Share of the samples, those without an answer included, that are in the largest group."""
    votes = groups[groups != NO_CANDIDATE]
    return float(np.unique(votes, return_counts=True)[1].max() / len(groups)) if len(votes) else 0.0


def answer_entropy(groups: np.ndarray) -> float | None:
    """Entropy in nats of the distribution of the answers over the groups; None where no sample has an answer."""
    votes = groups[groups != NO_CANDIDATE]
    if not len(votes):
        return None
    shares = np.sort(np.unique(votes, return_counts=True)[1]) / len(votes)
    return max(0.0, -math.fsum(share * math.log(share) for share in shares.tolist()))
