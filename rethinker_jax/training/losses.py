"""The losses: pure functions of arrays. Everything they need is an argument.

Normalisers are counts over the *global* batch, given from outside, so that the sum over micro-batches is the loss of
the whole batch, however it is split (a mean inside each micro-batch is not).
"""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """What each token counts for in each loss; float32 [rows, length], already divided by the global normaliser."""

    policy: jax.Array
    nll: jax.Array
    entropy: jax.Array


def token_weights(
    loss_mask: Bool[Array, "rows length"],
    nll_mask: Bool[Array, "rows length"],
    num_policy: Float[Array, ""],
    num_nll: Float[Array, ""],
    num_rows: Float[Array, ""],
    aggregation: str,
) -> Weights:
    """Weights of the tokens of some rows of a batch.

    token_mean: every policy token of the global batch counts the same (DAPO, arXiv 2503.14476, eq. 8).
    sequence_mean: every row counts the same, its tokens share its weight (GRPO, arXiv 2402.03300, eq. 3).
    `num_*` are counts over the global batch: policy tokens, NLL tokens, rows with a policy token.
    """
    policy = loss_mask.astype(jnp.float32)
    token_mean = policy / jnp.maximum(num_policy, 1.0)
    if aggregation == "sequence_mean":
        lengths = jnp.maximum(policy.sum(axis=1, keepdims=True), 1.0)
        weights = policy / lengths / jnp.maximum(num_rows, 1.0)
    else:
        weights = token_mean
    return Weights(weights, nll_mask.astype(jnp.float32) / jnp.maximum(num_nll, 1.0), token_mean)


def clipped_policy_loss(
    policy_log_probs: Float[Array, "rows length"],
    old_log_probs: Float[Array, "rows length"],
    advantages: Float[Array, " rows"],
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, "rows length"], Float[Array, "rows length"]]:
    """Per-token loss −min(ρA, clip(ρ, 1 − low, 1 + high)·A), and ρ (PPO, arXiv 1707.06347, eq. 7; clip-higher: DAPO).

    VL-Rethinker's released code uses 0.2 and 0.35; its paper prints a symmetric ε.
    """
    ratio = jnp.exp(policy_log_probs - old_log_probs)
    scale = advantages[:, None]
    return jnp.maximum(-ratio * scale, -jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * scale), ratio
