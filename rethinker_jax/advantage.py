"""Advantages of the rollouts of a group: how much better than its siblings each one did. numpy only."""

from typing import Literal

import numpy as np

Estimator = Literal["group_mean", "group_std", "rloo"]
ROUNDING = 1e-9  # a std at or below this comes of equal rewards


def group_advantages(rewards: np.ndarray, first_rewards: np.ndarray, estimator: Estimator) -> np.ndarray:
    """float32 [groups, n] advantages of `rewards` [groups, n].

    The baseline is made from `first_rewards` [groups, n], those of the first responses, before Forced Rethinking put
    chosen successes among them: otherwise each forced success would lower its honest siblings (the released code does).
    Without rethinking the two are equal.

    group_mean: r − mean (VL-Rethinker's code; its printed formula has a std that its authors say they do not use).
    group_std:  (r − mean) / std, the std over first and final rewards together, divisor n (GRPO, arXiv 2402.03300,
                §4.1).
    rloo:       r − mean of the n − 1 other first rewards (arXiv 2402.14740, eq. 8).
    """
    rewards, first_rewards = rewards.astype(np.float64), first_rewards.astype(np.float64)
    n = rewards.shape[1]
    if estimator == "rloo":
        others = (first_rewards.sum(axis=1, keepdims=True) - first_rewards) / max(n - 1, 1)
        return (rewards - others).astype(np.float32)
    advantages = rewards - first_rewards.mean(axis=1, keepdims=True)
    if estimator == "group_std":
        std = np.concatenate([rewards, first_rewards], axis=1).std(axis=1, keepdims=True)
        advantages = np.divide(advantages, std, out=np.zeros_like(advantages), where=std > ROUNDING)
    return advantages.astype(np.float32)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples is correct (Codex, arXiv 2107.03374, eq. 1)."""
    if k > num_samples:
        raise ValueError(f"pass@{k} wants at least {k} samples, came {num_samples}")
    if num_samples - num_correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(num_samples - num_correct + 1, num_samples + 1)))
