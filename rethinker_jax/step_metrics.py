"""The numbers of one training step, from its rollouts and its batches. Names are explained in docs/metrics.md."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rethinker_jax import phases, rethink
from rethinker_jax.models.flops import decoder_flops, image_work, merger_flops, vision_flops
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.prompts.batch import unique_images
from rethinker_jax.replay import Experience, Selection
from rethinker_jax.rollout import Group, Rolled
from rethinker_jax.training.batch import Packed
from rethinker_jax.training.packing import Group as PromptGroup
from rethinker_jax.types import Verdict

# Metrics that are read off a clock, or tell where a process began: two runs that do the same differ in these alone.
CLOCKS = (
    "seconds", *phases.METRICS.values(), "seconds_rollout", "seconds_update", "seconds_compile",
    "seconds_second_pass", "seconds_optimizer_steps", "tokens_per_second",
    "rollout_tokens_per_second", "update_tokens_per_second", "update_mfu", "step_mfu", "verdict_ms",
    "prompts_made_ahead", "prompts_thrown_away",
)  # fmt: skip
NOT_CORRECT = ("wrong", "no_answer", "bad_gold", "timeout", "crash")


def share(values: Sequence[Any]) -> float:
    """Mean, or NaN where there is nothing to average."""
    return float(np.mean(np.asarray(values, np.float64))) if len(values) else float("nan")


def mean_metrics(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each metric the mean over those that have it."""
    names = dict.fromkeys(key for one in found for key in one)
    return {key: share([one[key] for one in found if key in one]) for key in names}


def reward_metrics(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Means of the reward's terms, over the responses that have them, and how many lack the judge's value."""
    names = dict.fromkeys(name for verdict in verdicts for name in verdict.parts)
    means = {
        f"reward/{name}": share([verdict.parts[name] for verdict in verdicts if name in verdict.parts])
        for name in names
    }
    judged = any("judge" in verdict.parts or "judge" in verdict.missing for verdict in verdicts)
    if not judged:
        return means
    failed = sum("judge" in verdict.missing for verdict in verdicts)
    asked = failed + sum("judge" in verdict.parts for verdict in verdicts)
    return means | {"judge_failures": float(failed), "judge_failure_share": failed / asked}


def rollout_metrics(groups: Sequence[Group], epsilon: float) -> dict[str, float]:
    """Rewards, advantages and lengths are of the rows to learn from, verdicts of the first responses, one a sample."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    samples = [rollout for group in groups for rollout in group.samples]
    verdicts = [one.first_verdict.verdict for one in samples]
    zero = [all(abs(one.advantage) <= epsilon for one in group.rollouts) for group in groups]
    return {
        "reward": share([one.reward for one in rollouts]),
        **reward_metrics([one.verdict for one in rollouts]),
        "accuracy": share([one.first_verdict.correct for one in samples]),
        "zero_advantage_share": share(zero),
        "all_correct_share": share([all(one.first_verdict.correct for one in group.rollouts) for group in groups]),
        "advantage_abs_mean": share([abs(one.advantage) for one in rollouts]),
        "completion_length": share([len(one.completion) for one in rollouts]),
        "completion_length_correct": share([len(one.completion) for one in rollouts if one.verdict.correct]),
        "completion_length_wrong": share([len(one.completion) for one in rollouts if not one.verdict.correct]),
        "truncated_share": share([one.first.finish_reason == "length" for one in samples]),
        **rethinking_metrics(groups),
        # With `accuracy` they sum to 1: no verdict is silent.
        **{f"{name}_share": share([verdict == name for verdict in verdicts]) for name in NOT_CORRECT},
        "verdict_ms": share([one.first_verdict.ms for one in samples]),
    }


def rethinking_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Second looks that the model took of its own accord, and what came of those that were forced on it."""
    rollouts = [rollout for group in groups for rollout in group.drawn]
    own = [(rethink.rethinks(one.first.text), one.first_verdict.correct) for one in rollouts]
    forced = [one for one in rollouts if one.forced_verdict is not None]
    before = [one.first_verdict.correct for one in forced]
    after = [one.forced_verdict is not None and one.forced_verdict.correct for one in forced]
    turns = list(zip(before, after, strict=True))
    rooms = [rethink.has_room(group.rethinking, one.first) for group in groups for one in group.drawn]
    wrong_with_room = share([not right for (_, right), room in zip(own, rooms, strict=True) if room])
    reasons = [why for group in groups for why in group.not_kept]
    return {
        "rethink_ratio": share([looks for looks, _ in own]),
        "rethink_ratio_correct": share([looks for looks, right in own if right]),
        "rethink_ratio_wrong": share([looks for looks, right in own if not right]),
        "forced_share": share([one.forced is not None for one in rollouts]),
        "selectivity": (1 - share(before)) / wrong_with_room if wrong_with_room > 0 else float("nan"),
        "kept_share": share([one.kept for one in forced]),
        **{f"not_kept/{why}": share([one == why for one in reasons]) for why in rethink.NOT_KEPT},
        "forced_first_accuracy": share(before),
        "forced_final_accuracy": share(after),
        "rethink_gain": share(after) - share(before),
        "wrong_to_right": share([right for was_right, right in turns if not was_right]),
        "right_to_wrong": share([not right for was_right, right in turns if was_right]),
    }


def sampling_metrics(rolled: Rolled) -> dict[str, float]:
    """What the sampler did; the drain begins when the last request was given to a slot."""
    one = rolled.counters
    metrics = {
        "slot_utilisation": one.busy_steps / max(one.slot_steps, 1),
        "drain_share": one.drain_slot_steps / max(one.slot_steps, 1),
        "images_encoded": one.images,
        "prompts_prefilled": one.prompts,
        "prefill_waves": one.waves,
        "cache_gib": one.cache_bytes / 2**30,
        "prompt_padding_share": 1 - one.prompt_fill,
        "vision_padding_share": 1 - one.vision_fill,
    }
    if rolled.second_pass is not None:
        second = rolled.second_pass.counters
        metrics |= {
            "seconds_second_pass": rolled.second_pass.seconds,
            "second_pass_prompts": second.prompts,
            "second_pass_read_tokens": second.read_tokens,
            "second_pass_fed_tokens": second.fed_tokens,
        }
    return metrics


def rollout_flops(config: QwenConfig, groups: Sequence[Group]) -> int:
    """Of one rollout: each distinct image encoded and each prompt read once, each completion fed token by token."""
    prompts = [group.rollouts[0].prompt for group in groups]
    grids = [image.grid for image in unique_images(prompts)[0]]
    lengths = [tuple(len(one.completion) for one in group.drawn) for group in groups]
    packed = [
        PromptGroup(tuple(range(len(length))), len(prompt), length)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    counts = [sum(group.num_tokens for group in packed), sum(group.num_pairs for group in packed)]
    targets = sum(sum(group.completion_tokens) for group in packed)
    work = image_work(config, grids)
    return decoder_flops(config, *counts, targets) + vision_flops(config, work) + merger_flops(config, work)


@dataclasses.dataclass
class UpdateWork:
    """What the optimizer steps of one step did: seconds, tokens that were run, operations of the model, and the rows.

    trained: (optimizer step, its rows).
    """

    seconds: float = 0.0
    tokens: int = 0
    flops: int = 0
    trained: list[tuple[int, Selection]] = dataclasses.field(default_factory=list)


def speed_metrics(
    config: QwenConfig,
    groups: Sequence[Group],
    work: UpdateWork,
    seconds: float,
    seconds_rollout: float,
    peak: float | None,
) -> dict[str, float]:
    """Seconds, tokens per second, and where the devices' peak is known (FLOP/s of one) the share of it that was used.

    `seconds` are those of the whole step; what it compiled is in them.
    """
    num_tokens = sum(len(one.completion) for group in groups for one in group.drawn)
    metrics = {
        "seconds_rollout": seconds_rollout,
        "seconds_update": seconds - seconds_rollout,
        "seconds_optimizer_steps": work.seconds,
        "tokens_per_second": num_tokens / seconds,
        "rollout_tokens_per_second": num_tokens / seconds_rollout,
        "update_tokens_per_second": work.tokens / work.seconds if work.tokens else float("nan"),
    }
    if peak is not None:
        peak *= jax.device_count()
        metrics["update_mfu"] = work.flops / work.seconds / peak
        metrics["step_mfu"] = (work.flops + rollout_flops(config, groups)) / seconds / peak
    return metrics


def packing_metrics(packed: Packed) -> dict[str, float]:
    """Of the token places of an optimizer step, the share that holds none; and what shared prompts save."""
    return {
        "row_padding_share": 1 - packed.num_tokens / packed.num_places,
        "shared_prompt_saving": 1 - packed.num_tokens / max(packed.num_separate, 1),
    }


def batch_metrics(
    raw: Sequence[Experience], chosen: Selection, epsilon: float, update: int, sums: Mapping[str, Any]
) -> dict[str, float]:
    """`effective_share`: of the batch's places for the policy gradient, those filled by a row with an advantage.

    There is a place for every row that was drawn, less those that are there for their supervised loss alone.
    """
    rows = (*chosen.fresh, *chosen.replayed)
    places = len(raw) - sum(not row.loss_mask.any() for row in rows)
    effective = sum(abs(row.advantage) > epsilon for row in rows)
    ages = [update - row.update for row in chosen.replayed]
    return {
        "effective_share": effective / max(places, 1),
        "fresh_effective_share": share([abs(row.advantage) > epsilon for row in raw]),
        "replay_share": len(chosen.replayed) / len(raw),
        "replay_age": share(ages) if ages else 0.0,
        "repeated_share": 1 - len({id(row) for row in rows}) / len(rows) if rows else 0.0,
        "forced_in_batch_share": share([row.nll_mask.any() for row in rows]),
    } | {name: float(value) for name, value in sums.items()}
