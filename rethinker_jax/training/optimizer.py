"""AdamW with warm-up, schedule, clipping, a rate for each part and a place for the moments; the parts are optax's."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.nnx.traversals import flatten_mapping, unflatten_mapping

from rethinker_jax.config import OptimizerConfig
from rethinker_jax.models.parts import part_of
from rethinker_jax.training.offload import is_on_host, leaf_by_leaf

# optimizer.moments → dtypes in which the first and the second moment are kept.
MOMENTS = {
    "float32": (jnp.float32, jnp.float32),
    "mu_bfloat16": (jnp.bfloat16, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.bfloat16),
}


def num_warmup_steps(config: OptimizerConfig, num_updates: int) -> int:
    """`warmup_fraction` of the updates, rounded up, where there is one, else `warmup_steps`."""
    # 0.07 · 100 is a little more than 7 in floating point.
    return math.ceil(config.warmup_fraction * num_updates - 1e-9) if config.warmup_fraction else config.warmup_steps


def learning_rate_schedule(config: OptimizerConfig, num_updates: int) -> optax.Schedule:
    """Linear warm-up, then constant, or down to `final_fraction` of the rate at the last of `num_updates`.

    The first update has the rate after one step of warm-up: at optax's own step 0 it would be 0, and a batch wasted.
    """
    peak, last = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = num_warmup_steps(config, num_updates)
    end = max(num_updates, warmup + 1)
    if config.schedule == "constant":
        schedule = optax.linear_schedule(0.0, peak, max(warmup, 1))
    elif config.schedule == "linear":
        rise, fall = optax.linear_schedule(0.0, peak, warmup), optax.linear_schedule(peak, last, end - warmup)
        schedule = optax.join_schedules([rise, fall], [warmup])
    else:
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, end, last)
    return lambda count: schedule(count + 1)


def make_optimizer(config: OptimizerConfig, num_updates: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer of the trained parameters, a nested dictionary; frozen ones never reach it.

    Its `update` takes one argument more, `finite`, a truth value that may be traced: where it is false nothing changes,
    that is, the updates are 0 and the state is the old one. Default: true.

    Gradients are clipped by the norm of all parts together. A part's multiplier is of its learning rate: Adam does not
    feel the size of a gradient, so it is the update that is multiplied, and weight decay with it. The state is the same
    tree with every config, that of `optax.chain(clip, optax.adamw)`.
    """
    adamw = optax.chain(
        _adam(config),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate_schedule(config, num_updates)),
    )
    inner = optax.with_extra_args_support(optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw))

    def update(updates: Any, state: Any, params: Any = None, *, finite: Any = True) -> tuple[Any, Any]:
        updates, changed = inner.update(updates, state, params, finite=finite)
        updates = jax.tree.map(lambda leaf: jnp.where(finite, leaf, 0.0), _scale_parts(updates, config.rates))
        return updates, _keep_unless(finite, changed, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _scale_parts(updates: Any, rates: Mapping[Any, float]) -> Any:
    """Updates times the multiplier of their part; parts that are not named keep theirs."""
    if not rates:
        return updates
    flat = flatten_mapping(updates)
    parts = {path: "adapters" if path[0] == "lora" else part_of(path) for path in flat}
    return unflatten_mapping({path: leaf * rates.get(parts[path], 1.0) for path, leaf in flat.items()})


def _keep_unless(finite: Any, changed: Any, old: Any) -> Any:
    """The changed state where `finite`, else the old one; of what is back on the host that was decided before."""
    return jax.tree.map(lambda new, old: new if is_on_host(new) else jnp.where(finite, new, old), changed, old)


def _adam(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Adam in float32 whose moments are kept as `optimizer.moments` says, with `optimizer.offload` in host memory.

    A kept moment is cast up, changed, and rounded to nearest. (optax's own `mu_dtype` multiplies by b1 in bfloat16,
    where 0.9 is 0.898; done so with the second moment, 0.999 would be 1.)

    What bfloat16 costs: each step rounds by up to u = 2^-8 of the value, and the errors of a steady moment add up to at
    most u / (1 - b) of it. mu with b1 = 0.9: 4 %. nu with b2 = 0.95: 8 %, which is 4 % of the step, since its root is
    taken. nu with b2 = 0.999: no bound. A fall by 0.1 % is less than half the distance to the next number, so nu never
    falls, and it rises only where a squared gradient is several times nu: after one large gradient the steps stay small
    for good. That begins where 1 - b2 is below 2^-8; `mu_bfloat16`, with nu in float32, has no such limit. Both were
    kept in bfloat16 for DeepSeek-V3 (arXiv 2412.19437; b2 0.95), the first alone in arXiv 2106.04560.
    """
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2)
    mu_dtype, nu_dtype = MOMENTS[config.moments]

    def kept(state: Any) -> optax.ScaleByAdamState:
        mu, nu = optax.tree.cast(state.mu, mu_dtype), optax.tree.cast(state.nu, nu_dtype)
        return optax.ScaleByAdamState(state.count, mu, nu)

    def init(params: Any) -> Any:
        return kept(adam.init(params))

    def one_step(grads: Any, state: optax.ScaleByAdamState) -> tuple[Any, optax.ScaleByAdamState]:
        """Of the whole tree or of one leaf; moments in and out as they are kept."""
        mu, nu = optax.tree.cast(state.mu, jnp.float32), optax.tree.cast(state.nu, jnp.float32)
        updates, new = adam.update(grads, optax.ScaleByAdamState(state.count, mu, nu))
        return updates, kept(new)

    def update(updates: Any, state: Any, params: Any = None, *, finite: Any = True) -> tuple[Any, Any]:
        del params
        if not config.offload:
            return one_step(updates, state)

        def one_leaf(grad: jax.Array, moments: tuple[Any, Any]) -> tuple[Any, tuple[Any, Any]]:
            update, new = one_step(grad, optax.ScaleByAdamState(state.count, *moments))
            return update, _keep_unless(finite, (new.mu, new.nu), moments)

        grads, tree = jax.tree.flatten(updates)
        moments = list(zip(jax.tree.leaves(state.mu), jax.tree.leaves(state.nu), strict=True))
        leaves, moments = leaf_by_leaf(one_leaf, grads, moments, jnp.asarray(finite))
        mu, nu = (jax.tree.unflatten(tree, column) for column in zip(*moments, strict=True))
        return jax.tree.unflatten(tree, leaves), optax.ScaleByAdamState(optax.safe_increment(state.count), mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)
