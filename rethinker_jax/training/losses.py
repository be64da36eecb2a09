"""The losses: pure functions of arrays. Everything they need is an argument.

Normalisers are counts over the *global* batch, given from outside, so that the sum over micro-batches is the loss of
the whole batch, however it is split (a mean inside each micro-batch is not, and neither is a mean of devices' means).
Rows are never split, so what is averaged over a row's tokens may be averaged here.

Notation: π the policy, π_old what the rows were drawn by, ρ = π / π_old, A the row's advantage, m the mask of the
policy gradient, sg = no gradient flows through.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

from rethinker_jax.config import LossConfig

MAX_LOG_RATIO = 20.0  # beyond it the KL estimates are flat, as in EasyR1: e^20 is 5e8
MAX_KL_ERROR = 0.2  # of the adaptive controller


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """What each token counts for in each loss; float32 [rows, length], already divided by the global normaliser."""

    policy: jax.Array
    nll: jax.Array
    entropy: jax.Array  # also of the metrics: the mean over policy tokens


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """A policy loss, all [rows, length]: of every token, the ratio that was looked at, and where bounds cut it off.

    clipped_low, clipped_high: the ratio is outside of its bounds and the gradient is bounded or gone for it.
    clipped_dual: the same for the bound of the dual clip.
    """

    loss: jax.Array
    ratio: jax.Array
    clipped_low: jax.Array
    clipped_high: jax.Array
    clipped_dual: jax.Array


def token_weights(
    loss_mask: Bool[Array, "rows length"],
    nll_mask: Bool[Array, "rows length"],
    num_policy: Float[Array, ""],
    num_nll: Float[Array, ""],
    num_rows: Float[Array, ""],
    aggregation: str,
    constant_length: int = 0,
) -> Weights:
    """Weights of the tokens of some rows of a batch.

    token_mean: every policy token of the global batch counts the same (DAPO, arXiv 2503.14476, eq. 8).
    sequence_mean: every row counts the same, its tokens share its weight (GRPO, arXiv 2402.03300, eq. 3).
    constant: the sum over a row's tokens / `constant_length`, then the mean over rows: neither long rows nor long
    batches are weighed down (Dr. GRPO, arXiv 2503.20783).
    `num_*` are counts over the global batch: policy tokens, NLL tokens, rows with a policy token.
    """
    policy = loss_mask.astype(jnp.float32)
    token_mean = policy / jnp.maximum(num_policy, 1.0)
    if aggregation == "sequence_mean":
        lengths = jnp.maximum(policy.sum(axis=1, keepdims=True), 1.0)
        weights = policy / lengths / jnp.maximum(num_rows, 1.0)
    elif aggregation == "constant":
        if constant_length < 1:
            raise ValueError(f"aggregation constant wants a constant_length of at least 1, came {constant_length}")
        weights = policy / constant_length / jnp.maximum(num_rows, 1.0)
    else:
        weights = token_mean
    return Weights(weights, nll_mask.astype(jnp.float32) / jnp.maximum(num_nll, 1.0), token_mean)


def clipped_policy_loss(
    policy_log_probs: Float[Array, "rows length"],
    old_log_probs: Float[Array, "rows length"],
    advantages: Float[Array, " rows"],
    mask: Bool[Array, "rows length"],
    config: LossConfig,
) -> PolicyLoss:
    """−min(ρA, clip(ρ, 1 − low, 1 + high)·A) (PPO, arXiv 1707.06347, eq. 7; clip-higher: DAPO, arXiv 2503.14476).

    With `dual_clip` c, where A < 0: at most −cA, so that a token that became much likelier is not pushed without a
    bound (arXiv 1912.09729). VL-Rethinker's released code uses 0.2, 0.35 and none; its paper prints a
    symmetric ε.
    """
    ratio = jnp.exp(policy_log_probs - old_log_probs)
    scale, low, high = advantages[:, None], 1.0 - config.clip_low, 1.0 + config.clip_high
    loss = jnp.maximum(-ratio * scale, -jnp.clip(ratio, low, high) * scale)
    dual = jnp.zeros_like(mask)
    if config.dual_clip:
        loss = jnp.where(scale < 0, jnp.minimum(loss, -config.dual_clip * scale), loss)
        dual = (ratio > config.dual_clip) & (scale < 0)
    return PolicyLoss(loss, ratio, (ratio < low) & (scale < 0), (ratio > high) & (scale > 0), dual)


def gspo_policy_loss(
    policy_log_probs: Float[Array, "rows length"],
    old_log_probs: Float[Array, "rows length"],
    advantages: Float[Array, " rows"],
    mask: Bool[Array, "rows length"],
    config: LossConfig,
) -> PolicyLoss:
    """−min(sA, clip(s, 1 − low, 1 + high)·A) at every token, s = exp(mean of log ρ over the row's policy tokens).

    GSPO, arXiv 2507.18071, eqs. 5 to 7, which has `aggregation: sequence_mean` and bounds of 3e-4 and 4e-4: s moves far
    less than ρ. GSPO-token has the same gradient wherever a row's tokens share one advantage, as they do here.
    """
    weights = mask.astype(jnp.float32)
    log_ratio = jnp.where(mask, policy_log_probs - old_log_probs, 0.0)
    lengths = jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)
    mean = log_ratio.sum(axis=1, keepdims=True) / lengths
    rows = jnp.broadcast_to(mean, mask.shape)
    return clipped_policy_loss(rows, jnp.zeros_like(rows), advantages, mask, config)


def cispo_policy_loss(
    policy_log_probs: Float[Array, "rows length"],
    old_log_probs: Float[Array, "rows length"],
    advantages: Float[Array, " rows"],
    mask: Bool[Array, "rows length"],
    config: LossConfig,
) -> PolicyLoss:
    """−sg(clip(ρ, 1 − low, 1 + high))·A·log π: every token keeps a gradient, its weight is bounded.

    CISPO, MiniMax-M1, arXiv 2506.13585. The paper has no lower bound: `clip_low: 1`.
    """
    ratio = jnp.exp(policy_log_probs - old_log_probs)
    low, high = 1.0 - config.clip_low, 1.0 + config.clip_high
    weight = stop_gradient(jnp.clip(ratio, low, high))
    loss = -weight * advantages[:, None] * policy_log_probs
    return PolicyLoss(loss, ratio, ratio < low, ratio > high, jnp.zeros_like(mask))


def sapo_policy_loss(
    policy_log_probs: Float[Array, "rows length"],
    old_log_probs: Float[Array, "rows length"],
    advantages: Float[Array, " rows"],
    mask: Bool[Array, "rows length"],
    config: LossConfig,
) -> PolicyLoss:
    """−(4 / τ)·σ(τ(ρ − 1))·A, τ by the sign of A: a gate that closes softly, with slope 1 at ρ = 1 (SAPO, 2511.20347).

    Nothing is cut off; `clip_low` and `clip_high` are not read.
    """
    ratio, scale = jnp.exp(policy_log_probs - old_log_probs), advantages[:, None]
    tau = jnp.where(scale > 0, config.sapo_tau_positive, config.sapo_tau_negative)
    loss = -4.0 / tau * jax.nn.sigmoid(tau * (ratio - 1.0)) * scale
    nowhere = jnp.zeros_like(mask)
    return PolicyLoss(loss, ratio, nowhere, nowhere, nowhere)


PolicyLossFunction = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, LossConfig], PolicyLoss]
POLICY_LOSSES: Mapping[str, PolicyLossFunction] = {
    "clipped": clipped_policy_loss,
    "gspo": gspo_policy_loss,
    "cispo": cispo_policy_loss,
    "sapo": sapo_policy_loss,
}


def truncated_importance(
    old_log_probs: Float[Array, "rows length"], sampler_log_probs: Float[Array, "rows length"], cap: float
) -> Float[Array, "rows length"]:
    """sg(min(π_old / π_sampler, cap)): corrects for tokens that were drawn by a sampler other than the trainer's π_old.

    Truncated importance sampling, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"; the truncation is that of Ionides 2008.
    """
    return stop_gradient(jnp.minimum(jnp.exp(old_log_probs - sampler_log_probs), cap))


def kl_estimate(
    policy_log_probs: Float[Array, "rows length"], ref_log_probs: Float[Array, "rows length"], estimator: str
) -> Float[Array, "rows length"]:
    """Estimates of KL(π ‖ π_ref) from tokens drawn by π; Schulman 2020, "Approximating KL divergence".

    With d = log π − log π_ref, bounded by ±`MAX_LOG_RATIO`: k1 = d, k2 = d²/2, k3 = exp(−d) − 1 + d (GRPO, eq. 4).
    k1 and k3 have the right mean, k2 and k3 are never negative. As a term of the loss only k2 has the KL's gradient in
    expectation; that of k1 is 0, so k1 belongs into the reward.
    """
    d = jnp.clip(policy_log_probs - ref_log_probs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return d
    return 0.5 * d**2 if estimator == "k2" else jnp.exp(-d) - 1.0 + d


def next_kl_coefficient(config: LossConfig, coefficient: float, kl: float, num_rows: int) -> float:
    """The coefficient after `num_rows` rows whose mean KL a token was `kl`: pulled to `kl_target` by a proportional
    controller (Ziegler et al. 2019, arXiv 1909.08593), or unchanged with the controller `fixed`.

    A KL that is not finite, of an update that was skipped, changes nothing.
    """
    if config.kl_controller == "fixed" or not abs(kl) < float("inf"):
        return coefficient
    error = min(max(kl / config.kl_target - 1.0, -MAX_KL_ERROR), MAX_KL_ERROR)
    return coefficient * (1.0 + error * num_rows / config.kl_horizon)
