"""The forms of replay beside Algorithm 1, its age limit, draws with replacement, and importance weights."""

import collections
import dataclasses
import itertools
from typing import Literal

import numpy as np
import pytest

from rethinker_jax.config import ReplayConfig
from rethinker_jax.config_file import load_defaults
from rethinker_jax.errors import UserError
from rethinker_jax.replay import Experience, Selection, draw_again, from_arrays, select, to_arrays

EPSILON = 1e-6
FORMS: tuple[Literal["top_up", "bootstrap", "deque"], ...] = ("top_up", "bootstrap", "deque")
NEVER = 10**6


def row(problem: int, advantage: float, update: int = 0, supervised: bool = False) -> Experience:
    policy = np.ones(3, bool)
    ids = np.arange(problem, problem + 3, dtype=np.int32)
    return Experience(problem, ids, policy, policy if supervised else ~policy, -0.5 * policy, advantage, update)


def rows(*advantages: float, start: int = 0, update: int = 0) -> tuple[Experience, ...]:
    return tuple(row(start + place, advantage, update) for place, advantage in enumerate(advantages))


def problems(found: tuple[Experience, ...]) -> list[int]:
    return [one.problem for one in found]


def pick(
    raw: tuple[Experience, ...],
    config: ReplayConfig,
    buffer: tuple[Experience, ...] = (),
    step: int = 1,
    seed: int = 0,
    rollout: tuple[Experience, ...] | None = None,
) -> Selection:
    return select(raw, buffer, config, EPSILON, (seed, step), rollout)


def shares(found: list[tuple[Experience, ...]], wanted: dict[int, float]) -> tuple[list[float], list[float]]:
    """How often each problem came among all rows found, beside how often it should have."""
    counts = collections.Counter(problem for one in found for problem in problems(one))
    assert set(counts) <= set(wanted)
    return [counts[problem] / counts.total() for problem in wanted], list(wanted.values())


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
def test_a_bootstrap_is_drawn_by_the_advantage(alpha: float) -> None:
    """Effective rows 0, 2, 3: P = |A|^alpha / Σ. Catches uniform draws, rows without advantage, and draws without
    replacement, of which four of three rows would hold each at least once. 3 sigma of 4000 draws: 0.024."""
    raw = rows(0.25, 0.0, -0.5, 1.0)
    config = ReplayConfig(form="bootstrap", alpha=alpha)
    found = [pick(raw, config, step=step).fresh for step in range(1000)]
    sizes = np.array([0.25, 0.5, 1.0]) ** alpha
    came, wanted = shares(found, dict(zip((0, 2, 3), (sizes / sizes.sum()).tolist(), strict=True)))
    np.testing.assert_allclose(came, wanted, atol=0.025)
    assert {len(one) for one in found} == {4}
    # All four draws are one row: Σ p^4, 0.037 at alpha 0, 0.11 at 1 and 0.34 at 2; never, had they been told apart.
    p = sizes / sizes.sum()
    alike = np.mean([len(set(problems(one))) == 1 for one in found])
    assert alike == pytest.approx((p**4).sum(), abs=0.045) and alike > 0


def test_a_bootstrap_is_of_the_whole_rollout() -> None:
    """Catches draws from the batch alone, by which a batch without an effective row would be empty, and a buffer."""
    rollout = rows(0.0, 0.0, 0.5, -0.5)
    found = pick(rollout[:2], ReplayConfig(form="bootstrap"), buffer=rows(0.9, start=50), rollout=rollout)
    assert len(found.fresh) == 2 and set(problems(found.fresh)) <= {2, 3}
    assert found.replayed == found.buffer == ()
    alone = pick(rollout[:2], ReplayConfig(form="bootstrap"))
    assert alone == Selection((), (), ())


def test_the_deque_is_a_bootstrap_and_a_fill_from_a_buffer_that_stays() -> None:
    """Batch of 4 with two effective rows, deque of two older ones. Fresh: two draws of {0, 1} with P 1/4 and 3/4.
    Replayed: two of {10, 11, 0, 1} without replacement. At step 16 Algorithm 1 would clear the buffer.
    3 sigma of 2000 draws: 0.03. Catches each fresh row once, draws before the deque takes them in, and a clearing."""
    raw, buffer = rows(0.25, 0.75, 0.0, 0.0), rows(0.5, -0.5, start=10)
    found = [pick(raw, ReplayConfig(form="deque", clear_every=16), buffer, 16 * step) for step in range(1, 1001)]
    assert all(problems(one.buffer) == [10, 11, 0, 1] for one in found)
    came, wanted = shares([one.fresh for one in found], {0: 0.25, 1: 0.75})
    np.testing.assert_allclose(came, wanted, atol=0.031)
    p = {10: 0.25, 11: 0.25, 0: 0.125, 1: 0.375}
    inclusion = {j: (p[j] + sum(p[i] * p[j] / (1 - p[i]) for i in p if i != j)) / 2 for j in p}
    came, wanted = shares([one.replayed for one in found], inclusion)
    np.testing.assert_allclose(came, wanted, atol=0.035)
    assert all(len(set(problems(one.replayed))) == 2 for one in found)
    assert problems(pick(raw, ReplayConfig(), buffer, 16).buffer) == [0, 1]


def test_the_deque_holds_its_capacity_and_the_oldest_leave() -> None:
    """Catches a deque that grows: 3 effective rows a step, 7 places."""
    config, buffer = ReplayConfig(form="deque", capacity=7), ()
    for step in range(20):
        buffer = pick(rows(0.5, 0.0, -0.5, 0.25, start=4 * step, update=step), config, buffer, step).buffer
    assert problems(buffer) == [71, 72, 74, 75, 76, 78, 79]


@pytest.mark.parametrize("form", ["top_up", "deque"])
@pytest.mark.parametrize("max_age", [1, 3])
def test_no_row_is_replayed_past_its_age(form: Literal["top_up", "deque"], max_age: int) -> None:
    """Catches an age that counts from entry into the buffer, one that is off by one, and rows of the batch itself that
    come in too old. A rollout every second step, so that a row enters at age 0 or 1."""
    config = ReplayConfig(form=form, clear_every=NEVER, max_age=max_age)
    buffer, oldest = (), 0
    for step in range(1, 60):
        drawn = step - step % 2
        found = pick(rows(0.5, 0.0, 0.0, 0.0, start=4 * step, update=drawn), config, buffer, step)
        buffer = found.buffer
        ages = [step - one.update for one in (*found.replayed, *buffer)]
        assert max(ages) <= max_age and len(found.replayed) == 3
        oldest = max(oldest, *[step - one.update for one in found.replayed])
    assert oldest == max_age
    late = pick(rows(0.5, 0.0, update=0), config, (), max_age + 1)
    assert len(late.fresh) == 1 and late.replayed == late.buffer == ()


def test_the_buffer_is_drawn_from_again_by_key() -> None:
    """Two of rows with P 1/10 and 9/10: with replacement the same twice with 0.01 + 0.81, without never."""
    raw, buffer = rows(0.0, 0.0, start=20), rows(0.1, 0.9)
    kept = ReplayConfig(clear_every=NEVER)
    again = dataclasses.replace(kept, replacement=True)
    twice = [len(set(problems(pick(raw, again, buffer, step).replayed))) == 1 for step in range(1, 2001)]
    assert np.mean(twice) == pytest.approx(0.82, abs=0.026)
    assert all(len(set(problems(pick(raw, kept, buffer, step).replayed))) == 2 for step in range(1, 200))


def test_draws_with_replacement_of_extreme_weights() -> None:
    """Catches a division by 0 and a weight of 0 that is drawn."""
    rng = np.random.default_rng(0)
    assert draw_again(np.array([0.0, 1e-300, 0.0]), 3, rng).tolist() == [1, 1, 1]
    assert draw_again(np.zeros(0), 3, rng).size == 0 == draw_again(np.ones(2), 0, rng).size


@pytest.mark.parametrize("form", FORMS)
def test_importance_makes_the_expected_gradient_that_of_uniform_draws(
    form: Literal["top_up", "bootstrap", "deque"],
) -> None:
    """All outcomes of one draw, each weighed with its probability: Σ P(j)·w(j)·x_j = mean of x at importance 1, for
    any x. Catches weights by P of another set, their inverse, and weights divided by their largest.

    For P = 1/8, 2/8, 5/8 of n = 3 rows: 1 / (nP) = 8/3, 4/3, 8/15.
    """
    advantages = (0.125, -0.25, 0.625)
    config = ReplayConfig(form=form, clear_every=NEVER, replacement=True, importance=1.0)
    weights: dict[int, float] = {}
    if form == "bootstrap":
        for step in range(200):
            found = pick((*rows(*advantages), row(9, 0.0)), config, step=step)
            weights |= dict(zip(problems(found.fresh), found.weights, strict=True))
    else:
        for step in range(1, 200):
            found = pick(rows(0.0, start=9), config, rows(*advantages), step)
            weights |= dict(zip(problems(found.replayed), found.weights, strict=True))
    assert [weights[problem] for problem in range(3)] == pytest.approx([8 / 3, 4 / 3, 8 / 15])
    for x in itertools.product((0.0, 1.0), repeat=3):
        expected = sum(p * weights[j] * x[j] for j, p in enumerate((1 / 8, 2 / 8, 5 / 8)))
        assert expected == pytest.approx(sum(x) / 3)


def test_importance_of_one_half_is_a_square_root_and_leaves_other_rows_alone() -> None:
    """Catches weights on rows that were not drawn: of Algorithm 1 each effective row is there for certain. Buffer after
    taking in row 0: |A| = 0.5, 0.5 and 1, so P = 1/4, 1/4, 1/2 and (nP)^-1/2 = (4/3)^0.5 or (2/3)^0.5."""
    config = ReplayConfig(clear_every=NEVER, replacement=True, importance=0.5)
    raw = (row(0, 0.5), row(1, 0.0), row(2, 0.0), row(3, 0.0, supervised=True))
    found = pick(raw, config, rows(0.5, 1.0, start=10))
    assert problems(found.fresh) == [0, 3] and found.weights[:2] == (1.0, 1.0)
    wanted = {0: (4 / 3) ** 0.5, 10: (4 / 3) ** 0.5, 11: (2 / 3) ** 0.5}
    assert list(found.weights[2:]) == pytest.approx([wanted[problem] for problem in problems(found.replayed)])
    assert set(pick(raw, ReplayConfig(), rows(0.5, start=10)).weights) == {1.0}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("replacement", [False, True])
def test_what_every_form_keeps_to(form: Literal["top_up", "bootstrap", "deque"], replacement: bool) -> None:
    """Forty steps through the checkpoint after each: as many rows as the batch wherever one can be drawn, only
    effective rows and riders, the same rows for the same seed and step, and others for another seed. Catches a deque
    that changes on its way through the checkpoint, and rows at epsilon that are replayed."""
    config = ReplayConfig(form=form, clear_every=8, capacity=20, max_age=0, replacement=replacement)
    rng, straight, saved = np.random.default_rng(3), (), ()
    others = 0
    for step in range(40):
        advantages = np.where(rng.random(6) < 0.6, rng.choice([0.0, EPSILON, -EPSILON], 6), rng.normal(size=6))
        raw = (*rows(*advantages.tolist(), start=8 * step, update=step), row(8 * step + 6, 0.0, step, supervised=True))
        ours, theirs = pick(raw, config, straight, step), pick(raw, config, saved, step)
        drawn = (*ours.fresh, *ours.replayed)
        assert problems(drawn) == problems((*theirs.fresh, *theirs.replayed))
        other = pick(raw, config, straight, step, seed=1)
        others += problems(drawn) != problems((*other.fresh, *other.replayed))
        assert len(ours.weights) == len(drawn) == (len(raw) if len(drawn) > 1 else 1)
        assert all(abs(one.advantage) > EPSILON for one in (*ours.replayed, *ours.buffer))
        quiet = [one for one in drawn if abs(one.advantage) <= EPSILON]
        assert problems(tuple(quiet)) == [8 * step + 6] and not quiet[0].loss_mask.any()
        straight, saved = ours.buffer, from_arrays(to_arrays(theirs.buffer))
        assert [(one.problem, one.advantage, one.update) for one in straight] == [
            (one.problem, one.advantage, one.update) for one in saved
        ]
    assert others > 20 and bool(straight) == (form != "bootstrap")


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_draw_from(form: Literal["top_up", "bootstrap", "deque"]) -> None:
    """Catches the endless loops of the released code, divisions by 0, and a rider that is lost where no row teaches."""
    config = ReplayConfig(form=form, clear_every=NEVER, replacement=True, importance=1.0)
    assert pick((), config) == pick(rows(0.0, 0.0), config) == Selection((), (), ())
    found = pick((row(0, 0.0), row(1, 0.0, supervised=True)), config)
    assert problems(found.fresh) == [1] and found.replayed == () and found.weights == (1.0,)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["replay.mode=filter", "replay.form=deque"], "replay.form is deque with replay.mode filter"),
        (["replay.mode=none", "replay.max_age=3"], "replay.max_age is 3 with replay.mode none"),
        (["replay.form=bootstrap", "replay.max_age=3"], "replay.max_age is 3 with replay.form bootstrap"),
        (["replay.importance=0.5"], "wants replay.replacement=true"),
        (["replay.form=dequeue"], "did you mean deque?"),
        (["replay.importance=1.5"], "replay.importance: wanted less than or equal to 1"),
    ],
)
def test_contradictions_are_refused(overrides: list[str], part: str) -> None:
    with pytest.raises(UserError) as error:
        load_defaults(overrides)
    assert part in str(error.value)


def test_what_fits_together_is_not_refused() -> None:
    load_defaults(["replay.form=bootstrap", "replay.importance=1"])
    load_defaults(["replay.form=deque", "replay.max_age=32", "replay.replacement=true", "replay.importance=0.5"])
