"""advantage → replay: the rows that a step learns from, cut into optimizer batches, and what the buffer holds then."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax

from rethinker_jax import replay
from rethinker_jax.config import Config
from rethinker_jax.experience import cut_batches, experience_of, trainer_log_probs, with_trainer_log_probs
from rethinker_jax.phases import during
from rethinker_jax.replay import Experience, Share
from rethinker_jax.rounds import Rounds
from rethinker_jax.system import System
from rethinker_jax.training.update import TrainState, Updater
from rethinker_jax.types import Prompt


@dataclasses.dataclass(frozen=True)
class StepRows:
    """The rows of a step, by optimizer steps, before any is filled from `buffer`."""

    batches: list[tuple[Experience, ...]]
    buffer: tuple[Experience, ...]
    metrics: dict[str, float]


def rows_of_step(
    config: Config,
    system: System,
    updater: Updater,
    state: TrainState,
    rounds: Rounds,
    prompt_of: Mapping[int, Prompt],
    buffer: Sequence[Experience],
    step: int,
) -> StepRows:
    """All rows of the rollouts. Under `replay.mode: dynamic` as many samples as a rollout batch has: of the groups that
    wait in `buffer` and then of those that teach; what is too many is the new buffer.

    `prompt_of` has the prompts of the rollouts by row number. Old log-probs are the trainer's where it is asked.
    """
    shared, buffer, metrics = share_rows(config, rounds, buffer, int(jax.device_get(state.num_updates)))
    fresh, surplus = shared.fresh, shared.surplus
    if trainer_log_probs(config, system):
        with during("log_probs"):
            rows, gaps = with_trainer_log_probs(config, system, updater, state.params, [*fresh, *surplus], prompt_of)
        fresh, surplus = tuple(rows[: len(fresh)]), tuple(rows[len(fresh) :])
        metrics |= gaps
    batches = cut_batches(config, [*shared.carried, *fresh], step)
    return StepRows(batches, (*buffer, *surplus), metrics)


@during("replay")
def share_rows(
    config: Config, rounds: Rounds, buffer: Sequence[Experience], update: int
) -> tuple[Share, Sequence[Experience], dict[str, float]]:
    """The rows of the rollouts that began at optimizer step `update` and what they join, what stays in the buffer, and
    the metrics of `replay.mode: dynamic`."""
    n = config.rollout.samples_per_prompt
    drawn = [[experience_of(group, rollout, update) for rollout in group.rollouts] for group in rounds.groups]
    if config.replay.mode != "dynamic":
        return Share((), replay.joined(drawn), ()), buffer, {}
    num_samples, carried = config.rollout.prompts_per_step * n, waiting(config, buffer, update)
    shared = replay.share_out(drawn, carried, num_samples, config.advantage.epsilon)
    return (
        shared,
        (),
        {
            "resample_rounds": rounds.num_resamples,
            "resampled_groups": rounds.num_later,
            "carried_groups": len(replay.by_sample(shared.surplus)) // n,
        },
    )


def waiting(config: Config, buffer: Sequence[Experience], update: int) -> tuple[Experience, ...]:
    """Rows of the groups that wait for the step which begins at `update`: none but under `replay.mode: dynamic`."""
    if config.replay.mode != "dynamic":
        return ()
    return replay.young_enough(buffer, config.replay, config.rollout.samples_per_prompt, update)


def num_waiting(config: Config, buffer: Sequence[Experience], update: int) -> int:
    """The groups of these rows."""
    return len(replay.by_sample(waiting(config, buffer, update))) // config.rollout.samples_per_prompt
