"""The built-in terms by name, the check of a row against its terms, and the weighted sum."""

import dataclasses
from collections.abc import Mapping

from rethinker_jax.config_rewards import RewardConfig
from rethinker_jax.errors import UserError
from rethinker_jax.rewards import answers, formats, grounding, shaping
from rethinker_jax.rewards.inputs import UNINFORMATIVE, Term, TermValue, terms_of
from rethinker_jax.types import Problem, Verdict

JUDGE = "judge"  # the one built-in that is no pure function: `judge_model`
OVERALL = "overall"  # of the named parts of a value, what counts; EasyR1's name for it
TERMS: Mapping[str, Term] = {
    "accuracy": answers.accuracy,
    "format": formats.well_formed,
    "vl_rethinker_code": answers.vl_rethinker_code,
    "openvlthinker": answers.openvlthinker,
    "iou": grounding.mean_iou,
    "map": grounding.mean_average_precision,
    "od_length": grounding.od_length,
    "digit": answers.digit,
    "ocr": answers.ocr,
    "rouge": answers.rouge,
    "regression": answers.regression,
    "length": shaping.length,
    "repetition": shaping.repetition,
    "language": shaping.language,
    "citation_f1": answers.citation_f1,
    "soft_overlong": shaping.soft_overlong,
}


def check_row(problem: Problem, settings: RewardConfig) -> str:
    """Why the terms of a row could not judge it by its gold, or "": for loaders that drop such rows by name."""
    try:
        for term in terms_of(problem, settings):
            if term in ("iou", "map", "od_length"):
                grounding.gold_boxes(problem)
            elif term in ("digit", "regression") and answers.read_number(answers.gold_text(problem)) is None:
                return f"the reward term {term} wants a number in digits as answer"
            elif term == "citation_f1":
                answers.read_citations(problem, settings.citation.column)
    except UserError as error:
        return str(error)
    return ""


def weigh(
    verdict: Verdict, values: Mapping[str, TermValue], weights: Mapping[str, float], missing: Mapping[str, str]
) -> Verdict:
    """The verdict with its reward, the sum of weight * value, and every value as a part.

    Named parts of a value are kept as `term/name`; they count by `overall`, or else by their sum. A term without a
    value (`missing`: term → why) adds nothing.
    """
    weighed = dataclasses.replace(verdict, reward=0.0, parts={}, missing=dict(missing))
    for term, value in values.items():
        weighed = add_part(weighed, term, value, weights[term])
    return weighed


def add_part(verdict: Verdict, term: str, value: TermValue, weight: float) -> Verdict:
    """One more term: also for those that are known only later, such as what the model itself makes of an answer.

    Where the verdict says nothing about the response, a term that would pay for it counts as 0.
    """
    if isinstance(value, Mapping):
        named = {f"{term}/{name}": float(part) for name, part in value.items() if name != OVERALL}
        number = float(value[OVERALL]) if OVERALL in value else float(sum(value.values()))
    else:
        named, number = {}, float(value)
    if verdict.verdict in UNINFORMATIVE and weight * number > 0:
        number = 0.0
    parts = {**verdict.parts, term: number, **named}
    return dataclasses.replace(verdict, reward=verdict.reward + weight * number, parts=parts)
