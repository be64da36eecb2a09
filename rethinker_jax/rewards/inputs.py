"""What a reward term is given, and how it reads the answer and the gold."""

import dataclasses
from collections.abc import Callable, Mapping

from rethinker_jax.config_rewards import RewardConfig
from rethinker_jax.types import Completion, Problem, Prompt, Verdict
from rethinker_jax.verify.extract import extract

# A verdict that says nothing about the response: no term may pay for it.
UNINFORMATIVE = ("bad_gold", "crash", "timeout")
DEFAULTS = RewardConfig()


@dataclasses.dataclass(frozen=True)
class ImageSize:
    """(width, height) in pixels before and after the resize; (0, 0) where nobody said."""

    original: tuple[int, int]
    resized: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class RewardInput:
    """One response with all that a term may look at.

    `verdict` holds the extracted answer. `stopped`: the response ended with an end token. `forced`: a rethinking
    trigger was inserted into it. `num_tokens` counts all of its tokens, the end token included. `parts` is the response
    by segment, as in `Completion`. `settings` are the parameters of the terms.
    """

    verdict: Verdict
    response: str
    problem: Problem
    stopped: bool = True
    forced: bool = False
    num_tokens: int = 0
    images: tuple[ImageSize, ...] = ()
    parts: tuple[tuple[int, str], ...] = ()
    settings: RewardConfig = DEFAULTS

    @property
    def answer(self) -> str | None:
        """The response's final answer as it was written, None where it has none."""
        return self.verdict.extracted


TermValue = float | Mapping[str, float]
Term = Callable[[RewardInput], TermValue]


def reward_input(prompt: Prompt, completion: Completion, verdict: Verdict, settings: RewardConfig) -> RewardInput:
    return RewardInput(
        verdict,
        completion.text,
        prompt.problem,
        stopped=completion.finish_reason == "stop",
        forced=completion.forced,
        num_tokens=len(completion),
        images=image_sizes(prompt),
        parts=completion.parts,
        settings=settings,
    )


def image_sizes(prompt: Prompt) -> tuple[ImageSize, ...]:
    return tuple(ImageSize(image.original_size, image.size) for image in prompt.images)


def gold_text(problem: Problem) -> str:
    """The gold answer, without its box where it stands in one."""
    unboxed = extract(problem.answer).text if "\\boxed" in problem.answer else None
    return (problem.answer if unboxed is None else unboxed).strip()


def terms_of(problem: Problem, settings: RewardConfig) -> Mapping[str, float]:
    """The terms with their weights by which a row is rewarded: those of its type, else `reward.terms`."""
    own = {"type": problem.type, "source": problem.source}.get(settings.column, "")
    value = problem.row.get(settings.column)
    return settings.by_type.get(str(own if value is None else value), settings.terms)
