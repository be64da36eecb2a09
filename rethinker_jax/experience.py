"""verify → advantage → what an update learns from: rewards made whole, advantages, old log-probs, micro-batches."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rethinker_jax import consistency, replay, rethink
from rethinker_jax.advantage import group_advantages
from rethinker_jax.config import Config
from rethinker_jax.models.qwen25vl import Params
from rethinker_jax.models.sharding import row_shards
from rethinker_jax.rewards.terms import add_part
from rethinker_jax.rollout import Group, budgets_of
from rethinker_jax.step_metrics import share
from rethinker_jax.system import System
from rethinker_jax.training.batch import TrainBatch, TrainRow, pack_micro_batches, pack_rows
from rethinker_jax.training.update import TrainState, Updater
from rethinker_jax.types import Prompt, Rollout


def with_consistency(
    groups: Sequence[Group], config: Config, system: System, updater: Updater, state: TrainState
) -> tuple[list[Group], dict[str, float]]:
    """Rewards with the bonus of `reward.consistency`, and what it was made from. Without a weight, nothing is done."""
    settings = config.reward.consistency
    if not settings.weight:
        return list(groups), {}
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    masks = [consistency.answer_mask(rollout, system.tokenizer.decode) for rollout in rollouts]
    log_probs = [rollout.completion.log_probs for rollout in rollouts]
    if settings.model == "ema":
        rows = [
            TrainRow(rollout.prompt, rollout.completion.token_ids, mask, ~mask, own)
            for rollout, mask, own in zip(rollouts, masks, log_probs, strict=True)
        ]
        log_probs = teacher_forced(config, system, updater, updater.averaged_params(state), rows)
    likelihoods = np.array(
        [consistency.likelihood(own, mask, settings.cap) for own, mask in zip(log_probs, masks, strict=True)]
    ).reshape(len(groups), -1)
    accuracy = np.array([float(rollout.verdict.correct) for rollout in rollouts]).reshape(likelihoods.shape)
    accurate, consistent = consistency.consistent(accuracy, likelihoods, settings.margin)
    bonuses = consistency.bonuses(accuracy, likelihoods, settings)
    metrics = {
        "answer_likelihood": share(likelihoods[~np.isnan(likelihoods)].tolist()),
        "consistent_share": share(consistent[accurate].tolist()),
    }
    return [
        dataclasses.replace(group, rollouts=tuple(map(_with_bonus, group.rollouts, row.tolist())))
        for group, row in zip(groups, bonuses, strict=True)
    ], metrics


def _with_bonus(rollout: Rollout, bonus: float) -> Rollout:
    """The bonus goes to the response that is trained on."""
    verdict = add_part(rollout.verdict, "consistency", bonus, 1.0)
    if rollout.kept:
        return dataclasses.replace(rollout, forced_verdict=verdict)
    return dataclasses.replace(rollout, first_verdict=verdict)


def with_advantages(groups: Sequence[Group], config: Config) -> list[Group]:
    rewards = np.stack([group.rewards for group in groups])
    first = np.stack([group.first_rewards for group in groups])
    advantages = group_advantages(rewards, first, config.advantage.estimator)
    return [
        dataclasses.replace(
            group,
            rollouts=tuple(
                dataclasses.replace(rollout, advantage=float(advantage))
                for rollout, advantage in zip(group.rollouts, row, strict=True)
            ),
        )
        for group, row in zip(groups, advantages, strict=True)
    ]


def experience_of(group: Group, rollout: Rollout, update: int) -> replay.Experience:
    """What the buffer keeps of a rollout that was drawn after `update` optimizer steps."""
    loss_mask, nll_mask = rethink.loss_masks(rollout.completion)
    return replay.Experience(
        problem=group.problem,
        completion_ids=rollout.completion.token_ids,
        loss_mask=loss_mask,
        nll_mask=nll_mask,
        old_log_probs=rollout.completion.log_probs,
        advantage=rollout.advantage,
        update=update,
    )


def make_batches(
    config: Config, system: System, prompt_of: dict[int, Prompt], chosen: replay.Selection, first_update: bool
) -> list[TrainBatch]:
    """The micro-batches of one optimizer step. Only in the first one of a step is the policy the sampler's own.

    A replayed row without a prompt, whose image was lost since, is left out.
    """

    def row(one: replay.Experience, fresh: bool) -> TrainRow:
        masks = one.loss_mask, one.nll_mask
        return TrainRow(prompt_of[one.problem], one.completion_ids, *masks, one.old_log_probs, one.advantage, fresh)

    replayed = [one for one in chosen.replayed if one.problem in prompt_of]
    rows = [row(one, first_update) for one in chosen.fresh] + [row(one, False) for one in replayed]
    size = config.training.batch_size
    micro = config.training.micro_batch_size or size
    length, shards = longest_completion(config, system), row_shards(system.mesh)
    return pack_micro_batches(rows, system.geometry, length, size, micro, config.buckets, shards)


def longest_completion(config: Config, system: System) -> int:
    return budgets_of(config, [system.tokenizer.encode(trigger) for trigger in config.rethink.triggers]).total


def trainer_log_probs(config: Config, system: System) -> bool:
    """Are old log-probs made again by the trainer: by default where the computation is not float32."""
    mode = config.loss.old_log_probs
    return mode == "trainer" or (mode == "auto" and system.dtype != jnp.float32)


def teacher_forced(
    config: Config, system: System, updater: Updater, params: Params, rows: Sequence[TrainRow]
) -> list[np.ndarray]:
    """float32 [length] log-probs of every row's completion under `params`, in batches of one shape."""
    size, found = config.training.micro_batch_size or config.training.batch_size, []
    length, shards = longest_completion(config, system), row_shards(system.mesh)
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        batch = pack_rows(chunk, system.geometry, length, size, config.buckets, shards)
        values = np.asarray(jax.device_get(updater.log_probs(params, batch)), np.float32)
        found += [values[place, : len(row.completion_ids)] for place, row in enumerate(chunk)]
    return found


def with_trainer_log_probs(
    config: Config,
    system: System,
    updater: Updater,
    params: Params,
    experiences: Sequence[replay.Experience],
    prompt_of: Mapping[int, Prompt],
) -> tuple[list[replay.Experience], dict[str, float]]:
    """Old log-probs by the trainer's forward pass, and how far the sampler's were off."""
    rows = [
        TrainRow(prompt_of[one.problem], one.completion_ids, one.loss_mask, one.nll_mask, one.old_log_probs)
        for one in experiences
    ]
    made = teacher_forced(config, system, updater, params, rows)
    gap = np.concatenate(
        [np.abs(own - one.old_log_probs)[one.loss_mask] for own, one in zip(made, experiences, strict=True)]
    )
    metrics = {"sampler_trainer_gap": share(gap.tolist()), "sampler_trainer_gap_max": float(gap.max(initial=0.0))}
    made = [dataclasses.replace(one, old_log_probs=own) for own, one in zip(made, experiences, strict=True)]
    return made, metrics
