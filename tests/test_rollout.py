"""Second looks that are chosen after the verdicts, through the real sampler, verifier and example model."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from rethinker_jax import rethink
from rethinker_jax.config import Config, DataConfig, ModelConfig, RethinkConfig, RolloutConfig, SamplingConfig
from rethinker_jax.example.tasks import make_task
from rethinker_jax.rewards.scorer import Scorer
from rethinker_jax.rollout import Rolled, roll_out
from rethinker_jax.step_metrics import sampling_metrics
from rethinker_jax.system import System, load_system
from rethinker_jax.types import FIRST, SECOND, TRIGGER, Rollout
from rethinker_jax.verify.pool import VerifierPool

GIB = 2**30
CONFIG = Config(
    model=ModelConfig(dtype="float32"),
    data=DataConfig(prompt_template="none"),
    rollout=RolloutConfig(prompts_per_step=4, samples_per_prompt=4),
    sampling=SamplingConfig(max_new_tokens=48, num_slots=6, temperature=0.8),
    rethink=RethinkConfig(rule="paper", fraction=1.0, easy_group=1.0, truncate=0.5, max_new_tokens=20),
)


@pytest.fixture(scope="module")
def system() -> System:
    return load_system(CONFIG)


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    with VerifierPool(CONFIG.verifier) as pool, Scorer(CONFIG, pool) as scorer:
        yield scorer


@pytest.fixture(scope="module")
def rolled(system: System, scorer: Scorer) -> Rolled:
    return roll(system, scorer, CONFIG)


def roll(system: System, scorer: Scorer, config: Config, order: Sequence[int] = range(4)) -> Rolled:
    prompts = [(index, system.builder.build(make_task(0, index).problem)) for index in order]
    return roll_out(system, system.sampling_params(system.params), prompts, config, scorer, 3, forced=True)


def rollouts_of(rolled: Rolled) -> list[Rollout]:
    return [rollout for group in rolled.groups for rollout in group.rollouts]


def test_second_looks_follow_their_first_responses(system: System, rolled: Rolled) -> None:
    """Catches the continuation of another sample, and a cut that is longer than what was written."""
    forced = [one for one in rollouts_of(rolled) if one.forced is not None]
    ended = [one for one in rollouts_of(rolled) if one.first.finish_reason == "stop"]
    assert len(forced) == len(ended) > 4  # fraction 1, and no group is too easy
    triggers = [system.tokenizer.encode(trigger).tolist() for trigger in CONFIG.rethink.triggers]
    num_cut = 0
    for one in forced:
        assert one.forced is not None and one.forced_verdict is not None
        ids, segments = one.forced.token_ids, one.forced.segments
        first = ids[segments == FIRST]
        assert ids[segments == TRIGGER].tolist() in triggers
        assert (segments == SECOND).any() and (np.diff(segments) >= 0).all()
        assert len(first) <= len(one.first) - 1
        whole = one.first.token_ids[: len(first)].tolist() == first.tolist()
        assert whole or one.first.text.startswith(system.tokenizer.decode(first))
        num_cut += len(first) < len(one.first) - 1
        if whole:  # else the text up to the cut has other tokens
            np.testing.assert_allclose(one.forced.log_probs[: len(first)], one.first.log_probs[: len(first)], atol=5e-5)
    assert 0 < num_cut < len(forced)


def test_their_cost_is_told(rolled: Rolled) -> None:
    """No image is encoded again and no prompt prefilled again; what was fed is the triggers and what was cut anew."""
    assert rolled.second_pass is not None
    counters = rolled.second_pass.counters
    assert (counters.prompts, counters.images, counters.read_tokens) == (0, 0, 0)
    forced = [one.forced for one in rollouts_of(rolled) if one.forced is not None]
    triggers = sum(int((one.segments == TRIGGER).sum()) for one in forced)
    firsts = sum(int((one.segments == FIRST).sum()) for one in forced)
    assert triggers <= counters.fed_tokens < triggers + firsts
    metrics = sampling_metrics(rolled)
    assert metrics["second_pass_prompts"] == 0
    assert metrics["second_pass_fed_tokens"] == counters.fed_tokens


def test_without_room_first_responses_are_read_again(system: System, scorer: Scorer, rolled: Rolled) -> None:
    """One byte less than all caches take: the same second looks, at another cost."""
    gib = (rolled.counters.cache_bytes - 1) / GIB
    config = dataclasses.replace(CONFIG, sampling=dataclasses.replace(CONFIG.sampling, cache_gib=gib))
    found = roll(system, scorer, config)
    assert found.second_pass is not None
    assert found.second_pass.counters.read_tokens > 0 == found.second_pass.counters.prompts
    for ours, theirs in zip(rollouts_of(found), rollouts_of(rolled), strict=True):
        assert ours.first.token_ids.tolist() == theirs.first.token_ids.tolist()
        assert (ours.forced is None) == (theirs.forced is None)
        if ours.forced is not None and theirs.forced is not None:
            assert ours.forced.token_ids.tolist() == theirs.forced.token_ids.tolist()
            np.testing.assert_allclose(ours.forced.log_probs, theirs.forced.log_probs, rtol=0, atol=5e-5)
            assert ours.forced_verdict is not None and theirs.forced_verdict is not None
            assert ours.forced_verdict.verdict == theirs.forced_verdict.verdict


def test_the_choice_is_by_name_and_step(system: System, scorer: Scorer, rolled: Rolled) -> None:
    """The prompts in another order, and a share that has fallen from 1 to 1/2 at step 3 of 6: of those that were forced
    before, the ones whose own coin says so, with the same trigger. Catches coins that are tossed in the order of the
    batch, a share that does not reach the rollout, and keys of keeping and cutting that do not."""
    settings = dataclasses.replace(
        CONFIG.rethink, schedule="linear", until_step=6, truncate_at="sentence", keep="all", max_kept_per_problem=3
    )
    order = (2, 0, 3, 1)
    found = roll(system, scorer, dataclasses.replace(CONFIG, rethink=settings), order)
    assert [group.problem for group in found.groups] == list(order)
    groups = {group.problem: group for group in found.groups}
    chosen = []
    for before in rolled.groups:
        after = groups[before.problem]
        assert after.rethinking.keep == "all" and after.rethinking.fraction == 0.5
        for ours, theirs in zip(after.rollouts, before.rollouts, strict=True):
            assert ours.first.token_ids.tolist() == theirs.first.token_ids.tolist()
            rng = rethink.coin(CONFIG.run.seed, 3, ours.prompt.problem.stable_hash, ours.sample)
            assert (ours.forced is not None) == (theirs.forced is not None and rng.random() < 0.5)
            chosen.append(ours.forced is not None)
            if ours.forced is None or theirs.forced is None:
                continue
            assert _inserted(ours) == _inserted(theirs)
            first = system.tokenizer.decode(ours.forced.token_ids[ours.forced.segments == FIRST])
            whole = ours.first.text
            assert first in (whole, rethink.cut_first_response(whole, "sentence"))
        ended = [one for one in after.rollouts if one.forced is not None and one.forced.finish_reason == "stop"]
        assert [one.sample for one in after.rollouts if one.kept] == [one.sample for one in ended[:3]]
    assert 0 < sum(chosen) < len([one for one in rollouts_of(rolled) if one.forced is not None])


def _inserted(rollout: Rollout) -> list[int]:
    assert rollout.forced is not None
    return rollout.forced.token_ids[rollout.forced.segments == TRIGGER].tolist()
