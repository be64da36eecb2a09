"""Selective Sample Replay, Algorithm 1 of VL-Rethinker: what stays, what is drawn, and how often."""

import dataclasses

import numpy as np
import pytest

from rethinker_jax.config import ReplayConfig
from rethinker_jax.replay import Experience, draw, from_arrays, select, to_arrays

EPSILON = 1e-6
KEEP = ReplayConfig(clear_every=10**6)  # never cleared at the steps of these tests, which begin at 1


def row(problem, advantage, length=3, update=0, supervised=False):
    rng = np.random.default_rng(problem)
    return Experience(
        problem=problem,
        completion_ids=rng.integers(0, 99, length).astype(np.int32),
        loss_mask=rng.random(length) < 0.5,
        nll_mask=(rng.random(length) < 0.5) | (np.arange(length) == 0) if supervised else np.zeros(length, bool),
        old_log_probs=-rng.random(length).astype(np.float32),
        advantage=advantage,
        update=update,
    )


def rows(*advantages, start=0):
    return tuple(row(start + place, advantage) for place, advantage in enumerate(advantages))


def problems(found):
    return [one.problem for one in found]


def pick(raw, buffer=(), config=KEEP, step=1, seed=0):
    return select(raw, buffer, config, EPSILON, (seed, step))


def test_successful_second_looks_without_advantage_ride_along():
    """Catches dropping them (the model never learns to look twice where all are right), counting them as effective, and
    training the policy gradient on them, which would only dilute its token mean."""
    raw = (row(0, 1.0), row(1, 0.0, supervised=True), row(2, 0.0), row(3, -0.5, supervised=True))
    found = pick(raw)
    assert problems(found.fresh) == [0, 3, 1] and len(found.replayed) == 1
    assert not found.fresh[2].loss_mask.any() and found.fresh[2].nll_mask.any()
    assert (found.fresh[1].loss_mask == raw[3].loss_mask).all()
    assert problems(found.buffer) == [0, 3]


def test_every_effective_row_stays_once_and_in_order():
    """Catches a bootstrap of the fresh rows, which the released code makes and which drops nearly half of them."""
    raw = rows(0.5, 0.0, -0.25, 1e-9, -1e-3, 0.0)
    found = pick(raw, rows(0.9, 0.9, 0.9, start=10))
    assert problems(found.fresh) == [0, 2, 4]  # a negative advantage teaches too; 1e-9 is rounding
    assert len(found.replayed) == 3
    assert found.fresh[1] is raw[2]


def test_epsilon_itself_is_zero():
    """Catches ≥ for >, by which a zero-advantage row counts as one that teaches when epsilon is 0."""
    assert problems(select(rows(0.25, -0.25, 0.2500001), (), KEEP, 0.25, (0, 1)).fresh) == [2]


def test_the_buffer_takes_the_fresh_rows_before_it_is_drawn_from():
    """Algorithm 1: B ← B ∪ D_eff, then draw. Catches a first batch that cannot be filled though rows are there."""
    found = pick(rows(0.5, 0.0, 0.0, 0.0))
    assert problems(found.buffer) == [0]
    assert problems(found.replayed) == [0, 0, 0]


def test_nothing_is_drawn_where_nothing_is_missing():
    """Catches a batch that grows."""
    found = pick(rows(0.5, -0.5), rows(0.9, start=10))
    assert problems(found.fresh) == [0, 1] and found.replayed == ()
    assert problems(found.buffer) == [10, 0, 1]


def shares(weights, count, num_draws):
    """How often each index is among `count` drawn ones."""
    rng = np.random.default_rng(7)
    hits = np.zeros(len(weights))
    for _ in range(num_draws):
        np.add.at(hits, draw(np.array(weights, np.float64), count, rng), 1)
    return hits / num_draws


def inclusion(weights):
    """P(index among two drawn one after the other, the second from the rest): p_j + Σ_{i≠j} p_i · p_j / (1 - p_i)."""
    p = np.array(weights) / np.sum(weights)
    return p + np.array([sum(p[i] * p[j] / (1 - p[i]) for i in range(len(p)) if i != j) for j in range(len(p))])


@pytest.mark.parametrize("weights", [[1, 2, 3, 4], [1, 1, 1, 7], [0.05, 0.5, 0.5, 0.1]])
def test_draws_follow_the_weights(weights):
    """Catches uniform draws, draws with replacement, and a race by -w·log(u) instead of -log(u)/w.

    3 sigma of 6000 draws is 3 · sqrt(0.25 / 6000) = 0.019.
    """
    p = np.array(weights) / np.sum(weights)
    np.testing.assert_allclose(shares(weights, 1, 6000), p, atol=0.02)
    np.testing.assert_allclose(shares(weights, 2, 6000), inclusion(weights), atol=0.02)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
def test_the_top_up_is_proportional_to_the_advantage_to_the_alpha(alpha):
    """Signs do not matter. Catches alpha that is not read, and p ∝ A with negative rows never drawn.

    One row missing of a batch without an effective one: P(j) = |A_j|^alpha / Σ. 3 sigma of 3000 draws: 0.027.
    """
    buffer = rows(0.125, -0.25, 0.5, -0.875)
    config = dataclasses.replace(KEEP, alpha=alpha)
    drawn = [pick(rows(0.0, start=9), buffer, config, step).replayed for step in range(1, 3001)]
    counts = np.bincount([problem for found in drawn for problem in problems(found)], minlength=4)
    wanted = np.array([0.125, 0.25, 0.5, 0.875]) ** alpha
    np.testing.assert_allclose(counts / 3000, wanted / wanted.sum(), atol=0.028)


@pytest.mark.parametrize("missing", [1, 3, 4, 5, 8, 11])
def test_no_row_comes_again_before_all_have_come(missing):
    """Catches draws with replacement: 4 rows, `missing` drawn, so each comes floor or ceil of missing / 4 times."""
    buffer = rows(1e-5, 0.1, 0.5, 1.0)
    for step in range(1, 30):
        found = problems(pick(rows(*[0.0] * missing, start=9), buffer, step=step).replayed)
        assert len(found) == missing
        counts = np.bincount(found, minlength=4)
        assert set(counts) <= {missing // 4, -(-missing // 4)}
        assert sorted(found[:4]) == list(range(4))[: len(found)] or len(set(found[:4])) == min(missing, 4)


def test_the_buffer_is_cleared_every_so_many_steps_and_only_then():
    """An episode of 4 optimizer steps. Catches a buffer that is never cleared, as released, and one off by a step."""
    config = ReplayConfig(clear_every=4)
    buffer, sizes = (), []
    for step in range(10):
        buffer = pick(rows(0.5, 0.0, start=10 * step), buffer, config, step).buffer
        sizes.append(len(buffer))
    assert sizes == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]


def test_at_capacity_the_oldest_rows_leave():
    config = dataclasses.replace(KEEP, capacity=3)
    found = pick(rows(0.1, 0.0, 0.3), rows(0.5, 0.5, start=10), config)
    assert problems(found.buffer) == [11, 0, 2]
    # More effective rows than the buffer holds: all are trained on, the last ones kept.
    found = pick(rows(*[0.5] * 5), (), config)
    assert problems(found.fresh) == [0, 1, 2, 3, 4]
    assert problems(found.buffer) == [2, 3, 4]


def test_a_batch_that_teaches_nothing_with_an_empty_buffer():
    """Catches the endless loop of the released code, and a division by a sum of weights that is 0."""
    found = pick(rows(0.0, 0.0))
    assert (found.fresh, found.replayed, found.buffer) == ((), (), ())
    assert pick(()) == found


def test_a_batch_that_teaches_nothing_is_filled_from_the_buffer():
    found = pick(rows(0.0, 0.0), rows(0.5, 0.5, 0.5, start=10))
    assert found.fresh == () and len(found.replayed) == 2
    assert len(set(problems(found.replayed))) == 2


def test_modes_without_a_buffer():
    """filter: the effective rows alone. none: everything, as plain GRPO. Neither keeps nor draws."""
    raw, buffer = rows(0.5, 0.0, -0.5), rows(0.5, start=10)
    found = pick(raw, buffer, ReplayConfig(mode="filter"))
    assert (problems(found.fresh), found.replayed, found.buffer) == ([0, 2], (), ())
    found = pick(raw, buffer, ReplayConfig(mode="none"))
    assert (problems(found.fresh), found.replayed, found.buffer) == ([0, 1, 2], (), ())


def test_draws_are_named_by_seed_and_step():
    """Catches a global generator: a run killed and started again must draw the same rows."""
    buffer = rows(*np.linspace(0.1, 1, 40))
    raw = rows(*[0.0] * 5, start=90)
    np.random.seed(0)
    first = problems(pick(raw, buffer, step=3, seed=5).replayed)
    np.random.seed(1)
    assert problems(pick(raw, buffer, step=3, seed=5).replayed) == first
    assert problems(pick(raw, buffer, step=4, seed=5).replayed) != first
    assert problems(pick(raw, buffer, step=3, seed=6).replayed) != first


@pytest.mark.parametrize("lengths", [(), (4,), (1, 5, 3)])
def test_a_buffer_survives_its_checkpoint(lengths):
    """Catches padding that comes back as tokens, fields that are lost, and a filler row in an empty buffer."""
    buffer = tuple(
        row(place, 0.1 * place - 0.15, length, update=place, supervised=True) for place, length in enumerate(lengths)
    )
    arrays = to_arrays(buffer)
    assert all(array.size for array in arrays.values())  # array stores refuse empty ones
    found = from_arrays(arrays)
    assert len(found) == len(buffer)
    for ours, theirs in zip(found, buffer, strict=True):
        for field in dataclasses.fields(Experience):
            a, b = np.asarray(getattr(ours, field.name)), np.asarray(getattr(theirs, field.name))
            assert a.dtype == b.dtype and a.tolist() == b.tolist(), field.name
