"""Think→answer consistency against values worked out by hand."""

import math

import numpy as np
import pytest

from rethinker_jax.config_rewards import ConsistencyConfig
from rethinker_jax.consistency import answer_mask, bonuses, consistent, likelihood
from rethinker_jax.types import FIRST, SECOND, TRIGGER, Completion, Problem, Prompt, Rollout, Verdict

WORDS = ["I see ", "4", " or ", "\\boxed{", "1", "4", "}", "", "x \\boxed{14}"]
NONE = np.zeros(0, np.int32)
PROMPT = Prompt(Problem("p", "", "14"), NONE, np.zeros((3, 0), np.int32), NONE, 0)


def decode(ids: np.ndarray) -> str:
    return "".join(WORDS[number] for number in ids)


def make_rollout(ids: list[int], extracted: str | None, segments: list[int] | None = None) -> Rollout:
    tokens = np.array(ids, np.int32)
    marks = np.array(segments or [FIRST] * len(ids), np.int8)
    completion = Completion(tokens, np.zeros(len(ids), np.float32), marks, "stop", decode(tokens))
    return Rollout(PROMPT, 0, completion, Verdict("correct", 1.0, extracted, "number"))


def test_the_mask_is_on_the_last_mention_of_the_answer() -> None:
    """Catches the first "4" of the text, the braces, and the end token (which is text of length 0)."""
    assert (
        answer_mask(make_rollout([0, 1, 2, 3, 4, 5, 6, 7], "14"), decode).tolist()
        == [False] * 4 + [True] * 2 + [False] * 2
    )


def test_a_token_that_holds_more_than_the_answer_counts() -> None:
    """Catches a mask that is empty where the answer is inside of one token."""
    assert answer_mask(make_rollout([0, 8], "14"), decode).tolist() == [False, True]


@pytest.mark.parametrize("extracted", [None, "", "15", "1, 4"])
def test_without_an_answer_nothing_is_marked(extracted: str | None) -> None:
    assert not answer_mask(make_rollout([0, 3, 4, 5, 6], extracted), decode).any()


def test_inserted_tokens_are_not_the_answer_of_the_policy() -> None:
    """Catches the likelihood of a trigger."""
    found = answer_mask(make_rollout([3, 4, 5, 6], "14", [FIRST, TRIGGER, SECOND, SECOND]), decode)
    assert found.tolist() == [False, False, True, False]


def test_likelihood_is_a_geometric_mean_and_capped() -> None:
    """Catches a sum of log-probs (0.25 · 0.81), and a mean over the tokens that are not the answer."""
    log_probs = np.log(np.array([0.1, 0.25, 0.81], np.float32))
    mask = np.array([False, True, True])
    assert likelihood(log_probs, mask, 0.95) == pytest.approx(math.sqrt(0.25 * 0.81))
    assert likelihood(log_probs, mask, 0.3) == 0.3
    assert math.isnan(likelihood(log_probs, np.zeros(3, bool), 0.95))


def test_bonus_by_hand() -> None:
    """Catches a mean over wrong answers too (0.475 would let 0.5 pass), and a bonus for wrong ones."""
    accuracy = np.array([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    likelihoods = np.array([[0.9, 0.5, 0.69, 0.0], [0.9, 0.9, 0.9, 0.9]])
    # The mean over the accurate is 0.69667; 0.69 is within the margin of 0.01.
    accurate, fits = consistent(accuracy, likelihoods, 0.01)
    assert accurate.tolist() == [[True, True, True, False], [False] * 4]
    assert fits.tolist() == [[True, False, True, False], [False] * 4]
    config = ConsistencyConfig(weight=0.5, margin=0.0)
    assert bonuses(accuracy, likelihoods, config).tolist() == [[0.5, 0.0, 0.0, 0.0], [0.0] * 4]


@pytest.mark.parametrize("count", [2, 3, 6, 7])
def test_equal_likelihoods_are_consistent(count: int) -> None:
    """Catches a mean that comes out a rounding above each of its parts: six times 0.95 did."""
    assert consistent(np.ones((1, count)), np.full((1, count), 0.95), 0.0)[1].all()


def test_partial_credit_is_accurate_from_the_group_mean_on() -> None:
    """Catches accuracy taken as 0 or 1: 0.3 is above 0.1, but below the mean of 0.65."""
    accurate, _ = consistent(np.array([[1.0, 0.3]]), np.array([[0.5, 0.5]]), 0.0)
    assert accurate.tolist() == [[True, False]]


def test_an_answer_that_was_not_found_earns_nothing() -> None:
    """Catches NaN in a reward."""
    found = bonuses(np.array([[1.0, 1.0]]), np.array([[np.nan, 0.4]]), ConsistencyConfig(weight=0.5))
    assert found.tolist() == [[0.0, 0.5]]
