r"""Forced Rethinking: who looks twice, after which words, and what is kept of it. numpy only.

VL-Rethinker (arXiv 2504.08837) §3.3: a trigger is appended to a finished response, the model goes on, and what ends up
right is reinforced. Two rules: `random` chooses before anything is drawn, so the trigger is fed inside the decode loop;
`paper` chooses after the verdicts of the group, as the released code does. docs/rethinking.md has a line for every key.
"""

import dataclasses
import math
import re
from typing import Literal

import numpy as np

from rethinker_jax.config import RethinkConfig
from rethinker_jax.rewards.answers import count_waits
from rethinker_jax.types import FIRST, SECOND, TRIGGER, Completion, Verdict
from rethinker_jax.verify.extract import extract

# Signs of a second look in a response, as whole words; the released code counts "wait,", "wait a" and "alternatively".
REFLECTION = re.compile(
    r"\b(wait|alternatively|double[- ]check|re-?check|re-?examine|re-?evaluate|re-?think)\b", re.IGNORECASE
)
# What states the final answer. A full stop inside a number or a name ends no sentence: a space must follow it.
_STATED = re.compile(r"\\boxed|answer", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s)|[。！？\n]")
NOISE = 1e-6  # what a mean over equal float32 rewards may leave of an advantage
DEFAULTS = RethinkConfig()

# Why a second look is not trained on, in the order in which it is asked.
NotKept = Literal["wrong", "unfinished", "short", "waits", "no_answer", "full"]
NOT_KEPT: tuple[NotKept, ...] = ("wrong", "unfinished", "short", "waits", "no_answer", "full")
NLL_SEGMENTS = {
    "none": (),
    "second": (SECOND,),
    "trigger_and_second": (TRIGGER, SECOND),
    "all": (FIRST, TRIGGER, SECOND),
}


def rethinks(text: str) -> bool:
    """Does the response look back at itself, by its words."""
    return REFLECTION.search(text) is not None


def fraction_at(config: RethinkConfig, step: int) -> float:
    """The share q at a step: `fraction` at step 0, `final_fraction` from `until_step` on."""
    if config.until_step == 0:
        return config.fraction
    if step >= config.until_step:
        return config.final_fraction
    done = step / config.until_step
    left = {"step": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[config.schedule]
    return config.final_fraction + left * (config.fraction - config.final_fraction)


def at_step(config: RethinkConfig, step: int) -> RethinkConfig:
    """The config with the step's share as its `fraction`."""
    return dataclasses.replace(config, fraction=fraction_at(config, step))


def active(config: RethinkConfig, step: int) -> bool:
    return config.rule != "off" and fraction_at(config, step) > 0


def coin(seed: int, step: int, problem_hash: int, sample: int) -> np.random.Generator:
    """The randomness of one sample's rethinking, by name."""
    return np.random.default_rng([seed, step, problem_hash, sample, 0x7E])


def choose_at_random(config: RethinkConfig, rng: np.random.Generator) -> int | None:
    """Rule `random`: the number of a trigger for a share `fraction` of the samples, None for the others."""
    if rng.random() >= config.fraction:
        return None
    odds = np.array(config.odds, np.float64)
    return int(rng.choice(len(odds), p=odds / odds.sum()))


def has_room(config: RethinkConfig, first: Completion) -> bool:
    """May a trigger stand behind this first response: it ended by itself, within `max_first_tokens`."""
    return first.finish_reason == "stop" and len(first) <= config.max_first_tokens


def in_scope(config: RethinkConfig, correct: bool, group_score: float) -> bool:
    """Rule `paper`: is a first response eligible by its verdict and its group's share of right ones (`group_rule`)."""
    easy = group_score > config.easy_group
    if config.group_rule == "spare_easy":
        return correct or not easy
    return config.group_rule == "any" or not (correct or easy)


def choose_by_verdict(
    config: RethinkConfig, first: Completion, verdict: Verdict, group_score: float, rng: np.random.Generator
) -> int | None:
    """Rule `paper`: the number of a trigger, or None: for those who are not eligible and a share 1 − fraction of the
    others.

    With `trigger_by_verdict` and four triggers or more the last two are "double check" for right and "there might be a
    mistake" for wrong responses; they share the odds that the first ones leave.
    """
    if not has_room(config, first) or not in_scope(config, verdict.correct, group_score):
        return None
    if rng.random() >= config.fraction:
        return None
    odds = np.array(config.odds, np.float64) / sum(config.odds)
    number = int(rng.choice(len(odds), p=odds))
    if len(odds) < 4 or not config.trigger_by_verdict or number < len(odds) - 2:
        return number
    return len(odds) - 2 if verdict.correct else len(odds) - 1


def cut_first_response(text: str, where: str = "released") -> str:
    r"""What a second look goes on from, by `rethink.truncate_at`; it may be nothing.

    released     the code's cut: at the last "Wait", at the last \boxed, at the first "answer", at the last blank line,
                 each in what the one before has left. The *first* "answer" is as published, and may leave little
    last_answer  the same, but at the last "answer"
    paragraph    at the last blank line
    sentence     before the sentence that holds the last \boxed or, where there is none, the last "answer"
    """
    if where == "paragraph":
        return _before_last(text, "\n\n").strip()
    if where == "sentence":
        return _without_conclusion(text)
    text = _before_last(_before_last(text, "Wait"), "\\boxed")
    if where == "last_answer":
        places = [found.start() for found in re.finditer("answer", text, re.IGNORECASE)]
        text = text[: places[-1]] if places else text
    else:
        text = re.split("answer", text, maxsplit=1, flags=re.IGNORECASE)[0]
    return _before_last(text, "\n\n").strip()


def _before_last(text: str, mark: str) -> str:
    place = text.rfind(mark)
    return text[:place] if place >= 0 else text


def _without_conclusion(text: str) -> str:
    places = [found.start() for found in _STATED.finditer(text)]
    boxes = [place for place in places if text[place] == "\\"]
    if not places:
        return text.strip()
    before = text[: (boxes or places)[-1]]
    ends = [found.end() for found in _SENTENCE_END.finditer(before)]
    return before[: ends[-1]].strip() if ends else ""


def why_not_kept(config: RethinkConfig, forced: Completion, verdict: Verdict, num_kept: int) -> NotKept | None:
    """Why a forced completion is not trained on, None where it is; `num_kept` of its group are kept already."""
    if config.keep == "correct" and not verdict.correct:
        return "wrong"
    if forced.finish_reason != "stop":
        return "unfinished"
    if (forced.segments == SECOND).sum() < config.min_second_tokens:
        return "short"
    second = "".join(text for segment, text in forced.parts if segment == SECOND)
    if config.max_waits and 1 + count_waits(second) > config.max_waits:
        return "waits"
    if config.answer_again and extract(second).text is None:
        return "no_answer"
    return "full" if num_kept >= config.max_kept_per_problem else None


def is_kept(config: RethinkConfig, forced: Completion, verdict: Verdict, num_kept: int) -> bool:
    """Is a forced completion trained on, in place of its first response or beside it (`kept_as`)."""
    return why_not_kept(config, forced, verdict, num_kept) is None


def loss_masks(
    completion: Completion, config: RethinkConfig = DEFAULTS, *, correct: bool = True, advantage: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """(policy gradient, supervised) masks of the tokens of what is trained on, bool [length].

    By default a forced completion's policy gradient is on the second look only: the trigger was inserted, which bars it
    whatever the config, and a wrong first response must not be praised for what mended it. The supervised loss is on
    trigger and second look of right ones, so that the model learns to look twice by itself. `correct` and `advantage`
    are the completion's own; `nll_rows` says which of them count.
    """
    segments, rows = completion.segments, config.nll_rows
    positive = advantage > NOISE
    if not completion.forced:
        waits = config.rule != "off" and rows == "positive_waits" and positive and count_waits(completion.text) > 0
        return segments == FIRST, np.full(len(completion), waits)
    policy = segments == SECOND if config.policy_on == "second" else segments != TRIGGER
    learned = (correct or rows == "positive_waits") and (positive or rows == "correct_forced")
    return policy, np.isin(segments, NLL_SEGMENTS[config.nll_on]) & learned
