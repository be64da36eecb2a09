r"""Forced Rethinking: who looks twice, after which words, and what is kept of it. numpy only.

VL-Rethinker (arXiv 2504.08837) §3.3: a trigger is appended to a finished response, the model goes on, and what ends up
right is reinforced. Two rules: `random` chooses before anything is drawn, so the trigger is fed inside the decode loop;
`paper` chooses after the verdicts of the group, as the released code does (its §2.5 in our notes: docs/paper_index.md).
"""

import re

import numpy as np

from rethinker_jax.config import RethinkConfig
from rethinker_jax.types import FIRST, SECOND, TRIGGER, Completion, Verdict

# Signs of a second look in a response, as whole words; the released code counts "wait,", "wait a" and "alternatively".
REFLECTION = re.compile(
    r"\b(wait|alternatively|double[- ]check|re-?check|re-?examine|re-?evaluate|re-?think)\b", re.IGNORECASE
)


def rethinks(text: str) -> bool:
    """Does the response look back at itself, by its words."""
    return REFLECTION.search(text) is not None


def active(config: RethinkConfig, step: int) -> bool:
    return config.rule != "off" and (config.until_step == 0 or step < config.until_step)


def coin(seed: int, step: int, problem_hash: int, sample: int) -> np.random.Generator:
    """The randomness of one sample's rethinking, by name."""
    return np.random.default_rng([seed, step, problem_hash, sample, 0x7E])


def choose_at_random(config: RethinkConfig, rng: np.random.Generator) -> int | None:
    """Rule `random`: the number of a trigger for a share `fraction` of the samples, None for the others."""
    if rng.random() >= config.fraction:
        return None
    odds = np.array(config.odds, np.float64)
    return int(rng.choice(len(odds), p=odds / odds.sum()))


def choose_by_verdict(
    config: RethinkConfig, first: Completion, verdict: Verdict, group_score: float, rng: np.random.Generator
) -> int | None:
    """Rule `paper`: the number of a trigger, or None.

    Left alone: responses that did not end by themselves or are longer than `max_first_tokens`; wrong ones in groups
    that score above `easy_group`; and a share 1 − fraction of the rest. The last two triggers are "double check" for
    right and "there might be a mistake" for wrong responses; they share the odds that the first ones leave.
    """
    if first.finish_reason != "stop" or len(first) > config.max_first_tokens:
        return None
    if group_score > config.easy_group and not verdict.correct:
        return None
    if rng.random() >= config.fraction:
        return None
    odds = np.array(config.odds, np.float64) / sum(config.odds)
    if len(odds) < 4:
        return int(rng.choice(len(odds), p=odds))
    by_verdict = len(odds) - 2 if verdict.correct else len(odds) - 1
    number = int(rng.choice(len(odds), p=odds))
    return by_verdict if number >= len(odds) - 2 else number


def cut_first_response(text: str) -> str:
    r"""The released code's cut: at the last "Wait", at the last \boxed, at the first "answer", at the last blank line.

    That the third cut takes the *first* "answer" is as published, and may leave little.
    """
    for mark in ("Wait", "\\boxed"):
        place = text.rfind(mark)  # in what the cut before has left
        text = text[:place] if place >= 0 else text
    text = re.split("answer", text, maxsplit=1, flags=re.IGNORECASE)[0]
    place = text.rfind("\n\n")
    return (text[:place] if place >= 0 else text).strip()


def is_kept(config: RethinkConfig, forced: Completion, verdict: Verdict, num_kept: int) -> bool:
    """Is a forced completion trained on: right, ended by itself, and at most `max_kept_per_problem` a problem."""
    return verdict.correct and forced.finish_reason == "stop" and num_kept < config.max_kept_per_problem


def loss_masks(completion: Completion) -> tuple[np.ndarray, np.ndarray]:
    """(policy gradient, supervised) masks of a completion's tokens, bool [length].

    A forced completion's policy gradient is on the second look only: the trigger was inserted, and a wrong first
    response must not be praised for what mended it. The supervised loss is on trigger and second look, so that the
    model learns to look twice by itself.
    """
    if not completion.forced:
        return completion.segments == FIRST, np.zeros(len(completion), bool)
    return completion.segments == SECOND, (completion.segments == TRIGGER) | (completion.segments == SECOND)
