"""The update under losses other than the default: what they are made of, the reference model, and old log-probs of two
kinds, on a tiny random model without images.

Compiled without most optimizations: compiling is all that these tests cost.
"""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rethinker_jax import replay, rethink
from rethinker_jax.config import Config, DataConfig, LoraConfig, LossConfig, ModelConfig, OptimizerConfig, RolloutConfig
from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.experience import (
    loss_of,
    make_batches,
    with_advantages,
    with_trainer_log_probs,
    with_trainer_rewards,
)
from rethinker_jax.rollout import Group
from rethinker_jax.system import System, load_system, make_updater
from rethinker_jax.training.batch import pack_micro_batches
from rethinker_jax.training.layout import TrainBatch, TrainRow
from rethinker_jax.training.update import TrainState, Updater
from rethinker_jax.types import FIRST, SECOND, TRIGGER, Completion, Problem, Prompt, Rollout, Verdict

pytestmark = pytest.mark.usefixtures("quick_compilation")
NUM_ROWS, LENGTH, CONSTANT, CAP = 4, 16, 9, 1.5
FULL = LossConfig(
    policy="gspo", clip_low=0.02, clip_high=0.03, aggregation="constant", constant_length=CONSTANT,
    nll_coefficient=0.5, entropy_coefficient=0.01, old_log_probs="trainer", importance_cap=CAP,
    reference="start", kl="loss", kl_estimator="k3", kl_coefficient=0.25,
)  # fmt: skip
MEASURED = LossConfig(dual_clip=1.2, reference="start")
IN_REWARD = LossConfig(reference="start", kl="reward", kl_estimator="k1")


@dataclasses.dataclass
class Tiny:
    config: Config
    system: System
    prompts: list[Prompt]
    made: dict[LossConfig, Updater]

    def updater(self, loss: LossConfig) -> Updater:
        if loss not in self.made:
            self.made[loss] = make_updater(self.config, self.system, 100, loss)
        return self.made[loss]

    def with_loss(self, loss: LossConfig, **sections: Any) -> Config:
        return dataclasses.replace(self.config, loss=loss, **sections)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, quick_compilation: None) -> Tiny:
    directory = tmp_path_factory.mktemp("model")
    build_model_directory(directory)
    config = Config(
        model=ModelConfig(path=str(directory), init="random", dtype="float32"),
        data=DataConfig(prompt_template="none"),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_steps=0),
        rollout=RolloutConfig(prompts_per_step=2, samples_per_prompt=2),
    )
    system = load_system(config)
    questions = ["What is 2 + 3?", "How many?"]
    prompts = [system.builder.build(Problem(str(place), text, "5")) for place, text in enumerate(questions)]
    return Tiny(config, system, prompts, {})


def fresh_state(tiny: Tiny, updater: Updater) -> TrainState:
    return updater.init(jax.tree.map(jnp.copy, tiny.system.params))


def make_rows(tiny: Tiny, updater: Updater, two_samplers: bool) -> list[TrainRow]:
    """Rows of unequal lengths; old log-probs some way from the model's own, and the sampler's some way from those."""
    rng = np.random.default_rng(0)
    rows = []
    for place, advantage in enumerate([1.0, -0.5, -1.0]):
        length = 5 + 3 * place
        tokens = np.arange(length)
        zeros = np.zeros(length, np.float32)
        ids = rng.integers(5, 200, length).astype(np.int32)
        rows.append(TrainRow(tiny.prompts[place % 2], ids, tokens > 1, tokens <= 1, zeros, advantage))
    own = log_probs(updater, tiny.system.params, pack(tiny, rows))
    for place, row in enumerate(rows):
        # The model is one optimizer step further when the rows are used.
        old = (own[place, : len(row.loss_mask)] + rng.normal(0, 0.3, len(row.loss_mask))).astype(np.float32)
        sampler = (old + rng.normal(0, 0.5, len(old))).astype(np.float32)
        rows[place] = dataclasses.replace(row, old_log_probs=old, sampler_log_probs=sampler if two_samplers else None)
    return rows


def pack(tiny: Tiny, rows: list[TrainRow], micro_tokens: int = 0) -> list[TrainBatch]:
    return list(pack_micro_batches(rows, tiny.system.geometry, LENGTH, NUM_ROWS, micro_tokens).batches)


def log_probs(updater: Updater, params: Any, batches: list[TrainBatch]) -> np.ndarray:
    batches = [dataclasses.replace(batch, sampler_log_probs=None) for batch in batches]
    return np.concatenate([np.asarray(updater.log_probs(params, batch), np.float64) for batch in batches])


def one_step_on(tiny: Tiny, updater: Updater, rows: list[TrainRow]) -> TrainState:
    return updater.step(fresh_state(tiny, updater), pack(tiny, rows))[0]


def floats(metrics: dict[str, jax.Array]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def test_every_part_of_the_loss_is_that_of_a_loop(tiny: Tiny) -> None:
    """GSPO over Dr. GRPO's constant, weighed by the sampler's gap, with KL, NLL and entropy; by numpy from log-probs
    alone, one step away from the reference. Catches a KL to the policy itself, one in other weights than the policy
    loss, importance weights on the KL, a cap that is not counted, and old log-probs taken for the sampler's."""
    updater = tiny.updater(FULL)
    rows = make_rows(tiny, updater, two_samplers=True)
    state = one_step_on(tiny, updater, rows)
    batches = pack(tiny, rows)
    new = log_probs(updater, state.params, batches)
    ref = log_probs(updater, tiny.system.params, batches)
    kept = jax.tree.map(np.array, updater.reference)
    _, found = updater.step(state, batches, 2.0)
    metrics = floats(found)

    policy, kl, ratios, weights = [], [], [], []
    for place, row in enumerate(rows):
        mask, count = row.loss_mask, len(row.loss_mask)
        assert row.sampler_log_probs is not None
        s = np.exp((new[place, :count] - row.old_log_probs)[mask].mean())
        a = row.advantage
        loss = -min(s * a, np.clip(s, 1 - FULL.clip_low, 1 + FULL.clip_high) * a)
        w = np.minimum(np.exp(row.old_log_probs.astype(np.float64) - row.sampler_log_probs), CAP)[mask]
        d = (new[place, :count] - ref[place, :count])[mask]
        policy.append(loss * w.sum() / CONSTANT)
        kl.append(np.exp(-d) - 1 + d)
        ratios += [s] * len(w)
        weights += w.tolist()
    nll = -np.concatenate([new[place, : len(row.nll_mask)][row.nll_mask] for place, row in enumerate(rows)]).mean()
    wanted = {
        "policy_loss": np.mean(policy),
        "ratio": np.mean(ratios),
        "importance_weight": np.mean(weights),
        "importance_cap_fraction": np.mean(np.array(weights) >= CAP),
        "kl": np.concatenate(kl).mean(),
        "kl_loss": np.mean([one.sum() / CONSTANT for one in kl]),
        "nll": nll,
    }
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, rel=2e-3)
    assert 0 < wanted["importance_cap_fraction"] < 1 and wanted["kl"] > 1e-3
    parts = metrics["policy_loss"] + 0.5 * metrics["nll"] - 0.01 * metrics["entropy"] + 2.0 * metrics["kl_loss"]
    assert metrics["loss"] == pytest.approx(parts, rel=1e-5)
    # The reference is what it was: not taken away by a step, and not the policy.
    jax.tree.map(np.testing.assert_array_equal, kept, jax.tree.map(np.array, updater.reference))
    jax.tree.map(np.testing.assert_array_equal, kept, jax.tree.map(np.array, tiny.system.params))


def test_at_the_start_the_policy_is_the_reference(tiny: Tiny) -> None:
    """Catches a reference from other weights, in another layout, or without the prompt."""
    updater = tiny.updater(FULL)
    batches = pack(tiny, make_rows(tiny, updater, two_samplers=True))
    metrics = floats(updater.step(fresh_state(tiny, updater), batches)[1])
    assert abs(metrics["kl"]) < 1e-6 and metrics["skipped_update"] == 0


@pytest.mark.parametrize("micro_tokens", [40, 1])
def test_micro_batches_are_the_whole_batch(tiny: Tiny, micro_tokens: int) -> None:
    """One batch against two and three, the groups broken up, with every term at work. Catches means inside
    micro-batches in the sequence ratio's weights, the KL's or the importance weights'."""
    updater = tiny.updater(FULL)
    rows = make_rows(tiny, updater, two_samplers=True)
    results = []
    for size in (0, micro_tokens):
        state = one_step_on(tiny, updater, rows)
        state, metrics = updater.step(state, pack(tiny, rows, size))
        results.append((floats(metrics), optax.tree.get(state.opt_state, "mu")))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-4, abs=1e-6)
    for ours, theirs in zip(jax.tree.leaves(results[1][1]), jax.tree.leaves(results[0][1]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * max(float(jnp.abs(theirs).max()), 1e-9))


def test_a_moving_coefficient_compiles_nothing(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a coefficient that is a constant of the trace: an adaptive one would compile every update anew."""
    updater = tiny.updater(FULL)
    batches = pack(tiny, make_rows(tiny, updater, two_samplers=True))
    state, _ = updater.step(fresh_state(tiny, updater), batches)
    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        caplog.clear()
        for coefficient in (0.5, 0.25, 2.0):
            state, _ = updater.step(state, batches, coefficient)
        compiled = sum("Compiling jit(" in record.getMessage() for record in caplog.records)
        caplog.clear()
        jax.jit(lambda x: x + 1)(1)
        assert any("Compiling jit(" in record.getMessage() for record in caplog.records)  # else nothing was counted
    assert compiled == 0


def test_what_the_sampler_says_behind_the_mask_is_not_seen(tiny: Tiny) -> None:
    """0 · NaN is NaN: an inserted token has no log-prob by the sampler, and a row by the trainer alone weighs 1."""
    updater = tiny.updater(FULL)
    rows = make_rows(tiny, updater, two_samplers=True)
    sampler = rows[0].sampler_log_probs
    assert sampler is not None
    spoilt = dataclasses.replace(rows[0], sampler_log_probs=np.where(rows[0].loss_mask, sampler, np.nan))
    clean, dirty = (
        floats(updater.step(fresh_state(tiny, updater), pack(tiny, [row, *rows[1:]]))[1]) for row in (rows[0], spoilt)
    )
    assert dirty == clean
    plain = [rows[0], *(dataclasses.replace(row, sampler_log_probs=row.old_log_probs) for row in rows[1:])]
    bare = [rows[0], *(dataclasses.replace(row, sampler_log_probs=None) for row in rows[1:])]
    weights = [
        float(updater.step(fresh_state(tiny, updater), pack(tiny, some))[1]["importance_weight"])
        for some in (plain, bare)
    ]
    assert weights[0] == weights[1] != 1


def test_a_reference_may_only_be_measured(tiny: Tiny) -> None:
    """With kl none the KL is a metric and no part of the loss; and the share of the dual clip is that of a loop.
    Catches a share that counts praise, or tokens that the ordinary clip holds."""
    updater = tiny.updater(MEASURED)
    rows = make_rows(tiny, updater, two_samplers=False)
    state = one_step_on(tiny, updater, rows)
    batches = pack(tiny, rows)
    new = log_probs(updater, state.params, batches)
    metrics = floats(updater.step(state, batches, 1e6)[1])
    cut = [
        (np.exp(new[place, : len(row.loss_mask)] - row.old_log_probs)[row.loss_mask] > 1.2) & (row.advantage < 0)
        for place, row in enumerate(rows)
    ]
    assert metrics["dual_clip_fraction"] == pytest.approx(np.concatenate(cut).mean(), abs=1e-6) and metrics["kl"] > 1e-3
    assert 0 < metrics["dual_clip_fraction"] < 1
    assert metrics["loss"] == pytest.approx(metrics["policy_loss"] + 0.05 * metrics["nll"], rel=1e-5)


def test_the_reference_outlives_the_weights_it_was_made_of(tiny: Tiny) -> None:
    """A run's first step takes over the loaded weights, as `delete` does here. Catches a reference in the same arrays,
    which the cast to float32 alone would leave it in."""
    params = jax.tree.map(jnp.copy, tiny.system.params)
    updater = Updater(tiny.updater(MEASURED).rule, params, tiny.system.mesh)
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    jax.tree.map(np.testing.assert_array_equal, updater.reference, jax.tree.map(np.array, tiny.system.params))


def test_the_reference_of_adapters_is_the_model_without_them(tiny: Tiny) -> None:
    """Adapters begin as nothing, so the reference leaves them out. Catches a copy of them, and a base that is rounded
    where the adapted one is not."""
    lora = dataclasses.replace(tiny.config.model, lora=LoraConfig(rank=2), dtype="bfloat16")
    config = tiny.with_loss(IN_REWARD, model=lora)
    system = load_system(config)
    updater = make_updater(config, system, 10, config.loss)
    assert "lora" in system.params and "lora" not in updater.reference
    assert {leaf.dtype for leaf in jax.tree.leaves(updater.reference)} == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    every = np.ones(4, bool)
    rows = [TrainRow(tiny.prompts[0], np.arange(5, 9), every, every, np.zeros(4, np.float32))]
    batches = pack(tiny, rows)
    ours = log_probs(updater, updater.reference, batches)
    np.testing.assert_allclose(ours[0, :4], log_probs(updater, system.params, batches)[0, :4], atol=2e-2)


# --- from rollouts to the update -----------------------------------------------------------------------------------


def make_groups(tiny: Tiny) -> list[Group]:
    """Two prompts with two samples each, random tokens; the last sample is a kept second look."""
    rng = np.random.default_rng(5)
    groups = []
    for place, prompt in enumerate(tiny.prompts):
        rollouts = []
        for sample in range(2):
            segments = np.repeat([FIRST, TRIGGER, SECOND], [4 + sample, 2, 3]).astype(np.int8)
            ids = rng.integers(5, 200, len(segments)).astype(np.int32)
            values = -rng.exponential(3.0, len(ids)).astype(np.float32)
            first = Completion(ids[: 4 + sample], values[: 4 + sample], segments[: 4 + sample], "stop")
            verdict = Verdict("correct" if sample else "wrong", float(sample), "5", "test")
            rollout = Rollout(prompt, sample, first, verdict)
            if sample and place:
                whole = Completion(ids, values, segments, "stop")
                rollout = dataclasses.replace(rollout, forced=whole, forced_verdict=verdict, kept=True)
            rollouts.append(rollout)
        groups.append(Group(place, prompt, tuple(rollouts)))
    return groups


@pytest.mark.parametrize("old", ["sampler", "trainer"])
def test_a_kl_in_the_reward(tiny: Tiny, old: Any) -> None:
    """Reward less β times the summed log-ratio of the policy's own tokens. Catches inserted tokens that are paid for,
    a mean for the sum, the sign, the first response of a kept second look that pays, and log-probs of the wrong
    source."""
    loss = dataclasses.replace(IN_REWARD, old_log_probs=old)
    config, updater = tiny.with_loss(loss), tiny.updater(IN_REWARD)
    groups = make_groups(tiny)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rows = [
        TrainRow(one.prompt, one.completion.token_ids, *rethink.loss_masks(one.completion), one.completion.log_probs)
        for one in rollouts
    ]
    moved = jax.tree.map(lambda leaf: leaf * 1.05, tiny.system.params)
    state = updater.init(moved)
    found, metrics = with_trainer_rewards(groups, config, tiny.system, updater, state, 0.5)
    batches = pack(tiny, rows)
    ref, own = log_probs(updater, tiny.system.params, batches), log_probs(updater, state.params, batches)
    sums, num_tokens = [], 0
    for place, row in enumerate(rows):
        count = len(row.loss_mask)
        values = own[place, :count] if old == "trainer" else row.old_log_probs
        sums.append((values - ref[place, :count])[row.loss_mask].sum())
        num_tokens += row.loss_mask.sum()
    after = [rollout for group in found for rollout in group.rollouts]
    assert [a.reward - b.reward for a, b in zip(after, rollouts, strict=True)] == pytest.approx(
        [-0.5 * one for one in sums], rel=1e-3, abs=1e-4
    )
    assert metrics["kl"] == pytest.approx(sum(sums) / num_tokens, rel=1e-3) and metrics["kl_coefficient"] == 0.5
    assert after[-1].first_verdict == rollouts[-1].first_verdict
    assert not rows[-1].loss_mask.all()  # else nothing was inserted

    assert with_trainer_rewards(groups, tiny.with_loss(LossConfig()), tiny.system, updater, state, 0.5) == (groups, {})


def test_advantages_see_lengths_and_greedy_rewards(tiny: Tiny) -> None:
    """reinforce_plus_plus weighs by the policy tokens of what is trained on: rewards 0, 1, 0, 1 with 4, 5, 4 and, of
    the kept second look, 3 tokens. Catches lengths of the first responses or of whole completions, and greedy rewards
    that do not arrive."""
    groups = make_groups(tiny)
    config = tiny.with_loss(LossConfig())
    tokens = np.repeat([0.0, 1.0, 0.0, 1.0], [4, 5, 4, 3])
    plus = dataclasses.replace(config, advantage=dataclasses.replace(config.advantage, estimator="reinforce_plus_plus"))
    found = [rollout.advantage for group in with_advantages(groups, plus) for rollout in group.rollouts]
    assert found == pytest.approx(((np.array([0, 1, 0, 1]) - tokens.mean()) / tokens.std()).tolist(), rel=1e-5)
    remax = dataclasses.replace(config, advantage=dataclasses.replace(config.advantage, estimator="remax"))
    done = with_advantages(groups, remax, np.array([1.0, 0.25]))
    assert [rollout.advantage for group in done for rollout in group.rollouts] == [-1, 0, -0.25, 0.75]


def test_sampler_log_probs_go_along_through_buffer_and_checkpoint(tiny: Tiny) -> None:
    """Catches importance weights that a replayed row, or one after a restart, has lost, and arrays of another row."""
    updater = tiny.updater(IN_REWARD)
    drawn = [
        replay.Experience(place % 2, ids, np.ones(len(ids), bool), np.zeros(len(ids), bool), -0.5 * ids, 1.0, place)
        for place, ids in enumerate(np.arange(5, 5 + length, dtype=np.int32) for length in (3, 6, 4))
    ]
    prompts = dict(enumerate(tiny.prompts))
    config = tiny.with_loss(dataclasses.replace(FULL, reference="none", kl="none"))
    made, _ = with_trainer_log_probs(config, tiny.system, updater, tiny.system.params, drawn, prompts)
    buffer = replay.from_arrays(replay.to_arrays(made))
    assert len(buffer) == 3
    for one, before in zip(buffer, drawn, strict=True):
        assert one.sampler_log_probs is not None and (one.problem, one.update) == (before.problem, before.update)
        np.testing.assert_array_equal(one.sampler_log_probs, before.old_log_probs)
        assert np.abs(one.old_log_probs - before.old_log_probs).max() > 0.1

    config = dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=4))
    [batch] = make_batches(config, tiny.system, prompts, replay.Selection((buffer[0],), buffer[1:], ()), True).batches
    np.testing.assert_array_equal(batch.sampler_log_probs[1, :6], drawn[1].old_log_probs)
    np.testing.assert_array_equal(batch.old_log_probs[1, :6], buffer[1].old_log_probs)

    plain = tiny.with_loss(LossConfig(old_log_probs="trainer"))
    made, _ = with_trainer_log_probs(plain, tiny.system, updater, tiny.system.params, drawn, prompts)
    arrays = replay.to_arrays(made)
    assert "sampler_log_probs" not in arrays and not any(
        one.sampler_log_probs is not None for one in replay.from_arrays(arrays)
    )


def test_the_constant_is_the_room_of_a_completion(tiny: Tiny) -> None:
    """Catches the padded length of the arrays (128 here), and a second look that is left out of it."""
    sampling = dataclasses.replace(tiny.config.sampling, max_new_tokens=70)
    config = tiny.with_loss(LossConfig(aggregation="constant"), sampling=sampling)
    assert loss_of(config, tiny.system).constant_length == 70
    given = LossConfig(aggregation="constant", constant_length=9)
    assert loss_of(dataclasses.replace(config, loss=given), tiny.system) == given
    assert loss_of(tiny.config, tiny.system) == tiny.config.loss
