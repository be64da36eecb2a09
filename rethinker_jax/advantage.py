"""Advantages of the rollouts of a group: how much better than its siblings each one did. numpy only.

Baselines are made from the rewards of the *first* responses, before Forced Rethinking put chosen successes among them:
otherwise each forced success would lower its honest siblings, as in VL-Rethinker's released code, whose way
(`rethink.baseline: final`) is to give the final rewards for first ones too. Estimators that look at the whole group
look at it as each sample would find it: its own reward among the first rewards of its siblings.
Without rethinking first and final rewards are equal. Where kept second looks are added to their group instead of taking
a first response's place, `advantages_with_added` gives them what they would have had there.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from rethinker_jax.config import Estimator

ROUNDING = 1e-9  # a std at or below this comes of equal rewards
TIE_DECIMALS = 6  # rewards that agree in these are tied


@dataclasses.dataclass(frozen=True)
class GroupRewards:
    """What estimators see of a rollout batch, float64.

    final, first: [groups, n] rewards of what is trained on, and of the first responses. lengths: [groups, n] tokens of
    the policy gradient. greedy: [groups, 1] rewards of the greedy responses, NaN where none were drawn. k: of pass@k.
    """

    final: np.ndarray
    first: np.ndarray
    lengths: np.ndarray
    greedy: np.ndarray
    k: int

    @property
    def as_found(self) -> np.ndarray:
        """[groups, n, n]: in row i the first rewards of the group, with sample i's final reward in its place."""
        n = self.final.shape[1]
        found = np.repeat(self.first[:, None], n, axis=1)
        found[:, np.arange(n), np.arange(n)] = self.final
        return found


def group_advantages(
    rewards: np.ndarray,
    first_rewards: np.ndarray,
    estimator: Estimator,
    *,
    lengths: np.ndarray | None = None,
    greedy_rewards: np.ndarray | None = None,
    k: int = 1,
) -> np.ndarray:
    """float32 [groups, n] advantages of `rewards` [groups, n] by one of `ESTIMATORS`.

    `lengths` [groups, n] (default: all equal) weigh the samples of reinforce_plus_plus, `greedy_rewards` [groups] are
    ReMax's baseline, `k` is that of pass_at_k. Raises ValueError where remax has no greedy rewards.
    """
    weights = np.ones(rewards.shape) if lengths is None else lengths
    greedy = _greedy(estimator, greedy_rewards, len(rewards))
    [found] = _advantages_of([_group_rewards(rewards, first_rewards, weights, greedy, k)], estimator)
    return found


def advantages_with_added(
    rewards: Sequence[np.ndarray],
    added: Sequence[np.ndarray],
    estimator: Estimator,
    baseline: Literal["first", "final"],
    *,
    lengths: Sequence[np.ndarray],
    greedy_rewards: np.ndarray | None = None,
    k: int = 1,
) -> list[np.ndarray]:
    """float32 [rows] advantages of every group, where kept second looks are rows beside their first responses.

    rewards, added, lengths: [rows] of every group, where `added` says which rows were added, each to the one before it.
    Under baseline `first` a first response has the advantage that it has without rethinking, and an added row that
    which it would have in its first response's place. Under `final` a group is all of its rows. `WHITENED` estimators
    whiten over all rows of the batch either way.
    """
    greedy = _greedy(estimator, greedy_rewards, len(rewards))
    if baseline == "final":
        groups = zip(rewards, lengths, greedy, strict=True)
        views = [_group_rewards(own[None], own[None], weights[None], one[None], k) for own, weights, one in groups]
        return [found for [found] in _advantages_of(views, estimator)]
    views, places = [], []
    for own, more, weights, one in zip(rewards, added, lengths, greedy, strict=True):
        # Two rows of samples: the first responses, and the added ones among them. No weight where a place has no row.
        row, column = more.astype(int), np.cumsum(~more) - 1
        first = own[~more]
        final, weight = np.stack([first, first]), np.zeros((2, len(first)))
        final[row, column], weight[row, column] = own, weights
        views.append(_group_rewards(final, np.stack([first, first]), weight, np.stack([one, one]), k))
        places.append((row, column))
    return [found[place] for found, place in zip(_advantages_of(views, estimator), places, strict=True)]


def _greedy(estimator: Estimator, rewards: np.ndarray | None, num_groups: int) -> np.ndarray:
    if estimator == "remax" and rewards is None:
        raise ValueError("the estimator remax wants the rewards of greedy responses, came none")
    return np.full((num_groups, 1), np.nan) if rewards is None else rewards[:, None]


def _group_rewards(
    final: np.ndarray, first: np.ndarray, lengths: np.ndarray, greedy: np.ndarray, k: int
) -> GroupRewards:
    return GroupRewards(*(one.astype(np.float64) for one in (final, first, lengths, greedy)), k)


def _advantages_of(parts: Sequence[GroupRewards], estimator: Estimator) -> list[np.ndarray]:
    """float32 [groups, n] advantages of the parts of one rollout batch, by their sizes of groups."""
    found = [ESTIMATORS[estimator](part) for part in parts]
    if estimator in WHITENED:
        values = np.concatenate([one.ravel() for one in found])
        white = _whiten(values, np.concatenate([part.lengths.ravel() for part in parts]))
        ends = np.cumsum([one.size for one in found])[:-1]
        found = [own.reshape(one.shape) for own, one in zip(np.split(white, ends), found, strict=True)]
    return [one.astype(np.float32) for one in found]


def _group_mean(groups: GroupRewards) -> np.ndarray:
    """r − mean. VL-Rethinker's code (its printed formula has a std that its authors say they do not use), and Dr. GRPO,
    arXiv 2503.20783."""
    return groups.final - groups.first.mean(axis=1, keepdims=True)


def _group_std(groups: GroupRewards) -> np.ndarray:
    """(r − mean) / std, the std over first and final rewards together, divisor n. GRPO, arXiv 2402.03300, §4.1."""
    std = np.concatenate([groups.final, groups.first], axis=1).std(axis=1, keepdims=True)
    return _divide(_group_mean(groups), std)


def _rloo(groups: GroupRewards) -> np.ndarray:
    """r − mean of the n − 1 other first rewards. RLOO, arXiv 2402.14740, eq. 8."""
    others = (groups.first.sum(axis=1, keepdims=True) - groups.first) / max(groups.first.shape[1] - 1, 1)
    return groups.final - others


def _remax(groups: GroupRewards) -> np.ndarray:
    """r − the reward of the greedy response to the same prompt. ReMax, arXiv 2310.10505."""
    return groups.final - groups.greedy


def _reinforce_plus_plus(groups: GroupRewards) -> np.ndarray:
    """r, whitened (`WHITENED`) over the policy tokens of the whole rollout batch. REINFORCE++, arXiv 2501.03262.

    With γ = 1 and a reward at the end, every token of a sample has the same return, so a sample counts by its length.
    """
    return groups.final


def _reinforce_plus_plus_baseline(groups: GroupRewards) -> np.ndarray:
    """r − mean of the group, then whitened over the whole rollout batch. REINFORCE++ with baseline, ibid."""
    return _group_mean(groups)


def _pass_at_k(groups: GroupRewards) -> np.ndarray:
    """Pass@k Training, arXiv 2508.10751: what a sample does for the best of k samples.

    A k-subset of the group is worth its best reward. The advantage is the mean worth of the subsets that hold the
    sample, less the mean over all subsets, over their std (closed forms by sorting; with rewards 0 and 1 these are
    the paper's analytical ones). k = 1 is group_std; k = n has one subset, and teaches nothing.
    """
    found, k = groups.as_found, groups.k
    n = found.shape[-1]
    order = np.argsort(found, axis=-1, kind="stable")
    worth = np.take_along_axis(found, order, axis=-1)
    place = np.argmax(order == np.arange(n)[:, None], axis=-1)  # of each sample in its own row
    # The j-th smallest (from 0) is the best of the subsets that take their other k - 1 members below it.
    is_best = np.array([math.comb(j, k - 1) for j in range(n)]) / math.comb(n, k)
    mean = worth @ is_best
    std = np.sqrt((worth - mean[..., None]) ** 2 @ is_best)
    # Subsets that hold the sample: it is the best, or the j-th is, with k - 2 others below that.
    alone = np.array([math.comb(j, k - 1) for j in range(n)])[place]
    above = np.array([math.comb(j - 1, k - 2) if j and k > 1 else 0 for j in range(n)])
    better = np.where(np.arange(n) > place[..., None], worth * above, 0.0).sum(axis=-1)
    with_it = (groups.final * alone + better) / math.comb(n - 1, k - 1)
    return _divide(with_it - mean, std)


def _best_of_n(groups: GroupRewards) -> np.ndarray:
    """(best − best of the others) / std, 0 for all but the best. arXiv 2503.19595; grpo_passk in EasyR1."""
    found = groups.as_found
    n = found.shape[-1]
    others = np.where(np.eye(n, dtype=bool), -np.inf, found).max(axis=-1)
    return _divide(np.maximum(groups.final - others, 0.0), found.std(axis=-1))


def _g2rpo(groups: GroupRewards) -> np.ndarray:
    """The normal quantile Φ⁻¹((rank − 1/2) / n) of the reward's rank. G²RPO, OpenVLThinkerV2 (arXiv 2604.08539).

    Ties share the mean of their quantiles, not the quantile of their mean rank. A group of equal rewards has 0.
    """
    found, own = np.round(groups.as_found, TIE_DECIMALS), np.round(groups.final, TIE_DECIMALS)[..., None]
    n = found.shape[-1]
    quantiles = [statistics.NormalDist().inv_cdf((place + 0.5) / n) for place in range(n)]
    sums = np.concatenate([[0.0], np.cumsum(quantiles)])
    below, up_to = (found < own).sum(axis=-1), (found <= own).sum(axis=-1)
    return np.where(up_to - below == n, 0.0, (sums[up_to] - sums[below]) / (up_to - below))


def _divide(advantages: np.ndarray, std: np.ndarray | np.floating) -> np.ndarray:
    """advantages / std; 0 where the rewards are equal but for rounding."""
    return np.divide(advantages, std, out=np.zeros_like(advantages), where=std > ROUNDING)


def _whiten(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(values − mean) / std, both over all groups, each sample as often as its weight."""
    total = max(weights.sum(), 1.0)
    centred = values - (weights * values).sum() / total
    return _divide(centred, np.sqrt((weights * centred**2).sum() / total))


ESTIMATORS: Mapping[Estimator, Callable[[GroupRewards], np.ndarray]] = {
    "group_mean": _group_mean,
    "group_std": _group_std,
    "rloo": _rloo,
    "remax": _remax,
    "reinforce_plus_plus": _reinforce_plus_plus,
    "reinforce_plus_plus_baseline": _reinforce_plus_plus_baseline,
    "pass_at_k": _pass_at_k,
    "best_of_n": _best_of_n,
    "g2rpo": _g2rpo,
}
WHITENED: frozenset[Estimator] = frozenset({"reinforce_plus_plus", "reinforce_plus_plus_baseline"})


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples is correct (Codex, arXiv 2107.03374, eq. 1)."""
    if k > num_samples:
        raise ValueError(f"pass@{k} wants at least {k} samples, came {num_samples}")
    if num_samples - num_correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(num_samples - num_correct + 1, num_samples + 1)))
