"""verify → advantage → what an update learns from: rewards made whole, advantages, old log-probs, micro-batches."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rethinker_jax import consistency, replay
from rethinker_jax.advantage import advantages_with_added, group_advantages
from rethinker_jax.config import Config, LossConfig
from rethinker_jax.models.qwen25vl import Params
from rethinker_jax.rewards.scorer import Scorer
from rethinker_jax.rewards.terms import add_part
from rethinker_jax.rollout import Group, budgets_of, roll_out
from rethinker_jax.step_metrics import share
from rethinker_jax.system import System, pack_to_train
from rethinker_jax.training.batch import COMPLETION_STEP, Packed, round_up
from rethinker_jax.training.layout import TrainRow
from rethinker_jax.training.losses import kl_estimate
from rethinker_jax.training.update import TrainState, Updater
from rethinker_jax.types import Prompt, Rollout

CUT_STREAM = 7  # of random numbers, besides those of replay and rethinking


def with_trainer_rewards(
    groups: Sequence[Group],
    config: Config,
    system: System,
    updater: Updater,
    state: TrainState,
    kl_coefficient: float,
) -> tuple[list[Group], dict[str, float]]:
    """Rewards with what only the trainer can tell: the bonus of `reward.consistency`, and the KL to the reference."""
    groups, metrics = with_consistency(groups, config, system, updater, state)
    groups, found = with_kl(groups, config, system, updater, state, kl_coefficient)
    return groups, metrics | found


def with_kl(
    groups: Sequence[Group],
    config: Config,
    system: System,
    updater: Updater,
    state: TrainState,
    coefficient: float,
) -> tuple[list[Group], dict[str, float]]:
    """Rewards less `coefficient` times the estimated KL to the reference, where `loss.kl` is `reward`.

    The KL is summed over the policy tokens of what is trained on, so that all of them share one return (γ = 1), as they
    share one advantage. Metrics: its mean over tokens, and the coefficient.
    """
    if config.loss.kl != "reward":
        return list(groups), {}
    rows = [_row_of(group, rollout) for group in groups for rollout in group.rollouts]
    reference = teacher_forced(config, system, updater, updater.reference, rows)
    own = [row.old_log_probs for row in rows]
    if trainer_log_probs(config, system):
        own = teacher_forced(config, system, updater, state.params, rows)
    # As one array: row by row, each length would be compiled.
    kl = np.asarray(kl_estimate(_padded(own), _padded(reference), config.loss.kl_estimator), np.float64)
    masks = [row.loss_mask for row in rows]
    sums = [float(values[: len(mask)][mask].sum()) for values, mask in zip(kl, masks, strict=True)]
    num_tokens = sum(int(mask.sum()) for mask in masks)
    totals = iter(sums)
    return [
        dataclasses.replace(
            group, rollouts=tuple(_with_part(one, "kl", next(totals), -coefficient) for one in group.rollouts)
        )
        for group in groups
    ], {"kl": sum(sums) / max(num_tokens, 1), "kl_coefficient": coefficient}


def _row_of(group: Group, rollout: Rollout) -> TrainRow:
    completion = rollout.completion
    return TrainRow(rollout.prompt, completion.token_ids, *group.masks(rollout), completion.log_probs)


def _padded(rows: Sequence[np.ndarray]) -> jax.Array:
    """float32 [rows, longest], zero behind each row's end."""
    padded = np.zeros((len(rows), round_up(max(map(len, rows)), COMPLETION_STEP)), np.float32)
    for place, values in enumerate(rows):
        padded[place, : len(values)] = values
    return jnp.asarray(padded)


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
    )
    accuracy = np.array([float(rollout.verdict.correct) for rollout in rollouts])
    ends = np.cumsum([len(group.rollouts) for group in groups])[:-1]
    rewarded: list[Group] = []
    shares: list[bool] = []
    for group, right, likely in zip(groups, np.split(accuracy, ends), np.split(likelihoods, ends), strict=True):
        accurate, consistent = consistency.consistent(right[None], likely[None], settings.margin)
        shares += consistent[accurate].tolist()
        [bonuses] = consistency.bonuses(right[None], likely[None], settings)
        with_bonus = [
            _with_part(rollout, "consistency", bonus, 1.0)
            for rollout, bonus in zip(group.rollouts, bonuses.tolist(), strict=True)
        ]
        rewarded.append(dataclasses.replace(group, rollouts=tuple(with_bonus)))
    return rewarded, {
        "answer_likelihood": share(likelihoods[~np.isnan(likelihoods)].tolist()),
        "consistent_share": share(shares),
    }


def _with_part(rollout: Rollout, term: str, value: float, weight: float) -> Rollout:
    """One more term of the reward, for the response that is trained on."""
    verdict = add_part(rollout.verdict, term, value, weight)
    if rollout.kept:
        return dataclasses.replace(rollout, forced_verdict=verdict)
    return dataclasses.replace(rollout, first_verdict=verdict)


def greedy_rewards(
    config: Config,
    system: System,
    params: Params,
    prompts: Sequence[tuple[int, Prompt]],
    scorer: Scorer,
    step: int,
) -> np.ndarray | None:
    """Rewards [groups] of one greedy response a prompt, where ReMax asks for them; `params` in the sampling layout."""
    if config.advantage.estimator != "remax":
        return None
    greedy = dataclasses.replace(
        config,
        sampling=dataclasses.replace(config.sampling, temperature=0.0),
        rollout=dataclasses.replace(config.rollout, samples_per_prompt=1),
    )
    rolled = roll_out(system, params, prompts, greedy, scorer, step, forced=False)
    return np.array([group.rewards[0] for group in rolled.groups])


def with_advantages(groups: Sequence[Group], config: Config, greedy: np.ndarray | None = None) -> list[Group]:
    """Groups with advantages by `advantage.estimator`; `greedy` [groups] are the rewards that ReMax subtracts.

    `rethink.baseline: final` compares with the rewards of what is trained on, as the released code does.
    """
    estimator, k, baseline = config.advantage.estimator, config.advantage.k, config.rethink.baseline
    rewards = [group.rewards for group in groups]
    lengths = [np.array([group.masks(one)[0].sum() for one in group.rollouts]) for group in groups]
    advantages: Iterable[np.ndarray]
    if config.rethink.kept_as == "addition":
        added = [group.added for group in groups]
        advantages = advantages_with_added(
            rewards, added, estimator, baseline, lengths=lengths, greedy_rewards=greedy, k=k
        )  # fmt: skip
    else:
        compared = [group.first_rewards for group in groups] if baseline == "first" else rewards
        advantages = group_advantages(
            np.stack(rewards), np.stack(compared), estimator, lengths=np.stack(lengths), greedy_rewards=greedy, k=k
        )
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
    loss_mask, nll_mask = group.masks(rollout)
    return replay.Experience(
        problem=group.problem,
        completion_ids=rollout.completion.token_ids,
        loss_mask=loss_mask,
        nll_mask=nll_mask,
        old_log_probs=rollout.completion.log_probs,
        advantage=rollout.advantage,
        update=update,
        added=group.is_added(rollout),
    )


def cut_order(config: Config, experiences: Sequence[replay.Experience], step: int) -> Sequence[replay.Experience]:
    """The rows of a rollout in the order in which optimizer steps are cut from them: whole groups, or shuffled.

    A row that was added stays behind its first response.
    """
    if config.training.cut == "group":
        return experiences
    samples = replay.by_sample(experiences)
    order = np.random.default_rng([config.run.seed, step, CUT_STREAM]).permutation(len(samples))
    return replay.joined([samples[place] for place in order])


def cut_batches(
    config: Config, experiences: Sequence[replay.Experience], step: int
) -> list[tuple[replay.Experience, ...]]:
    """The rows of a rollout by optimizer steps: `training.batch_size` samples each, with the rows added to them."""
    samples, size = replay.by_sample(cut_order(config, experiences, step)), config.training.batch_size
    return [replay.joined(samples[start : start + size]) for start in range(0, len(samples), size)]


def make_batches(
    config: Config, system: System, prompt_of: dict[int, Prompt], chosen: replay.Selection, first_update: bool
) -> Packed:
    """The micro-batches of one optimizer step. Only in the first one of a step is the policy the sampler's own.

    A replayed row without a prompt, whose image was lost since, is left out. A row's weight is on its advantage, with
    which every policy loss grows in proportion; its supervised loss has none.
    """

    def row(one: replay.Experience, fresh: bool, weight: float) -> TrainRow:
        masks = one.loss_mask, one.nll_mask
        prompt, advantage = prompt_of[one.problem], one.advantage * weight
        return TrainRow(prompt, one.completion_ids, *masks, one.old_log_probs, advantage, fresh, one.sampler_log_probs)

    weights = chosen.weights or (1.0,) * (len(chosen.fresh) + len(chosen.replayed))
    split = len(chosen.fresh)
    fresh = [row(one, first_update, weight) for one, weight in zip(chosen.fresh, weights[:split], strict=True)]
    replayed = zip(chosen.replayed, weights[split:], strict=True)
    rows = fresh + [row(one, False, weight) for one, weight in replayed if one.problem in prompt_of]
    return pack_to_train(config, system, rows, longest_completion(config, system), most_rows(config))


def most_rows(config: Config) -> int:
    """Rows that the arrays of an optimizer step have room for: each sample's own, and one that may be added to it."""
    adds = config.rethink.rule != "off" and config.rethink.kept_as == "addition"
    return config.training.batch_size * (2 if adds else 1)


def loss_of(config: Config, system: System) -> LossConfig:
    """The loss, with `constant_length` in tokens where it is left to what a completion has room for."""
    if config.loss.aggregation != "constant" or config.loss.constant_length:
        return config.loss
    return dataclasses.replace(config.loss, constant_length=longest_completion(config, system))


def longest_completion(config: Config, system: System) -> int:
    return budgets_of(config, [system.tokenizer.encode(trigger) for trigger in config.rethink.triggers]).total


def trainer_log_probs(config: Config, system: System) -> bool:
    """Are old log-probs made again by the trainer: by default where the computation is not float32."""
    mode = config.loss.old_log_probs
    return mode == "trainer" or (mode == "auto" and system.dtype != jnp.float32)


def teacher_forced(
    config: Config, system: System, updater: Updater, params: Params, rows: Sequence[TrainRow]
) -> list[np.ndarray]:
    """float32 [length] log-probs of every row's completion under `params`, in batches such as the update's."""
    size, found = config.training.batch_size, []
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        packed = pack_to_train(config, system, chunk, longest_completion(config, system), size)
        made: dict[int, np.ndarray] = {}
        for batch, numbers in zip(packed.batches, packed.rows, strict=True):
            values = np.asarray(jax.device_get(updater.log_probs(params, batch)), np.float32)
            made |= {number: values[place] for place, number in enumerate(numbers)}
        found += [made[number][: len(row.completion_ids)] for number, row in enumerate(chunk)]
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
    return [
        dataclasses.replace(
            one, old_log_probs=own, sampler_log_probs=one.old_log_probs if config.loss.importance_cap else None
        )
        for own, one in zip(made, experiences, strict=True)
    ], metrics
