"""The forms of Forced Rethinking that keys name, each from its key to what an update would learn."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest

from rethinker_jax.config import AdvantageConfig, Config, RethinkConfig
from rethinker_jax.config_file import load_defaults
from rethinker_jax.errors import UserError
from rethinker_jax.experience import experience_of, with_advantages
from rethinker_jax.rethink import (
    NOT_KEPT,
    active,
    at_step,
    choose_at_random,
    choose_by_verdict,
    coin,
    cut_first_response,
    fraction_at,
    loss_masks,
    why_not_kept,
)
from rethinker_jax.rollout import Group, keep
from rethinker_jax.step_metrics import rollout_metrics
from rethinker_jax.types import FIRST, SECOND, TRIGGER, Completion, Problem, Prompt, Rollout, Verdict

RIGHT = Verdict("correct", 1.0, "7", "number")
WRONG = Verdict("wrong", 0.0, "8", "number")
PAPER = RethinkConfig(rule="paper", fraction=1.0, max_first_tokens=10)
PROMPT = Prompt(Problem("p", "Q", "7"), np.zeros(1, np.int32), np.zeros((3, 1), np.int32), np.full(1, -1, np.int32), 1)


def completion(
    counts: dict[int, int], finish: Any = "stop", second: str = "so \\boxed{7}", text: str = ""
) -> Completion:
    """A completion with so many tokens of each segment; `second` is the text of its second look."""
    segments = np.repeat(list(counts), list(counts.values())).astype(np.int8)
    parts = ((FIRST, "It is 7."), (TRIGGER, "\n\nWait, does it seem right?"), (SECOND, second))
    ids, values = np.arange(len(segments), dtype=np.int32), np.full(len(segments), -1.0, np.float32)
    return Completion(ids, values, segments, finish, text, parts if TRIGGER in counts else ())


FIRST_ONE = completion({FIRST: 3})
LOOK = completion({FIRST: 2, TRIGGER: 2, SECOND: 3})
# The trigger is one of them; "waiter" is none.
THREE_WAITS = completion({TRIGGER: 1, SECOND: 3}, second="wait a bit, waiter. Wait, 7")


# --- who ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("step", [0.8, 0.8, 0.8, 0.8, 0.2, 0.2]),
        ("linear", [0.8, 0.65, 0.5, 0.35, 0.2, 0.2]),
        # 0.2 + 0.6 (1 + cos(pi s / 4)) / 2, cos = 1, 0.7071, 0, -0.7071
        ("cosine", [0.8, 0.712132, 0.5, 0.287868, 0.2, 0.2]),
    ],
)
def test_the_share_at_a_step(schedule: Any, wanted: list[float]) -> None:
    """Catches a share that ends a step late, runs on below its end, or falls to 0 instead of `final_fraction`."""
    config = RethinkConfig(rule="paper", fraction=0.8, final_fraction=0.2, until_step=4, schedule=schedule)
    assert [fraction_at(config, step) for step in range(6)] == pytest.approx(wanted, abs=1e-6)
    assert [at_step(config, step).fraction for step in range(6)] == pytest.approx(wanted, abs=1e-6)
    assert active(config, 1000)
    ends = dataclasses.replace(config, final_fraction=0.0)
    assert active(ends, 3) and not active(ends, 4)
    rises = dataclasses.replace(config, fraction=0.0, final_fraction=0.5, schedule="linear")
    assert not active(rises, 0) and fraction_at(rises, 2) == 0.25
    assert fraction_at(dataclasses.replace(config, until_step=0), 10**6) == 0.8  # 0 = never changes


@pytest.mark.parametrize("rule", ["random", "paper"])
def test_a_falling_share_drops_samples_and_adds_none(rule: str) -> None:
    """The coin of a sample does not know the share. Catches a choice by rank or by a generator that runs on: samples
    would come and go."""

    def chosen(fraction: float) -> dict[int, int]:
        config = dataclasses.replace(PAPER, fraction=fraction)
        found = {}
        for sample in range(200):
            rng = coin(3, 4, 5, sample)
            number = (
                choose_at_random(config, rng) if rule == "random"
                else choose_by_verdict(config, FIRST_ONE, WRONG, 0.0, rng)
            )  # fmt: skip
            if number is not None:
                found[sample] = number
        return found

    many, few = chosen(0.7), chosen(0.3)
    assert 0 < len(few) < len(many) < 200
    assert few == {sample: many[sample] for sample in few}


@pytest.mark.parametrize(
    ("rule", "eligible"),
    [
        # (right, score): an easy group is above 0.6
        ("spare_easy", [True, True, True, False]),
        ("wrong_in_hard", [False, True, False, False]),
        ("any", [True, True, True, True]),
    ],
)
def test_who_is_eligible_by_the_groups_score(rule: Any, eligible: list[bool]) -> None:
    """Catches a rule that looks at the score alone, and one that takes the score 0.6 for easy."""
    config = dataclasses.replace(PAPER, group_rule=rule, easy_group=0.6)
    cases = [(RIGHT, 0.6), (WRONG, 0.6), (RIGHT, 0.61), (WRONG, 0.61)]
    found = [choose_by_verdict(config, FIRST_ONE, verdict, score, coin(0, 0, 1, 2)) for verdict, score in cases]
    assert [number is not None for number in found] == eligible
    long = completion({FIRST: 11})
    assert choose_by_verdict(config, long, WRONG, 0.0, coin(0, 0, 1, 2)) is None  # whatever the group's rule


def test_triggers_that_do_not_mind_the_verdict() -> None:
    """Four equal odds, as in the code's mode `append_wait`. Catches the last two that are still told apart: a wrong
    response would never get the third."""
    config = dataclasses.replace(PAPER, trigger_by_verdict=False, odds=(1.0, 1.0, 1.0, 1.0))
    numbers = [choose_by_verdict(config, FIRST_ONE, WRONG, 0.0, coin(0, 0, 7, sample)) for sample in range(2000)]
    shares = [numbers.count(number) / 2000 for number in range(4)]
    np.testing.assert_allclose(shares, 0.25, atol=0.03)  # 3 sigma are 0.029


# --- where the first response is cut --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "text", "wanted"),
    [
        # The first "answer" would leave "To"; the last leaves all up to the blank line.
        ("last_answer", "To answer.\n\n3 + 4 = 7.\n\nThe answer is \\boxed{7}.", "To answer.\n\n3 + 4 = 7."),
        ("last_answer", "An ANSWER. Then an Answer. Wait, no answer", "An ANSWER. Then an"),
        ("last_answer", "3 + 4 = 7", "3 + 4 = 7"),
        ("paragraph", "One.\n\nTwo. Wait.\n\nThe answer is \\boxed{7}.", "One.\n\nTwo. Wait."),
        ("paragraph", " One line ", "One line"),
        ("sentence", "I add 3.5 and 4. So it is \\boxed{7.5}. Done.", "I add 3.5 and 4."),  # 3.5 ends no sentence
        ("sentence", "The answer is near. I add. The answer is 7", "The answer is near. I add."),
        # The box counts, not an "answer" behind it.
        ("sentence", "I add. It is \\boxed{7}. That is my answer.", "I add."),
        ("sentence", "I add\nso \\boxed{7}", "I add"),
        ("sentence", "\\boxed{7}", ""),
        ("sentence", " Nothing is stated. ", "Nothing is stated."),
        ("released", "To answer this, I add. It is 7.", "To"),
    ],
)  # fmt: skip
def test_other_cuts(where: str, text: str, wanted: str) -> None:
    assert cut_first_response(text, where) == wanted


# --- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "forced", "verdict", "num_kept", "why"),
    [
        ({}, LOOK, RIGHT, 1, None),
        ({}, LOOK, WRONG, 0, "wrong"),
        ({}, LOOK, RIGHT, 2, "full"),
        ({}, completion({FIRST: 2, TRIGGER: 1, SECOND: 3}, "length"), RIGHT, 0, "unfinished"),
        ({"keep": "all"}, LOOK, WRONG, 0, None),
        ({"keep": "all"}, LOOK, WRONG, 2, "full"),
        ({"keep": "all"}, completion({FIRST: 2, TRIGGER: 1, SECOND: 3}, "length"), WRONG, 0, "unfinished"),
        ({"min_second_tokens": 3}, LOOK, RIGHT, 0, None),
        ({"min_second_tokens": 4}, LOOK, RIGHT, 0, "short"),  # 7 tokens in all, 3 of the second look
        ({"max_waits": 3}, THREE_WAITS, RIGHT, 0, None),
        ({"max_waits": 2}, THREE_WAITS, RIGHT, 0, "waits"),
        ({"max_waits": 1}, LOOK, RIGHT, 0, None),
        ({}, completion({TRIGGER: 1, SECOND: 3}, second="wait, " * 9), RIGHT, 0, None),  # 0 = no limit
        ({"answer_again": True}, LOOK, RIGHT, 0, None),
        # Right by what the first response said: the look itself says nothing.
        ({"answer_again": True}, completion({TRIGGER: 1, SECOND: 3}, second="Yes."), RIGHT, 0, "no_answer"),
        ({}, completion({TRIGGER: 1, SECOND: 3}, second="Yes."), RIGHT, 0, None),
    ],
)  # fmt: skip
def test_why_a_second_look_is_not_kept(
    changed: dict[str, Any], forced: Completion, verdict: Verdict, num_kept: int, why: str | None
) -> None:
    assert why_not_kept(dataclasses.replace(PAPER, **changed), forced, verdict, num_kept) == why


def make_group(firsts: str, seconds: str, config: RethinkConfig) -> Group:
    """A group by letters: r right, w wrong, and for second looks . where none was forced."""
    of = {"r": RIGHT, "w": WRONG}
    rollouts = [
        Rollout(PROMPT, sample, FIRST_ONE, of[one], LOOK if two in of else None, of.get(two))
        for sample, (one, two) in enumerate(zip(firsts, seconds, strict=True))
    ]
    return Group(0, PROMPT, keep(rollouts, Config(rethink=config)), config)


@pytest.mark.parametrize(
    ("kept_by", "limit", "kept"),
    [
        ("correct", 2, [False, True, False, False, True, False]),
        ("correct", 9, [False, True, False, False, True, True]),
        ("all", 2, [True, True, False, False, False, False]),
        ("all", 9, [True, True, False, True, True, True]),
    ],
)
def test_which_second_looks_of_a_group_are_kept(kept_by: Any, limit: int, kept: list[bool]) -> None:
    """Catches a limit on right ones alone, and reasons that disagree with what was kept."""
    group = make_group("wwwwww", "wr.wrr", dataclasses.replace(PAPER, keep=kept_by, max_kept_per_problem=limit))
    assert [one.kept for one in group.rollouts] == kept
    assert sum(kept) <= limit
    assert [why is None for why in group.not_kept] == [one.kept for one in group.rollouts if one.forced]
    # A wrong one that is kept costs its reward.
    assert group.rewards.tolist() == [float(one.kept and one.forced_verdict == RIGHT) for one in group.rollouts]


# --- what is learned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "policy", "nll"),
    [
        ({}, [0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]),
        ({"policy_on": "first_and_second"}, [1, 1, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]),
        ({"nll_on": "second"}, [0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]),
        ({"nll_on": "all"}, [0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]),
        ({"nll_on": "none"}, [0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_tokens_of_a_kept_row(changed: dict[str, Any], policy: list[int], nll: list[int]) -> None:
    found = loss_masks(LOOK, dataclasses.replace(PAPER, **changed))
    assert [mask.astype(int).tolist() for mask in found] == [policy, nll]


@pytest.mark.parametrize(
    ("rows", "correct", "advantage", "supervised"),
    [
        ("correct_forced", True, 0.0, True),  # whatever its group did
        ("correct_forced", True, -0.5, True),
        ("correct_forced", False, 0.5, False),  # kept by `keep: all`, and nothing to imitate
        ("positive_forced", True, 0.5, True),
        ("positive_forced", True, 3e-8, False),  # what float32 leaves of 0
        ("positive_forced", False, 0.5, False),
        ("positive_waits", False, 0.5, True),  # the code asks for the advantage alone
        ("positive_waits", True, 0.0, False),
    ],
)
def test_rows_of_the_supervised_loss(rows: Any, correct: bool, advantage: float, supervised: bool) -> None:
    config = dataclasses.replace(PAPER, nll_rows=rows, nll_on="all")
    policy, nll = loss_masks(LOOK, config, correct=correct, advantage=advantage)
    assert nll.all() == nll.any() == supervised
    assert policy.tolist() == (LOOK.segments == SECOND).tolist()  # the policy gradient is not asked


def test_unforced_waits_are_learned_where_the_code_learns_them() -> None:
    """Catches "waiter" for a wait, rows below their siblings, and unforced rows under the paper's rule."""
    code = dataclasses.replace(PAPER, nll_rows="positive_waits", nll_on="all")
    waits, waiter = (completion({FIRST: 4}, text=text) for text in ("7. Wait, no. 8", "The waiter has 7"))
    cases = [(code, waits, 0.5), (code, waits, -0.5), (code, waiter, 0.5), (PAPER, waits, 0.5)]
    found = [loss_masks(one, config, advantage=advantage)[1] for config, one, advantage in cases]
    assert [mask.tolist() for mask in found] == [[True] * 4, [False] * 4, [False] * 4, [False] * 4]
    off = dataclasses.replace(code, rule="off")
    assert not loss_masks(waits, off, advantage=0.5)[1].any()


def test_no_policy_gradient_ever_falls_on_a_trigger() -> None:
    keys = ("policy_on", "nll_on", "nll_rows", "keep")
    choices = [
        ("second", "first_and_second"),
        ("none", "second", "trigger_and_second", "all"),
        ("correct_forced", "positive_forced", "positive_waits"),
        ("correct", "all"),
    ]
    for values in itertools.product(*choices):
        config = dataclasses.replace(PAPER, **dict(zip(keys, values, strict=True)))
        policy, nll = loss_masks(LOOK, config)
        assert policy.any() and not policy[LOOK.segments == TRIGGER].any()
        assert policy.dtype == nll.dtype == np.bool_ and policy.shape == nll.shape == LOOK.segments.shape
        assert nll.any() == (config.nll_on != "none")


@pytest.mark.parametrize(
    ("baseline", "wanted"),
    [
        ("first", [0.75, 0.75, -0.25, 0.75]),  # less 1/4
        ("final", [0.25, 0.25, -0.75, 0.25]),  # less 3/4: the honest success of the last sample loses 1/2
    ],
)
def test_what_an_advantage_compares_with(baseline: Any, wanted: list[float]) -> None:
    """First rewards 0 0 0 1; second looks mend the first two samples."""
    config = Config(rethink=dataclasses.replace(PAPER, baseline=baseline))
    (group,) = with_advantages([make_group("wwwr", "rrw.", config.rethink)], config)
    assert [one.advantage for one in group.rollouts] == pytest.approx(wanted)
    # final: 0.75 / sqrt(3/16), the std of 1 1 0 1; first: the std over first and final rewards, four of each kind, 1/2
    config = dataclasses.replace(config, advantage=AdvantageConfig("group_std"))
    (group,) = with_advantages([make_group("wwwr", "rrw.", config.rethink)], config)
    std = 0.5 if baseline == "first" else math.sqrt(3 / 16)
    assert [one.advantage for one in group.rollouts] == pytest.approx([one / std for one in wanted], rel=1e-5)


def test_experiences_have_the_masks_of_their_config() -> None:
    """A mended row, a kept wrong one and an unforced one, as the code would learn them but for the trigger. Catches
    masks by the defaults, and advantages that come too late for them."""
    rule = dataclasses.replace(
        PAPER, keep="all", baseline="final", policy_on="first_and_second", nll_on="all", nll_rows="positive_waits"
    )
    config = Config(rethink=rule)
    (group,) = with_advantages([make_group("wrw", "rw.", rule)], config)  # final rewards 1 0 0
    rows = [experience_of(group, one, 3) for one in group.rollouts]
    assert [row.advantage for row in rows] == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    both = [True, True, False, False, True, True, True]
    assert [row.loss_mask.tolist() for row in rows] == [both, both, [True] * 3]
    assert [row.nll_mask.tolist() for row in rows] == [[True] * 7, [False] * 7, [False] * 3]

    (group,) = with_advantages([make_group("wrw", "rw.", PAPER)], Config(rethink=PAPER))
    rows = [experience_of(group, one, 3) for one in group.rollouts]
    assert [len(row.completion_ids) for row in rows] == [7, 3, 3]  # the wrong second look is gone
    assert [row.nll_mask.any() for row in rows] == [True, False, False]


def test_longer_policy_masks_weigh_more() -> None:
    """reinforce_plus_plus weighs by policy tokens: 7 less 2 of a trigger with first_and_second, 3 by default, and 3 of
    the unforced. Catches lengths by the default masks."""
    for policy_on, tokens in (("second", (3, 3)), ("first_and_second", (5, 3))):
        rule = dataclasses.replace(PAPER, policy_on=policy_on)
        config = Config(rethink=rule, advantage=AdvantageConfig("reinforce_plus_plus"))
        (group,) = with_advantages([make_group("ww", "r.", rule)], config)
        rewards = np.repeat([1.0, 0.0], tokens)
        wanted = (np.array([1.0, 0.0]) - rewards.mean()) / rewards.std()
        assert [one.advantage for one in group.rollouts] == pytest.approx(wanted.tolist(), rel=1e-5)


# --- metrics --------------------------------------------------------------------------------------------------------


def test_metrics_of_second_looks() -> None:
    """Two groups of four. Firsts: w w r r | w r r r, second looks on w→r, w→w, r→w | w→r and r→r, one kept a group.

    Wrong at first: 3 of the 5 forced, and 3 of all 8, of which one right one (the last) is too long for a trigger: 3 of
    7. Catches shares of all samples, a gain of kept ones alone, and a selectivity against those without room.
    """
    rule = dataclasses.replace(PAPER, max_kept_per_problem=1)
    groups = [make_group("wwrr", "rww.", rule), make_group("wrrr", "rr..", rule)]
    ends = [dataclasses.replace(FIRST_ONE, text=text) for text in ("7. Wait, 8", "7", "7", "7")]
    # Of their own accord: the first of each group, wrong both times, and the last of the first group, right.
    ends_of = [[ends[0], ends[1], ends[2], ends[0]], [ends[0], ends[1], ends[2], completion({FIRST: 11})]]
    groups = [
        dataclasses.replace(
            group,
            rollouts=tuple(
                dataclasses.replace(one, first=first) for one, first in zip(group.rollouts, firsts, strict=True)
            ),
        )
        for group, firsts in zip(groups, ends_of, strict=True)
    ]
    found = rollout_metrics(groups, 1e-6)
    wanted = {
        "forced_share": 5 / 8,
        "forced_first_accuracy": 2 / 5,
        "forced_final_accuracy": 3 / 5,
        "rethink_gain": 1 / 5,
        "wrong_to_right": 2 / 3,
        "right_to_wrong": 1 / 2,
        "kept_share": 2 / 5,
        "not_kept/wrong": 2 / 5,
        "not_kept/full": 1 / 5,  # the second right one of the second group
        "not_kept/short": 0.0,
        "selectivity": (3 / 5) / (3 / 7),
        "rethink_ratio": 3 / 8,
        "rethink_ratio_wrong": 2 / 3,
        "rethink_ratio_correct": 1 / 5,
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert sum(found[f"not_kept/{why}"] for why in NOT_KEPT) + found["kept_share"] == pytest.approx(1)


def test_metrics_without_a_second_look_have_no_value() -> None:
    """Catches a 0, which would be drawn as a rethinking that helps nobody."""
    found = rollout_metrics([make_group("wr", "..", PAPER)], 1e-6)
    names = ("selectivity", "rethink_gain", "kept_share", "not_kept/wrong", "wrong_to_right")
    assert all(math.isnan(found[name]) for name in names) and found["forced_share"] == 0
    # All who could get a trigger are right: nobody could be chosen for being wrong.
    assert math.isnan(rollout_metrics([make_group("rr", "r.", PAPER)], 1e-6)["selectivity"])


# --- the config -----------------------------------------------------------------------------------------------------

UNREAD = [
    (["rule=random", "truncate=0.5"], "rethink.truncate is 0.5 with rethink.rule random"),
    (["rule=random", "group_rule=any"], "rethink.group_rule is any with rethink.rule random"),
    (["rule=random", "easy_group=0.5"], "rethink.easy_group is 0.5 with rethink.rule random"),
    (["rule=random", "trigger_by_verdict=false"], "rethink.trigger_by_verdict is False with rethink.rule random"),
    (["rule=paper", "truncate_at=sentence"], "rethink.truncate_at is sentence with rethink.truncate 0"),
    (["rule=paper", "group_rule=any", "easy_group=0.5"], "rethink.easy_group is 0.5 with rethink.group_rule any"),
    (["rule=paper", "schedule=linear"], "rethink.schedule is linear with rethink.until_step 0"),
    (["rule=paper", "final_fraction=0.1"], "rethink.final_fraction is 0.1 with rethink.until_step 0"),
    (["rule=paper", "nll_on=none", "nll_rows=positive_forced"], "rethink.nll_rows is positive_forced with"),
    (["rule=paper", "nll_rows=positive_waits"], "wanted rethink.nll_on=all"),
    (["rule=paper", "min_second_tokens=9", "max_new_tokens=8"], "min_second_tokens 9 is above rethink.max_new_tokens"),
]


@pytest.mark.parametrize(("words", "part"), UNREAD, ids=[" ".join(words) for words, _ in UNREAD])
def test_keys_without_effect_are_refused(words: list[str], part: str) -> None:
    with pytest.raises(UserError) as error:
        load_defaults([f"rethink.{word}" for word in words])
    assert part in str(error.value)


def test_keys_that_clash_with_other_sections() -> None:
    with pytest.raises(UserError, match=r"advantage\.estimator remax, which compares with no sibling"):
        load_defaults(["rethink.rule=paper", "rethink.baseline=final", "advantage.estimator=remax"])


def test_the_released_codes_modes_are_configs() -> None:
    """`force_append_wait` of 20 and 24 April and `append_wait`; catches a rule that is too strict for them."""
    released = ["rule=paper", "truncate=0.5", "min_second_tokens=31", "max_waits=4", "max_new_tokens=1023"]
    released += ["baseline=final", "policy_on=first_and_second", "nll_on=all", "nll_rows=positive_waits"]
    append = ["rule=paper", "fraction=1", "group_rule=wrong_in_hard", "easy_group=0.6", "max_kept_per_problem=8"]
    append += ["trigger_by_verdict=false", "odds=[1, 1, 1, 1]"]
    falling = ["rule=random", "until_step=100", "schedule=cosine", "final_fraction=0.1", "keep=all"]
    for words in (released, [*released, "keep=all"], append, falling, ["rule=random", "fraction=0", *falling[1:]]):
        load_defaults([f"rethink.{word}" for word in words])
    load_defaults(["rethink.rule=off", "rethink.truncate_at=sentence"])  # off is a switch, whatever else is said
