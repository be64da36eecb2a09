"""Forced Rethinking: who looks twice, after which words, and what is kept of it."""

import dataclasses

import numpy as np
import pytest

from rethinker_jax.config import Config, RethinkConfig
from rethinker_jax.rethink import (
    active,
    choose_at_random,
    choose_by_verdict,
    coin,
    cut_first_response,
    is_kept,
    loss_masks,
    rethinks,
)
from rethinker_jax.rollout import keep
from rethinker_jax.types import FIRST, SECOND, TRIGGER, Completion, Problem, Prompt, Rollout, Verdict

RIGHT = Verdict("correct", 1.0, "7", "number")
WRONG = Verdict("wrong", 0.0, "8", "number")
PAPER = RethinkConfig(rule="paper", fraction=1.0, max_first_tokens=10)
NUM = 3000  # 3 sigma of a share of 3000 is at most 0.027


def completion(*segments, finish="stop"):
    length = len(segments)
    return Completion(
        np.arange(length, dtype=np.int32), np.full(length, -1.0, np.float32), np.array(segments, np.int8), finish
    )


def first(length=5, finish="stop"):
    return completion(*[FIRST] * length, finish=finish)


def coins(count=NUM):
    return [coin(0, 0, 12345, sample) for sample in range(count)]


def shares(numbers, count):
    return np.bincount(numbers, minlength=count) / len(numbers)


@pytest.mark.parametrize(
    "text",
    [
        "Wait, that is off.",
        "so 7. wait a moment",
        "\n\nWait",
        "Alternatively, count them.",
        "let me double-check",
        "let's double check",
        "I re-check this",
        "I recheck this",
        "Re-examine the bar",
        "I should reevaluate",
        "time to rethink",
    ],
)
def test_a_second_look_is_heard(text):
    assert rethinks(text)


@pytest.mark.parametrize(
    "text",
    [
        "the waiter brings 3 plates",
        "awaiting the train",
        "await f()",
        "Kuwait has 4 million people",
        "two alternative ways",
        "double the checkers",
        "a premature checklist",
        "prethinking",
        "",
    ],
)
def test_false_friends_are_not(text):
    """Catches a search for substrings, as released, by which a waiter is a second look."""
    assert not rethinks(text)


def test_when_forced_rethinking_is_on():
    """Catches a boundary off by one, and 0 read as "stops at once"."""
    assert not active(RethinkConfig(rule="off"), 0)
    assert active(RethinkConfig(rule="random"), 10**6)
    config = RethinkConfig(rule="paper", until_step=5)
    assert [active(config, step) for step in (0, 4, 5, 6)] == [True, True, False, False]


def test_coins_are_named():
    """Catches a generator that runs on from call to call, and a name that forgets one of its words."""
    names = [(1, 2, 3, 4), (9, 2, 3, 4), (1, 9, 3, 4), (1, 2, 9, 4), (1, 2, 3, 9), (2, 1, 3, 4)]
    values = [coin(*name).random() for name in names]
    assert len(set(values)) == len(names)
    assert values == [coin(*name).random() for name in names]


def test_random_rule_takes_its_share_and_its_odds():
    """Odds need not sum to 1. Catches a share of 1 - fraction, and triggers drawn uniformly."""
    config = RethinkConfig(rule="random", fraction=0.4, triggers=("a", "b", "c"), odds=(1.0, 0.0, 3.0))
    chosen = [choose_at_random(config, rng) for rng in coins()]
    taken = [number for number in chosen if number is not None]
    assert len(taken) / NUM == pytest.approx(0.4, abs=0.027)
    np.testing.assert_allclose(shares(taken, 3), [0.25, 0, 0.75], atol=0.04)  # of 1200: 3 sigma is 0.0375
    assert all(choose_at_random(dataclasses.replace(config, fraction=0.0), rng) is None for rng in coins(50))
    assert all(choose_at_random(dataclasses.replace(config, fraction=1.0), rng) is not None for rng in coins(50))


@pytest.mark.parametrize("verdict, last", [(RIGHT, 2), (WRONG, 3)])
def test_paper_rule_chooses_the_last_triggers_by_verdict(verdict, last):
    """0.2 and 0.3 for the first two; the last two share 0.5, which goes to "double check" for right responses and to
    "there might be a mistake" for wrong ones. Catches 0.25 for each whatever the verdict."""
    numbers = [choose_by_verdict(PAPER, first(), verdict, 0.5, rng) for rng in coins()]
    wanted = np.zeros(4)
    wanted[[0, 1, last]] = 0.2, 0.3, 0.5
    np.testing.assert_allclose(shares(numbers, 4), wanted, atol=0.028)


def test_paper_rule_takes_its_share():
    config = dataclasses.replace(PAPER, fraction=0.65)
    chosen = [choose_by_verdict(config, first(), WRONG, 0.5, rng) for rng in coins()]
    assert np.mean([number is not None for number in chosen]) == pytest.approx(0.65, abs=0.027)


def test_paper_rule_with_few_triggers_draws_by_odds():
    """Catches an index below 0: with two triggers there is no pair that the verdict chooses from."""
    config = dataclasses.replace(PAPER, triggers=("a", "b"), odds=(3.0, 1.0))
    numbers = [choose_by_verdict(config, first(), RIGHT, 0.5, rng) for rng in coins()]
    np.testing.assert_allclose(shares(numbers, 2), [0.75, 0.25], atol=0.028)


@pytest.mark.parametrize(
    "response, verdict, score, chosen",
    [
        (first(10), RIGHT, 0.5, True),
        (first(11), RIGHT, 0.5, False),  # longer than max_first_tokens
        (first(5, "length"), RIGHT, 0.5, False),  # did not end by itself
        (first(5, "stop_string"), RIGHT, 0.5, False),
        (first(), WRONG, 0.7, True),  # at easy_group, not above
        (first(), WRONG, 0.75, False),  # a slip in an easy group is left alone
        (first(), RIGHT, 0.75, True),  # its successes are not
        (first(), WRONG, 0.0, True),
    ],
)
def test_who_is_eligible_under_the_paper_rule(response, verdict, score, chosen):
    assert (choose_by_verdict(PAPER, response, verdict, score, coin(0, 0, 1, 2)) is not None) == chosen


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("It is 3.\n\nIt is 4. Wait, no. It is 5. Wait, 6", "It is 3."),  # last "Wait", then the last blank line
        ("It is 4. Wait, no. It is 5. Wait, 6", "It is 4. Wait, no. It is 5."),
        ("I wait for 3 minutes", "I wait for 3 minutes"),  # "Wait" with a capital alone
        (r"So \boxed{3}, or rather \boxed{4}.", r"So \boxed{3}, or rather"),
        # The last box of what is left. Catches the last box of the whole, which is gone by then: the first would stay.
        (r"So \boxed{3}. Wait, it is \boxed{4}.", "So"),
        ("Look.\n\n3 + 4 = 7.\n\nThe answer is \\boxed{7}.", "Look.\n\n3 + 4 = 7."),
        ("3 + 4 = 7. ANSWER: 7", "3 + 4 = 7."),
        # As published the *first* "answer" counts, so nearly nothing is left; by the last one: "...\n\n3 + 4 = 7."
        ("To answer this, I add.\n\n3 + 4 = 7.\n\nThe answer is \\boxed{7}.", "To"),
        (r"\boxed{7}", ""),
        ("  3 + 4 = 7 \n", "3 + 4 = 7"),
        # "İ" is two characters in lower case. Catches a place found in the lowered text and cut in the other.
        ("İİİ dir, so the answer is 7", "İİİ dir, so the"),
    ],
)
def test_the_cut_of_the_first_response(text, wanted):
    """In the published order: last "Wait", last box, first "answer", last blank line, strip."""
    assert cut_first_response(text) == wanted


def test_what_is_kept():
    config = RethinkConfig(max_kept_per_problem=2)
    second = completion(FIRST, TRIGGER, SECOND)
    assert is_kept(config, second, RIGHT, 1)
    assert not is_kept(config, second, RIGHT, 2)
    assert not is_kept(config, second, WRONG, 0)  # a second look that failed is not reinforced
    assert not is_kept(config, completion(FIRST, TRIGGER, SECOND, finish="length"), RIGHT, 0)


def test_a_group_keeps_its_first_two_successes():
    """Catches a counter that failures use up, as released, and one that runs on over the groups."""
    problem = Problem("p", "Q", "7")
    prompt = Prompt(problem, np.zeros(1, np.int32), np.zeros((3, 1), np.int32), np.full(1, -1, np.int32), 1)
    second = completion(FIRST, TRIGGER, SECOND)

    def rollout(sample, forced_verdict):
        forced = None if forced_verdict is None else second
        return Rollout(prompt, sample, first(), WRONG, forced, forced_verdict)

    group = [rollout(place, verdict) for place, verdict in enumerate([WRONG, RIGHT, None, RIGHT, RIGHT])]
    config = Config(rethink=RethinkConfig(rule="random", max_kept_per_problem=2))
    for _ in range(2):
        kept = keep(group, config)
        assert [one.kept for one in kept] == [False, True, False, True, False]
    assert [one.reward for one in kept] == [0, 1, 0, 1, 0]
    assert kept[1].completion is second and kept[4].completion is group[4].first


def test_masks_of_an_unforced_completion():
    policy, nll = loss_masks(first(4))
    assert policy.tolist() == [True] * 4 and nll.tolist() == [False] * 4


def test_masks_of_a_forced_completion():
    """Catches praise for the wrong first response that was mended, and a gradient on inserted tokens (both released);
    the supervised loss takes the trigger in, so that the model learns to look again by itself."""
    policy, nll = loss_masks(completion(FIRST, FIRST, TRIGGER, TRIGGER, SECOND, SECOND))
    assert policy.tolist() == [False, False, False, False, True, True]
    assert nll.tolist() == [False, False, True, True, True, True]
    assert policy.dtype == nll.dtype == np.bool_
