"""The term `format`: is a response put together as it was asked for. One pass each, whatever the text.

Every form wants a response that ended, every element exactly once and in order, and something in it: what the published
patterns also accept (empty elements, several answers) is pay for nothing.
"""

from collections.abc import Callable, Mapping

from rethinker_jax.config_rewards import FormatForm
from rethinker_jax.rewards.inputs import RewardInput
from rethinker_jax.verify.boxes import parse_boxes
from rethinker_jax.verify.extract import ANSWER_TAG, extract


def well_formed(given: RewardInput) -> float:
    """1.0 for a response of the form `reward.format.form`, else 0.0."""
    return 1.0 if given.stopped and FORMS[given.settings.format.form](given.response) else 0.0


def boxed(response: str) -> bool:
    r"""A `\boxed{}` with something in it (VL-Rethinker's prompt)."""
    found = extract(response)
    return found.text is not None and found.rule != ANSWER_TAG


def think_answer(response: str) -> bool:
    """`<think>...</think> <answer>...</answer>` and nothing else: R1-V, VLM-R1, EasyR1's r1v, OpenVLThinker's log."""
    return _between(response) == ""


def think_prose_answer(response: str) -> bool:
    """`<think>...</think>`, a solution for the reader, `<answer>...</answer>`: the traces OpenVLThinker learns from."""
    return bool(_between(response))


def think_boxed(response: str) -> bool:
    r"""`<think>...</think>` and after it a `\boxed{}` with something in it: EasyR1's math."""
    thought = _after_thought(response)
    return thought is not None and boxed(thought)


def think_answer_box(response: str) -> bool:
    """As `think_answer`, with valid bounding boxes as the answer: VLM-R1's format for referring expressions."""
    answer = response.strip().partition("<answer>")[2].removesuffix("</answer>")
    return think_answer(response) and parse_boxes(answer.strip()) is not None


def _after_thought(response: str) -> str | None:
    """What follows the one `<think>...</think>` at the start, or None."""
    response = response.strip()
    if response.count("<think>") != 1 or response.count("</think>") != 1 or not response.startswith("<think>"):
        return None
    thought, _, rest = response.removeprefix("<think>").partition("</think>")
    return rest if thought.strip() else None


def _between(response: str) -> str | None:
    """What stands between the thought and the one answer at the end, or None where there are not these two."""
    rest = _after_thought(response)
    if rest is None or rest.count("<answer>") != 1 or rest.count("</answer>") != 1 or not rest.endswith("</answer>"):
        return None
    prose, _, answer = rest.removesuffix("</answer>").partition("<answer>")
    return prose.strip() if answer.strip() else None


FORMS: Mapping[FormatForm, Callable[[str], bool]] = {
    "boxed": boxed,
    "think_answer": think_answer,
    "think_boxed": think_boxed,
    "think_prose_answer": think_prose_answer,
    "think_answer_box": think_answer_box,
}
