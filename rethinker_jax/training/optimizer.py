"""AdamW with warm-up, schedule and clipping, all by optax."""

import optax

from rethinker_jax.config import OptimizerConfig


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


def make_optimizer(config: OptimizerConfig, num_updates: int) -> optax.GradientTransformation:
    """The optimizer of the trained parameters; frozen ones never reach it."""
    adamw = optax.adamw(
        learning_rate_schedule(config, num_updates), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
