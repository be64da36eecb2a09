"""AdamW with warm-up, schedule, clipping and frozen parts, all by optax."""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from rethinker_jax.config import OptimizerConfig

PARTS = ("vision", "merger", "decoder")


def part_of(path: tuple[Any, ...]) -> str:
    """The part of the model that a parameter belongs to: vision, merger or decoder."""
    keys = [entry.key for entry in path]
    if keys[0] != "vision":
        return "decoder"
    return "merger" if "merger" in keys else "vision"


def frozen_mask(params: Any, freeze: Sequence[str]) -> Any:
    """Tree of bool: True where a parameter is not trained."""
    return jax.tree_util.tree_map_with_path(lambda path, _: part_of(path) in freeze, params)


def learning_rate_schedule(config: OptimizerConfig, num_updates: int) -> optax.Schedule:
    """Linear warm-up, then constant, or cosine down to `final_fraction` of the rate at the last of `num_updates`.

    The first update has the rate after one step of warm-up: at optax's own step 0 it would be 0, and a batch wasted.
    """
    if config.schedule == "constant":
        schedule = optax.linear_schedule(0.0, config.learning_rate, max(config.warmup_steps, 1))
    else:
        schedule = optax.warmup_cosine_decay_schedule(
            0.0,
            config.learning_rate,
            config.warmup_steps,
            max(num_updates, config.warmup_steps + 1),
            config.learning_rate * config.final_fraction,
        )
    return lambda count: schedule(count + 1)


def make_optimizer(
    config: OptimizerConfig, num_updates: int, params: Any, freeze: Sequence[str]
) -> optax.GradientTransformation:
    """The optimizer for `params` (arrays or shapes); frozen parameters get no state and no update."""
    adamw = optax.adamw(
        learning_rate_schedule(config, num_updates), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay
    )
    trained = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    labels = jax.tree.map(lambda frozen: "frozen" if frozen else "trained", frozen_mask(params, freeze))
    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)
