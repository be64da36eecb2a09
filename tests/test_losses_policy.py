"""Every policy loss, the KL estimates and the importance weights against loops in numpy, values and gradients.

The loops know nothing of the program: float64, one token at a time, derivatives taken by hand.
"""

import itertools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rethinker_jax.config import LossConfig
from rethinker_jax.training.losses import (
    POLICY_LOSSES,
    kl_estimate,
    next_kl_coefficient,
    token_weights,
    truncated_importance,
)

LOW, HIGH, DUAL, CONSTANT = 0.2, 0.35, 1.5, 6
TAU = {1: 1.0, -1: 1.3}
CASES = ["clipped", "clipped+dual", "gspo", "cispo", "sapo"]
AGGREGATIONS = ["token_mean", "sequence_mean", "constant"]


def make_config(case: str, aggregation: str = "token_mean") -> LossConfig:
    policy, _, dual = case.partition("+")
    return LossConfig(
        policy=typing.cast(typing.Any, policy),
        clip_low=LOW,
        clip_high=HIGH,
        dual_clip=DUAL if dual else 0.0,
        sapo_tau_positive=TAU[1],
        sapo_tau_negative=TAU[-1],
        aggregation=typing.cast(typing.Any, aggregation),
        constant_length=CONSTANT,
    )


def make_arrays(rows: int = 8, length: int = 5) -> tuple[np.ndarray, ...]:
    """Log-probs, advantages of both signs, masks with holes (a trigger inside); row 2 has no policy token.

    Rows lean to one side, so that sequence ratios leave their bounds too."""
    rng = np.random.default_rng(3)
    new = -rng.exponential(1.0, (rows, length))
    lean = np.array([0.5, -0.5, 0, 0.6, -0.6, 0.1, 0, 0.7])[:rows, None]
    old = new - lean - rng.normal(0, 0.3, (rows, length))
    advantages = np.array([1.0, -0.5, 2.0, -1.5, 0.7, 0.3, 0.0, 1.2])[:rows]
    mask = np.arange(length) < rng.integers(2, length + 1, rows)[:, None]
    mask[2] = False
    mask[3, 1] = False
    return new, old, advantages, mask


def weigh(mask: np.ndarray, aggregation: str) -> np.ndarray:
    """What each token counts for in the whole batch."""
    weights = np.zeros(mask.shape)
    num_rows = sum(row.any() for row in mask)
    for i, t in np.argwhere(mask):
        per_row = {"sequence_mean": mask[i].sum(), "constant": CONSTANT}
        weights[i, t] = 1 / mask.sum() if aggregation == "token_mean" else 1 / num_rows / per_row[aggregation]
    return weights


def one_token(case: str, new: float, old: float, a: float) -> tuple[float, float]:
    """(loss, d loss / d log π) of a token, for the losses that look at tokens alone."""
    ratio = math.exp(new - old)
    if case == "cispo":
        weight = min(max(ratio, 1 - LOW), 1 + HIGH)
        return -weight * a * new, -weight * a
    if case == "sapo":
        tau = TAU[1] if a > 0 else TAU[-1]
        gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
        return -4 / tau * gate * a, -4 * gate * (1 - gate) * ratio * a
    cut = (a > 0 and ratio > 1 + HIGH) or (a < 0 and ratio < 1 - LOW)
    if cut:
        return -a * (1 + HIGH if a > 0 else 1 - LOW), 0.0
    if case == "clipped+dual" and a < 0 and ratio > DUAL:
        return -DUAL * a, 0.0
    return -ratio * a, -ratio * a


def oracle(case: str, arrays: tuple[np.ndarray, ...], weights: np.ndarray) -> tuple[float, np.ndarray]:
    """(loss, its gradient by the policy's log-probs) of the whole batch."""
    new, old, advantages, mask = arrays
    total, gradient = 0.0, np.zeros(new.shape)
    for i, a in enumerate(advantages):
        tokens = np.flatnonzero(mask[i])
        if case == "gspo" and len(tokens):
            loss, slope = one_token("clipped", float(np.mean(new[i, tokens] - old[i, tokens])), 0.0, float(a))
            total += weights[i].sum() * loss
            gradient[i, tokens] = weights[i].sum() * slope / len(tokens)
        elif case != "gspo":
            for t in tokens:
                loss, slope = one_token(case, float(new[i, t]), float(old[i, t]), float(a))
                total += weights[i, t] * loss
                gradient[i, t] = weights[i, t] * slope
    return total, gradient


def ours(case: str, aggregation: str, arrays: tuple[np.ndarray, ...], chosen: slice) -> tuple[float, np.ndarray]:
    """The same by the program, for the `chosen` rows of the batch."""
    config = make_config(case, aggregation)
    new, old, advantages, mask = (jnp.asarray(array, bool if array.dtype == bool else jnp.float32) for array in arrays)
    counts = mask.sum().astype(jnp.float32), jnp.float32(0), mask.any(axis=1).sum().astype(jnp.float32)
    nothing = jnp.zeros_like(mask[chosen])
    weights = token_weights(mask[chosen], nothing, *counts, config.aggregation, config.constant_length)

    def loss(log_probs: jax.Array) -> jax.Array:
        found = POLICY_LOSSES[config.policy](log_probs, old[chosen], advantages[chosen], mask[chosen], config)
        return jnp.sum(weights.policy * found.loss)

    value, gradient = jax.value_and_grad(loss)(new[chosen])
    return float(value), np.asarray(gradient)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_those_of_the_loop(case: str, aggregation: str) -> None:
    """Catches a weight that is not detached (cispo would gain a term ρ·log π), a gate without its 4/τ, τ of the other
    sign, a sequence ratio over masked or padded places or over a sum, and tokens that are cut though they pull back."""
    arrays = make_arrays()
    value, gradient = oracle(case, arrays, weigh(arrays[3], aggregation))
    found, found_gradient = ours(case, aggregation, arrays, slice(None))
    assert found == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(found_gradient, gradient, rtol=1e-4, atol=1e-7)
    assert not found_gradient[~arrays[3]].any()


@pytest.mark.parametrize("sizes", [(1,) * 8, (5, 3)])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("case", CASES)
def test_micro_batches_sum_up_to_the_whole(case: str, aggregation: str, sizes: tuple[int, ...]) -> None:
    """1 x 8 against 8 x 1 and an uneven split. Catches any mean that is taken inside a micro-batch."""
    arrays = make_arrays()
    edges = np.cumsum((0, *sizes))
    parts = [ours(case, aggregation, arrays, slice(a, b)) for a, b in itertools.pairwise(edges)]
    value, gradient = ours(case, aggregation, arrays, slice(None))
    assert sum(part[0] for part in parts) == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), gradient, rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_data_would_tell(case: str) -> None:
    """Of the data, not of the program: means of micro-batches, or of two devices' halves, are something else; the
    losses differ from one another; and there are tokens on both sides of every bound."""
    arrays = make_arrays()
    mask = arrays[3]
    whole = oracle(case, arrays, weigh(mask, "token_mean"))[0]
    halves = [oracle(case, arrays, weigh(mask * half, "token_mean"))[0] for half in (ROWS < 4, ROWS >= 4)]
    assert abs(np.mean(halves) - whole) > 0.01
    others = [oracle(other, arrays, weigh(mask, "token_mean"))[0] for other in CASES if other != case]
    assert min(abs(other - whole) for other in others) > 1e-3
    slopes = oracle(case, arrays, weigh(mask, "token_mean"))[1][mask & (arrays[2] != 0)[:, None]]
    assert (slopes == 0).any() == (case not in ("cispo", "sapo")) and (slopes != 0).any()


ROWS = np.arange(8)[:, None]


def single(case: str, ratio: float, advantage: float, log_prob: float = -1.0) -> tuple[float, float]:
    """(loss, slope by the log-prob) of a row of one token."""
    config = make_config(case)

    def loss(new: jax.Array) -> jax.Array:
        old = jnp.full((1, 1), log_prob - math.log(ratio))
        there = jnp.ones((1, 1), bool)
        return POLICY_LOSSES[config.policy](new, old, jnp.array([advantage]), there, config).loss[0, 0]

    value, slope = jax.value_and_grad(loss)(jnp.full((1, 1), log_prob))
    return float(value), float(slope[0, 0])


@pytest.mark.parametrize(
    "case, ratio, advantage, wanted",
    [
        # Blame of a token that is now 4 times as likely: 4·2 with slope 8; with the dual clip 1.5·2 and flat.
        ("clipped", 4.0, -2.0, (8.0, 8.0)),
        ("clipped+dual", 4.0, -2.0, (3.0, 0.0)),
        ("clipped+dual", 1.4, -2.0, (2.8, 2.8)),
        ("clipped+dual", 0.5, -2.0, (1.6, 0.0)),  # the lower bound still holds
        ("clipped+dual", 4.0, 2.0, (-2.7, 0.0)),  # praise knows only 1.35
        # cispo: bounded weight, and still a gradient where PPO has none. log π is -1: -1.35 · 2 · -1.
        ("cispo", 4.0, 2.0, (2.7, -2.7)),
        ("cispo", 0.5, -2.0, (-1.6, 1.6)),
        ("cispo", 1.0, 2.0, (2.0, -2.0)),
        # sapo: at ρ = 1 the gate is half of 4/τ, with the slope of the plain policy gradient.
        ("sapo", 1.0, 2.0, (-4.0, -2.0)),
        ("sapo", 1.0, -2.0, (4 / 1.3, 2.0)),
        # σ(1) = 0.7310586, so -4·0.7310586 and -4·0.7310586·0.2689414·2.
        ("sapo", 2.0, 1.0, (-2.9242344, -1.5728955)),
    ],
)
def test_by_hand(case: str, ratio: float, advantage: float, wanted: tuple[float, float]) -> None:
    assert single(case, ratio, advantage) == pytest.approx(wanted, rel=1e-5)


def test_gspo_by_hand() -> None:
    """log ρ = (ln 1.44, 0) and one inserted token with ρ = 100, which is no policy token: s = 1.2, and each token has
    half of its slope. With ρ token by token the first would be cut at 1.35 and the second not move with it; with the
    sum for the mean s would be 1.44 and cut; with the inserted token 5.2."""
    config = make_config("gspo")
    old = -jnp.array([[math.log(1.44), 0.0, math.log(100.0), 0.0]])
    mask = jnp.array([[True, True, False, False]])

    def loss(new: jax.Array) -> jax.Array:
        found = POLICY_LOSSES["gspo"](new, old, jnp.array([2.0]), mask, config)
        return jnp.sum(jnp.where(mask, found.loss, 0.0)) / 2

    value, slope = jax.value_and_grad(loss)(jnp.zeros((1, 4)))
    assert float(value) == pytest.approx(-2.4, rel=1e-5)
    np.testing.assert_allclose(slope, [[-1.2, -1.2, 0, 0]], rtol=1e-5)
    found = POLICY_LOSSES["gspo"](jnp.zeros((1, 4)), 2 * old, jnp.array([2.0]), mask, config)  # s = 1.44
    assert np.asarray(found.clipped_high)[0, :2].all() and not np.asarray(found.clipped_low).any()


def test_where_bounds_are_met_is_told_apart() -> None:
    """Catches shares of clipped tokens that count the ones clipping does not touch, and sides that are swapped."""
    ratio = jnp.array([[0.5, 1.0, 2.0]])
    for case, sign, wanted in [
        ("clipped", 1.0, ([0, 0, 0], [0, 0, 1], [0, 0, 0])),
        ("clipped", -1.0, ([1, 0, 0], [0, 0, 0], [0, 0, 0])),
        ("clipped+dual", -1.0, ([1, 0, 0], [0, 0, 0], [0, 0, 1])),
        ("cispo", -1.0, ([1, 0, 0], [0, 0, 1], [0, 0, 0])),  # its weight is bounded whatever the sign
        ("sapo", 1.0, ([0, 0, 0], [0, 0, 0], [0, 0, 0])),
    ]:
        config = make_config(case)
        there = jnp.ones((1, 3), bool)
        found = POLICY_LOSSES[config.policy](jnp.log(ratio), jnp.zeros((1, 3)), jnp.array([sign]), there, config)
        masks = found.clipped_low, found.clipped_high, found.clipped_dual
        assert [np.asarray(one)[0].astype(int).tolist() for one in masks] == list(wanted), case
        np.testing.assert_allclose(found.ratio, ratio, rtol=1e-6)


def test_the_registry_is_what_the_config_offers() -> None:
    """Catches a loss that can be named and is not there, or is there and cannot be named."""
    assert set(POLICY_LOSSES) == set(typing.get_args(typing.get_type_hints(LossConfig)["policy"]))


# --- KL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator, likelier, rarer, slopes",
    [
        # π = 2 π_ref: d = ln 2; π = π_ref / 2: d = -ln 2. exp(-d) - 1 + d = 1/2 - 1 + 0.6931 and 2 - 1 - 0.6931.
        ("k1", 0.693147, -0.693147, (1.0, 1.0)),
        ("k2", 0.240227, 0.240227, (0.693147, -0.693147)),
        ("k3", 0.193147, 0.306853, (0.5, -1.0)),
    ],
)
def test_kl_estimates_by_hand(estimator: str, likelier: float, rarer: float, slopes: tuple[float, float]) -> None:
    """Catches k3 of the reversed ratio, which would swap its two values, and a k2 without its half."""
    ref = jnp.array([[-2.0, -2.0]])
    policy = ref + jnp.array([[math.log(2.0), -math.log(2.0)]])
    np.testing.assert_allclose(kl_estimate(policy, ref, estimator), [[likelier, rarer]], rtol=1e-4)
    gradient = jax.grad(lambda log_probs: kl_estimate(log_probs, ref, estimator).sum())(policy)
    np.testing.assert_allclose(gradient, [slopes], rtol=1e-4)


def test_which_estimates_have_the_right_mean_and_which_the_right_gradient() -> None:
    """Over a distribution of three tokens, exactly: Σ π k = KL for k1 and k3. As a loss, Σ π ∇k is the KL's gradient
    for k2 alone, and 0 for k1. Catches a docstring that promises otherwise."""
    logits, ref = np.array([0.3, -0.4, 0.9]), np.log([0.2, 0.5, 0.3])

    def log_softmax(values: np.ndarray) -> np.ndarray:
        return values - np.log(np.exp(values).sum())

    def kl(values: np.ndarray) -> float:
        log_probs = log_softmax(values)
        return float((np.exp(log_probs) * (log_probs - ref)).sum())

    log_probs = log_softmax(logits)
    probs = np.exp(log_probs)
    step = 1e-5
    true = np.array([(kl(logits + step * unit) - kl(logits - step * unit)) / 2 / step for unit in np.eye(3)])
    means, gradients = {}, {}
    for name in ("k1", "k2", "k3"):
        arrays = jnp.asarray(log_probs, jnp.float32)[None], jnp.asarray(ref, jnp.float32)[None]
        means[name] = float((probs * np.asarray(kl_estimate(*arrays, name))[0]).sum())
        slopes = np.asarray(jax.grad(lambda own, other, name=name: kl_estimate(own, other, name).sum())(*arrays))[0]
        # d log π_a / d logits = e_a - π
        gradients[name] = sum(probs[a] * slopes[a] * (np.eye(3)[a] - probs) for a in range(3))
    assert [means["k1"], means["k3"]] == pytest.approx([kl(logits)] * 2, rel=1e-4)
    assert abs(means["k2"] - kl(logits)) > 1e-3
    np.testing.assert_allclose(gradients["k2"], true, atol=1e-5)
    np.testing.assert_allclose(gradients["k1"], 0, atol=1e-6)
    assert np.abs(gradients["k3"] - true).max() > 1e-3


def test_a_kl_that_would_overflow_is_bounded() -> None:
    """exp(100) is infinite in float32 and would skip every update. Beyond 20 nats the estimate is flat."""
    policy, ref = jnp.array([[-100.0]]), jnp.array([[0.0]])
    value, slope = jax.value_and_grad(lambda own: kl_estimate(own, ref, "k3").sum())(policy)
    assert float(value) == pytest.approx(math.exp(20.0) - 21, rel=1e-5) and float(slope[0, 0]) == 0


@pytest.mark.parametrize(
    "kl, wanted",
    [
        (0.11, 0.5 * 1.01),  # error 0.1, times 10 rows of 100
        (0.1, 0.5),
        (1.0, 0.5 * 1.02),  # the error is bounded at 0.2
        (0.0, 0.5 * 0.98),
        (-5.0, 0.5 * 0.98),  # k1 may be negative
        (float("nan"), 0.5),
        (float("inf"), 0.5),
    ],
)
def test_the_adaptive_coefficient(kl: float, wanted: float) -> None:
    """Catches an error without bound, a sign (a KL above the target must cost more), and NaN that stays for good."""
    config = LossConfig(kl_controller="adaptive", kl_target=0.1, kl_horizon=100)
    assert next_kl_coefficient(config, 0.5, kl, 10) == pytest.approx(wanted)
    assert next_kl_coefficient(LossConfig(kl_target=0.1, kl_horizon=100), 0.5, kl, 10) == 0.5


# --- a sampler that is not the trainer -----------------------------------------------------------------------------


def test_importance_weights() -> None:
    """π_old / π_sampler = e, capped at 2; 1/e, not raised to anything; 1. Catches the ratio upside down, a cap on both
    sides, and a gradient through the weight."""
    old, sampler = jnp.array([[-1.0, -2.0, -3.0]]), jnp.array([[-2.0, -1.0, -3.0]])
    np.testing.assert_allclose(truncated_importance(old, sampler, 2.0), [[2, math.exp(-1), 1]], rtol=1e-6)
    gradient = jax.grad(lambda values: truncated_importance(values, sampler, 2.0).sum())(old)
    assert not np.asarray(gradient).any()
