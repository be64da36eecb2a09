"""What the trainer adds to a reward, and the moving average that it asks, on the example's own model."""

import dataclasses
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rethinker_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from rethinker_jax.config_rewards import ConsistencyConfig, RewardConfig
from rethinker_jax.example.tasks import make_task
from rethinker_jax.experience import with_consistency
from rethinker_jax.rollout import Group
from rethinker_jax.sampling.sampler import Budgets, Request
from rethinker_jax.system import System, load_system, make_updater
from rethinker_jax.training.batch import pack_rows
from rethinker_jax.training.layout import TrainRow
from rethinker_jax.training.update import Updater
from rethinker_jax.types import Rollout
from rethinker_jax.verify.judge import judge

DECAY, EVERY = 0.75, 2
NUM_SAMPLES = 8


def make_config(model: Literal["ema", "policy"], weight: float = 0.5) -> Config:
    settings = ConsistencyConfig(weight=weight, model=model, margin=0.0, ema_decay=DECAY, ema_every=EVERY)
    return Config(
        model=ModelConfig(dtype="float32"),
        data=DataConfig(prompt_template="none"),
        reward=RewardConfig(consistency=settings),
        optimizer=OptimizerConfig(learning_rate=0.01, schedule="constant", warmup_steps=0),
    )


@pytest.fixture(scope="module")
def system() -> System:
    return load_system(make_config("ema"))


@pytest.fixture(scope="module")
def updater(system: System) -> Updater:
    config = make_config("ema")
    return make_updater(config, system, 10, config.loss)


@pytest.fixture(scope="module")
def groups(system: System) -> list[Group]:
    """Samples of four problems. The last sample of each is marked as a kept second look."""
    prompts = [system.builder.build(make_task(0, index).problem) for index in range(4)]
    requests = [Request(prompt, sample) for prompt in prompts for sample in range(NUM_SAMPLES)]
    config = dataclasses.replace(make_config("ema").sampling, max_new_tokens=60, temperature=0.7)
    params = system.sampling_params(system.params)
    drawn, _ = system.sampler.generate(params, requests, config, Budgets(60), seed=0, step=0)
    rollouts = []
    for request, one in zip(requests, drawn, strict=True):
        problem = request.prompt.problem
        verdict = judge(one.completion.text, problem.answer, problem.choices, problem.type)
        rollout = Rollout(request.prompt, request.sample, one.completion, verdict)
        if request.sample == NUM_SAMPLES - 1:
            rollout = dataclasses.replace(rollout, forced=one.completion, forced_verdict=verdict, kept=True)
        rollouts.append(rollout)
    return [
        Group(row, prompt, tuple(rollouts[row * NUM_SAMPLES : (row + 1) * NUM_SAMPLES]))
        for row, prompt in enumerate(prompts)
    ]


def test_the_average_follows_the_weights(system: System, updater: Updater, groups: list[Group]) -> None:
    """Catches an average that moves at every update, or towards the weights before the step."""
    state = updater.init(jax.tree.map(jnp.copy, system.params))
    rollout = groups[0].rollouts[0]
    ids = rollout.completion.token_ids
    learned = np.ones(len(ids), bool)
    row = TrainRow(rollout.prompt, ids, learned, ~learned, rollout.completion.log_probs, 1.0)
    batch = pack_rows([row], system.geometry, len(ids), 1)

    def norm(params) -> np.ndarray:
        return np.asarray(params["text"]["norm"]["scale"])

    weights = [norm(state.params)]
    averages = [norm(state.average)]
    for _ in range(4):
        state, _ = updater.step(state, [batch])
        weights.append(norm(state.params))
        averages.append(norm(updater.averaged_params(state)))
    assert all(np.abs(after - before).max() > 1e-3 for before, after in itertools.pairwise(weights))
    expected = [weights[0], weights[0]]
    expected.append(DECAY * expected[-1] + (1 - DECAY) * weights[2])
    expected.append(expected[-1])
    expected.append(DECAY * expected[-1] + (1 - DECAY) * weights[4])
    np.testing.assert_allclose(averages, expected, rtol=1e-6)


def test_the_bonus_is_that_of_the_answers_likelihood(system: System, updater: Updater, groups: list[Group]) -> None:
    """Catches a bonus for wrong answers, for the first response of a kept second look, or from other tokens.

    Before any update the average is the policy, so both models give the same likelihoods and the same bonuses.
    """
    state = updater.init(jax.tree.map(jnp.copy, system.params))
    found, metrics = with_consistency(groups, make_config("ema"), system, updater, state)
    sampled, sampled_metrics = with_consistency(groups, make_config("policy"), system, updater, state)
    assert metrics["answer_likelihood"] == pytest.approx(sampled_metrics["answer_likelihood"], abs=1e-4)
    assert 0 < metrics["answer_likelihood"] < 0.95 and 0 < metrics["consistent_share"] <= 1
    assert [group.rewards.tolist() for group in found] == [group.rewards.tolist() for group in sampled]
    correct = [one for group in groups for one in group.rollouts if one.verdict.correct]
    assert correct, "the fixture wants a correct answer"

    for before, after in zip(groups, found, strict=True):
        gains = after.rewards - before.rewards
        right = np.array([one.verdict.correct for one in before.rollouts])
        assert set(gains[right].tolist()) <= {0.0, 0.5} and not gains[~right].any()
        assert not right.any() or gains.max() == 0.5  # the likeliest of the accurate is above their mean
        last = after.rollouts[-1]
        assert last.first_verdict == before.rollouts[-1].first_verdict
        assert last.verdict.parts["consistency"] == gains[-1]


def test_without_a_weight_nothing_is_done(system: System, updater: Updater, groups: list[Group]) -> None:
    """Catches a forward pass, or a metric, where the term is off."""
    state = updater.init(jax.tree.map(jnp.copy, system.params))
    assert with_consistency(groups, make_config("ema", weight=0.0), system, updater, state) == (groups, {})
