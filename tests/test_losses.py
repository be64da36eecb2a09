"""The losses against loops in numpy, and their normalisers under every split of the batch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rethinker_jax.config import LossConfig
from rethinker_jax.training.losses import clipped_policy_loss, token_weights

LOW, HIGH = 0.2, 0.35
CONFIG = LossConfig(clip_low=LOW, clip_high=HIGH)
AGGREGATIONS = ["token_mean", "sequence_mean", "constant"]
CONSTANT = 7  # longer than any row


def batch(seed=0, rows=8, length=5):
    """Log-probs, advantages of both signs, and ragged masks; row 2 has no policy token."""
    rng = np.random.default_rng(seed)
    new = -rng.exponential(1.0, (rows, length)).astype(np.float32)
    old = new + rng.normal(0, 0.4, (rows, length)).astype(np.float32)
    advantages = rng.normal(size=rows).astype(np.float32)
    mask = np.arange(length) < rng.integers(1, length + 1, rows)[:, None]
    mask[2] = False
    nll_mask = rng.random((rows, length)) < 0.3
    return new, old, advantages, mask, nll_mask


def oracle(new, old, advantages):
    """PPO's clipped loss, one token at a time: -min(ρA, clip(ρ)A)."""
    loss, ratios = np.zeros(new.shape), np.exp(new.astype(np.float64) - old)
    for (i, t), ratio in np.ndenumerate(ratios):
        clipped = min(max(float(ratio), 1 - LOW), 1 + HIGH)
        loss[i, t] = -min(ratio * advantages[i], clipped * advantages[i])
    return loss, ratios


def test_clipped_loss_is_that_of_the_loop():
    """Catches max for min, a swapped pair of bounds, and advantages that spread over tokens instead of rows."""
    new, old, advantages, _, _ = batch()
    found = clipped_policy_loss(*map(jnp.asarray, (new, old, advantages, np.ones(new.shape, bool))), CONFIG)
    loss, ratio = found.loss, found.ratio
    wanted, ratios = oracle(new, old, advantages)
    assert (ratios < 1 - LOW).any() and (ratios > 1 + HIGH).any()
    np.testing.assert_allclose(loss, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ratio, ratios, rtol=1e-5)


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [
        # Praise: paid up to 1.35 and no further; a token that became rarer is still pushed back.
        (1.0, 2.0, -2.0, -2.0),
        (1.3, 2.0, -2.6, -2.6),  # clip-higher: with a symmetric 0.2 this would be -2.4 and flat
        (1.5, 2.0, -2.7, 0.0),
        (0.5, 2.0, -1.0, -1.0),
        # Blame: paid down to 0.8 and no further; a token that became likelier is pushed down without a bound.
        (1.0, -2.0, 2.0, 2.0),
        (0.9, -2.0, 1.8, 1.8),
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_where_the_loss_is_clipped_and_where_it_pulls(ratio, advantage, loss, slope):
    """Slopes are by the log-prob: dρ/dlogp = ρ, so -ρA inside and 0 where clipped."""

    def at(log_prob):
        there = jnp.ones((1, 1), bool)
        return clipped_policy_loss(log_prob, jnp.zeros((1, 1)), jnp.array([advantage]), there, CONFIG).loss.sum()

    value, gradient = jax.value_and_grad(at)(jnp.full((1, 1), np.log(ratio), jnp.float32))
    assert float(value) == pytest.approx(loss, rel=1e-5)
    assert float(gradient[0, 0]) == pytest.approx(slope, rel=1e-5)


def weights_of(mask, nll_mask, aggregation, chosen=slice(None)):
    """Weights of the `chosen` rows of a batch, by the counts of the whole."""
    counts = [jnp.float32(number) for number in (mask.sum(), nll_mask.sum(), mask.any(axis=1).sum())]
    return token_weights(jnp.asarray(mask[chosen]), jnp.asarray(nll_mask[chosen]), *counts, aggregation, CONSTANT)


def test_weights_of_the_aggregations():
    """Two rows of 1 and 3 tokens. token_mean: 1/4 each; sequence_mean: half a row's weight each, so 1/2 and 1/6;
    constant: 1/7 each of half a row. A third row without policy tokens counts in none. Catches GRPO's 1/|y| read as
    DAPO's, and the other way, and a constant over all places, filled or not (3 rows instead of 2)."""
    mask = np.array([[1, 0, 0], [1, 1, 1], [0, 0, 0]], bool)
    nll_mask = np.array([[0, 0, 0], [0, 1, 1], [0, 0, 0]], bool)
    token = weights_of(mask, nll_mask, "token_mean")
    np.testing.assert_allclose(token.policy, mask / 4)
    np.testing.assert_allclose(token.nll, nll_mask / 2)
    sequence = weights_of(mask, nll_mask, "sequence_mean")
    np.testing.assert_allclose(sequence.policy, [[1 / 2, 0, 0], [1 / 6, 1 / 6, 1 / 6], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(sequence.nll, nll_mask / 2)
    np.testing.assert_allclose(sequence.entropy, mask / 4)  # metrics are token means under all
    constant = weights_of(mask, nll_mask, "constant")
    np.testing.assert_allclose(constant.policy, mask / 14, rtol=1e-6)
    np.testing.assert_allclose(constant.nll, nll_mask / 2)


def test_a_constant_must_be_given():
    """Catches a division by the length of the arrays, which padding decides."""
    one = jnp.ones(())
    with pytest.raises(ValueError, match="constant_length of at least 1, came 0"):
        token_weights(jnp.ones((1, 2), bool), jnp.zeros((1, 2), bool), one, one, one, "constant")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_to_learn_weighs_nothing(aggregation):
    """Catches 0/0 in a batch without policy tokens (supervised fine-tuning) or without supervised ones."""
    none = np.zeros((2, 3), bool)
    weights = weights_of(none, none, aggregation)
    assert not np.asarray(weights.policy).any() and not np.asarray(weights.nll).any()


@pytest.mark.parametrize("splits", [(8,), (1,) * 8, (2, 2, 2, 2), (5, 3)])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_split_gives_the_same_loss_and_gradient(aggregation, splits):
    """The sum over micro-batches is the loss of the whole, against a loop in numpy. Catches means inside micro-batches,
    as released (there a token's weight depends on which rows share its micro-batch)."""
    new, old, advantages, mask, nll_mask = batch()
    per_token, _ = oracle(new, old, advantages)
    if aggregation == "token_mean":
        wanted = per_token[mask].mean()
    elif aggregation == "sequence_mean":
        wanted = np.mean([per_token[i][mask[i]].mean() for i in range(8) if mask[i].any()])
    else:
        wanted = np.mean([per_token[i][mask[i]].sum() / CONSTANT for i in range(8) if mask[i].any()])
    wanted += 0.5 * -new[nll_mask].mean()

    def share(scale, chosen):
        """Loss of some rows; `scale` stands for the parameters."""
        weights = weights_of(mask, nll_mask, aggregation, chosen)
        log_probs = scale * new[chosen]
        arrays = map(jnp.asarray, (old[chosen], advantages[chosen], mask[chosen]))
        loss = clipped_policy_loss(log_probs, *arrays, CONFIG).loss
        return jnp.sum(weights.policy * loss) + 0.5 * jnp.sum(weights.nll * -log_probs)

    def both(chosen):
        return np.array(jax.value_and_grad(share)(jnp.ones(()), chosen))

    edges = np.cumsum((0, *splits))
    parts = [both(slice(a, b)) for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose(sum(parts)[0], wanted, rtol=1e-5)
    np.testing.assert_allclose(sum(parts), both(slice(0, 8)), rtol=1e-4)


def test_the_splits_above_would_tell_a_mean_of_means():
    """Of the data, not of the program: its micro-batch means differ from the whole's by far more than the tolerance."""
    new, old, advantages, mask, _ = batch()
    per_token, _ = oracle(new, old, advantages)
    means = [per_token[a:b][mask[a:b]].mean() for a, b in [(0, 5), (5, 8)]]
    assert abs(np.mean(means) - per_token[mask].mean()) > 0.01
