"""Evaluation inside a run: rows greedily, and by n samples, with the training sampler and verifier."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rethinker_jax import rethink
from rethinker_jax.advantage import pass_at_k
from rethinker_jax.config import Config, SamplingConfig
from rethinker_jax.models.qwen25vl import Params
from rethinker_jax.rewards.scorer import Scorer
from rethinker_jax.rollout import Group, Judging, budgets_of
from rethinker_jax.sampling.sampler import Request
from rethinker_jax.system import System
from rethinker_jax.types import Prompt, Rollout

EVALUATION_STEP = 1 << 30  # names the randomness of evaluations: the same before and after, and no training step's


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Numbers of one evaluation, and the sampled groups behind them."""

    scores: dict[str, float]
    per_source: dict[str, float]
    groups: list[Group]


def evaluate(system: System, params: Params, prompts: Sequence[Prompt], config: Config, scorer: Scorer) -> Evaluation:
    """Greedy accuracy over `prompts`, and pass@1, pass@k and rethinking by samples of the first of them.

    `params` are in the sampling layout. Never forces a second look; temperature 1 without truncation for the samples.
    """
    settings = config.evaluation
    greedy_prompts = prompts[: settings.num_problems]
    sampled_prompts = prompts[: settings.num_sampled_problems]
    greedy = _draw(system, params, greedy_prompts, 1, 0.0, config, scorer)
    n = settings.samples_per_problem
    sampled = _draw(system, params, sampled_prompts, n, 1.0, config, scorer)
    groups = [
        Group(place, prompt, tuple(sampled[place * n : (place + 1) * n]))
        for place, prompt in enumerate(sampled_prompts)
    ]
    num_correct = [sum(rollout.verdict.correct for rollout in group.rollouts) for group in groups]
    scores = {
        "greedy": _mean([rollout.verdict.correct for rollout in greedy]),
        "pass@1": _mean([count / n for count in num_correct]),
        f"pass@{n}": _mean([pass_at_k(n, count, n) for count in num_correct]),
        "rethink_ratio": _mean([rethink.rethinks(rollout.completion.text) for rollout in sampled]),
        "completion_length": _mean([len(rollout.completion) for rollout in sampled]),
        "truncated_share": _mean([rollout.completion.finish_reason == "length" for rollout in sampled]),
        "no_answer_share": _mean([rollout.verdict.verdict == "no_answer" for rollout in sampled]),
    }
    sources = sorted({prompt.problem.source for prompt in greedy_prompts})
    per_source = {
        source: _mean([one.verdict.correct for one in greedy if one.prompt.problem.source == source])
        for source in sources
    }
    return Evaluation(scores, per_source, groups)


def mean_scores(
    system: System, params: Params, prompts: Sequence[Prompt], config: Config, scorer: Scorer
) -> dict[str, float]:
    """Mean `reward` and `accuracy` of one greedy response to each of `prompts`; otherwise as `evaluate`."""
    rollouts = _draw(system, params, prompts, 1, 0.0, config, scorer)
    return {
        "reward": _mean([rollout.reward for rollout in rollouts]),
        "accuracy": _mean([rollout.verdict.correct for rollout in rollouts]),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _draw(
    system: System,
    params: Params,
    prompts: Sequence[Prompt],
    n: int,
    temperature: float,
    config: Config,
    scorer: Scorer,
) -> list[Rollout]:
    """n samples of every prompt, in chunks of one shape."""
    settings = SamplingConfig(
        temperature=temperature,
        max_new_tokens=config.sampling.max_new_tokens,
        num_slots=config.sampling.num_slots,
        stop_strings=config.sampling.stop_strings,
        steps_per_call=config.sampling.steps_per_call,
    )
    triggers = [system.tokenizer.encode(trigger) for trigger in config.rethink.triggers]
    budgets = budgets_of(config, triggers)
    # A second look of its own accord needs the room that a forced one has.
    budgets = dataclasses.replace(budgets, first=budgets.total, second=0, trigger_width=0)
    size = config.evaluation.batch_size * config.evaluation.samples_per_problem
    requests = [Request(prompt, sample) for prompt in prompts for sample in range(n)]
    rollouts: list[Rollout] = []
    per_chunk = size if n > 1 else config.evaluation.batch_size
    for start in range(0, len(requests), per_chunk):
        chunk = requests[start : start + per_chunk]
        judging = Judging(chunk, scorer)
        system.sampler.generate(
            params, chunk, settings, budgets, seed=config.run.seed, step=EVALUATION_STEP,
            num_prompts=config.evaluation.batch_size, on_finished=judging.submit,
        )  # fmt: skip
        rollouts += judging.result()
    return rollouts
