"""prompt → rollout → verify → advantage: the rollout batches of one step, mostly one."""

import dataclasses
import time
from collections.abc import Sequence

from rethinker_jax import rethink
from rethinker_jax.config import Config
from rethinker_jax.experience import greedy_rewards, with_advantages, with_trainer_rewards
from rethinker_jax.phases import during
from rethinker_jax.prompts_ahead import PromptsAhead
from rethinker_jax.rewards.scorer import Scorer
from rethinker_jax.rollout import Group, Rolled, SecondPass, roll_out
from rethinker_jax.run_data import Order, next_prompts
from rethinker_jax.run_directory import RunDirectory
from rethinker_jax.sampling.requests import Counters
from rethinker_jax.step_metrics import mean_metrics, share
from rethinker_jax.system import System
from rethinker_jax.training.update import TrainState, Updater
from rethinker_jax.types import Problem


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run stands: its step, the place in the data order where its next prompts are, its coefficient of KL, and
    under `replay.mode: dynamic` the groups with an advantage that wait from the steps before."""

    step: int
    cursor: int
    kl_coefficient: float
    num_waiting: int = 0


@dataclasses.dataclass(frozen=True)
class Round:
    """A rollout batch, its groups with advantages. `seconds`: of prompts, drawing and judging."""

    rolled: Rolled
    groups: list[Group]
    metrics: dict[str, float]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The rollout batches of a step as one, in their order. `cursor`: where the next step draws its prompts.

    `num_later` are the groups behind the first batch, `num_resamples` the batches behind it.
    """

    groups: list[Group]
    rolled: Rolled
    metrics: dict[str, float]
    seconds: float
    cursor: int
    num_resamples: int
    num_later: int


def draw_rounds(
    config: Config,
    system: System,
    updater: Updater,
    state: TrainState,
    problems: Sequence[Problem],
    order: Order,
    scorer: Scorer,
    run: RunDirectory,
    place: Place,
    ahead: PromptsAhead | None = None,
) -> Rounds:
    """One rollout batch, and under `replay.mode: dynamic` up to `max_resamples` more, until a step's groups teach.

    Those that wait count. It also ends where all rows that come were drawn in this step before. Whether another batch
    follows in this step or in the next, its prompts are those behind this one's: they are made `ahead` meanwhile.
    """
    rounds: list[Round] = []
    max_rounds = 1 + (config.replay.max_resamples if config.replay.mode == "dynamic" else 0)
    cursor, num_teaching = place.cursor, place.num_waiting
    while not rounds or (num_teaching < config.rollout.prompts_per_step and len(rounds) < max_rounds):
        begin_time = time.monotonic()
        taken = {group.problem for one in rounds for group in one.groups}
        prompts = next_prompts(config, system, problems, order, cursor, place.step, run, taken, ahead)
        cursor += config.rollout.prompts_per_step
        if not prompts:
            break
        if ahead is not None and (place.step + 1 < config.run.num_steps or len(rounds) + 1 < max_rounds):
            ahead.begin(cursor)

        # rollout, verify
        forced = rethink.active(config.rethink, place.step)
        with during("rollout"):  # the device goes on with it behind the block; drawing waits for it
            params = system.sampling_params(state.params)
        rolled = roll_out(system, params, prompts, config, scorer, place.step, forced=forced)
        greedy = greedy_rewards(config, system, params, prompts, scorer, place.step)
        del params
        seconds = time.monotonic() - begin_time
        with during("log_probs"):
            groups, metrics = with_trainer_rewards(rolled.groups, config, system, updater, state, place.kl_coefficient)

        # advantage
        rounds.append(Round(rolled, with_advantages(groups, config, greedy), metrics, seconds))
        num_teaching += sum(teaches(group, config.advantage.epsilon) for group in rounds[-1].groups)
    return together(rounds, cursor)


def teaches(group: Group, epsilon: float) -> bool:
    return any(abs(rollout.advantage) > epsilon for rollout in group.rollouts)


def together(rounds: Sequence[Round], cursor: int) -> Rounds:
    """Rollout batches as one: counts and seconds are summed, metrics and how full arrays were averaged."""
    groups, rolled = [group for one in rounds for group in one.groups], [one.rolled for one in rounds]
    passes = [one.second_pass for one in rolled if one.second_pass is not None]
    second = SecondPass(_sum_counters([one.counters for one in passes]), sum(one.seconds for one in passes))
    return Rounds(
        groups,
        Rolled(
            groups,
            _sum_counters([one.counters for one in rolled]),
            second if passes else None,
        ),
        mean_metrics([one.metrics for one in rounds]),
        sum(one.seconds for one in rounds),
        cursor,
        len(rounds) - 1,
        len(groups) - len(rounds[0].groups),
    )


def _sum_counters(counters: Sequence[Counters]) -> Counters:
    """Sums; of the bytes of caches the most, of the shares the mean."""
    if not counters:
        return Counters(0, 0, 0, 0, 1.0, 1.0, waves=0)
    counts = {
        field.name: sum(vars(one)[field.name] for one in counters)
        for field in dataclasses.fields(Counters)
        if field.type is int
    }
    counts["cache_bytes"] = max(one.cache_bytes for one in counters)
    fills = (share([one.prompt_fill for one in counters]), share([one.vision_fill for one in counters]))
    return Counters(**counts, prompt_fill=fills[0], vision_fill=fills[1])
