"""One optimizer step: arrays in, new state and metrics out, jitted once, sharded by where its arrays lie."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rethinker_jax.config import LossConfig
from rethinker_jax.models.lora import adapt_params
from rethinker_jax.models.parts import join_params, split_params
from rethinker_jax.models.qwen25vl import Model, Params
from rethinker_jax.models.sharding import place_rows
from rethinker_jax.training.batch import TrainBatch
from rethinker_jax.training.log_probs import token_log_probs
from rethinker_jax.training.losses import clipped_policy_loss, token_weights


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an update changes. `params`, frozen ones too, and the optimizer's moments are float32."""

    params: Params
    opt_state: Any  # of the trained parameters alone
    num_updates: jax.Array  # optimizer steps made, skipped ones included
    num_skipped: jax.Array  # updates left out because the gradient was not finite
    average: Params


@dataclasses.dataclass(frozen=True)
class AverageRule:
    """average ← decay · average + (1 − decay) · weights, after every `every` updates."""

    decay: float
    every: int


@dataclasses.dataclass(frozen=True)
class UpdateRule:
    """What stays the same from update to update. Hashable: the static argument of the jitted step."""

    model: Model
    optimizer: optax.GradientTransformation
    loss: LossConfig
    dtype: Any
    freeze: tuple[str, ...] = ()
    average: AverageRule | None = None


class Updater:
    """One jitted optimizer step for parameters that lie as `params` do.

    The state's places are pinned: left to the compiler they would differ after the first step, which would then be
    compiled twice, and optimizer moments would be whole on every device.
    """

    def __init__(self, rule: UpdateRule, params: Params, mesh: Mesh):
        self.rule = rule
        self.mesh = mesh
        whole = NamedSharding(mesh, PartitionSpec())
        shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
        opt_state = optax.tree.map_params(
            rule.optimizer,
            lambda _, sharding: sharding,
            jax.eval_shape(self._init_optimizer, params),
            split_params(shardings, rule.freeze)[0],
            transform_non_params=lambda _: whole,
        )
        average = split_params(shardings, rule.freeze)[0] if rule.average else {}
        places: Any = (shardings, opt_state, whole, whole, average)
        self._places = TrainState(*places)
        self._step = jax.jit(
            functools.partial(update_step, rule), donate_argnums=0, out_shardings=(self._places, whole)
        )

    def init(self, params: Params) -> TrainState:
        """The state before the first step; takes over `params`."""
        zero = np.zeros((), np.int32)
        opt_state = jax.jit(self._init_optimizer, out_shardings=self._places.opt_state)(params)
        average = split_params(params, self.rule.freeze)[0] if self.rule.average else {}
        average = jax.tree.map(jnp.copy, average)  # the step takes over both
        return TrainState(params, opt_state, *jax.device_put((zero, zero), self._places.num_updates), average)

    def shapes(self, params: Params) -> TrainState:
        """What `init` would make of parameters like `params`, as shapes with their places: for a restore."""

        def fresh(params: Params) -> TrainState:
            zero = jnp.zeros((), jnp.int32)
            average = split_params(params, self.rule.freeze)[0] if self.rule.average else {}
            return TrainState(params, self._init_optimizer(params), zero, zero, average)

        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            jax.eval_shape(fresh, params),
            self._places,
        )

    def averaged_params(self, state: TrainState) -> Params:
        """The parameters with the moving average in place of what is trained. Wants a rule that keeps one."""
        return join_params(state.average, split_params(state.params, self.rule.freeze)[1])

    def _init_optimizer(self, params: Params) -> Any:
        return self.rule.optimizer.init(split_params(params, self.rule.freeze)[0])

    def step(self, state: TrainState, batches: Sequence[TrainBatch]) -> tuple[TrainState, dict[str, jax.Array]]:
        """Make one optimizer step on micro-batches of equal shapes; `state` is donated."""
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
        # Rows lie behind the micro-batch axis; those of the positions behind time, height and width too.
        return self._step(state, place_rows(stacked, self.mesh, 1, {"positions": 2}))

    def log_probs(self, params: Params, batch: TrainBatch) -> jax.Array:
        """Log-probs of the completions of `batch` under `params`, float32 [rows, length], without gradients."""
        return _log_probs(self.rule, params, place_rows(batch, self.mesh, 0, {"positions": 1}))


def _completion_log_probs(rule: UpdateRule, params: Params, batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
    model, compute = rule.model, adapt_params(params, rule.dtype)
    table = None if batch.vision is None else model.encode_images(compute, batch.vision)
    hidden = model.hidden(compute, batch.text, table)
    states = jnp.take_along_axis(hidden, batch.state_index[..., None], axis=1)
    return token_log_probs(model, compute, states, batch.completion_ids)


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(rule: UpdateRule, params: Params, batch: TrainBatch) -> jax.Array:
    return _completion_log_probs(rule, params, batch)[0]


def _loss(
    trained: Params, frozen: Params, rule: UpdateRule, batch: TrainBatch, counts: dict[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The batch's share of the global loss, and sums for the metrics."""
    config = rule.loss
    log_probs, entropy = _completion_log_probs(rule, join_params(trained, frozen), batch)
    weights = token_weights(
        batch.loss_mask, batch.nll_mask, counts["policy"], counts["nll"], counts["rows"], config.aggregation
    )
    old = jnp.where(batch.loss_mask, batch.old_log_probs, jax.lax.stop_gradient(log_probs))
    token_loss, ratio = clipped_policy_loss(log_probs, old, batch.advantages, config.clip_low, config.clip_high)
    policy = jnp.sum(weights.policy * token_loss)
    nll = jnp.sum(weights.nll * -log_probs)
    entropy_mean = jnp.sum(weights.entropy * entropy)
    loss = policy + config.nll_coefficient * nll - config.entropy_coefficient * entropy_mean
    mask = batch.loss_mask
    gap = jnp.where(mask & batch.fresh[:, None], jnp.abs(log_probs - batch.old_log_probs), 0.0)
    sums = {
        "loss": loss,
        "policy_loss": policy,
        "nll": nll,
        "entropy": entropy_mean,
        "ratio": jnp.sum(weights.entropy * ratio),
        "clip_low_fraction": jnp.sum(
            weights.entropy * ((ratio < 1 - config.clip_low) & (batch.advantages[:, None] < 0))
        ),
        "clip_high_fraction": jnp.sum(
            weights.entropy * ((ratio > 1 + config.clip_high) & (batch.advantages[:, None] > 0))
        ),
        "sampler_trainer_gap": jnp.sum(gap) / jnp.maximum(counts["fresh"], 1.0),
        "sampler_trainer_gap_max": jnp.max(gap),
    }
    return loss, sums


def update_step(rule: UpdateRule, state: TrainState, batches: TrainBatch) -> tuple[TrainState, dict[str, jax.Array]]:
    """The step itself: arrays in, new state and metrics out. Arrays of `batches` begin with [micro_batches, ...]."""
    counts = {
        "policy": batches.loss_mask.sum().astype(jnp.float32),
        "nll": batches.nll_mask.sum().astype(jnp.float32),
        "rows": batches.loss_mask.any(axis=-1).sum().astype(jnp.float32),
        "fresh": (batches.loss_mask & batches.fresh[..., None]).sum().astype(jnp.float32),
    }
    trained, frozen = split_params(state.params, rule.freeze)
    gradient = jax.grad(_loss, has_aux=True)

    def accumulate(total: Params, batch: TrainBatch) -> tuple[Params, dict[str, jax.Array]]:
        grads, sums = gradient(trained, frozen, rule, batch, counts)
        return jax.tree.map(jnp.add, total, grads), sums

    zeros = jax.tree.map(jnp.zeros_like, trained)
    grads, sums = jax.lax.scan(accumulate, zeros, batches)
    metrics = {name: values.max() if name.endswith("_max") else values.sum() for name, values in sums.items()}
    metrics["gradient_norm"] = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["gradient_norm"]) & jnp.isfinite(metrics["loss"])
    updates, opt_state = rule.optimizer.update(grads, state.opt_state, trained)
    trained, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (optax.apply_updates(trained, updates), opt_state),
        (trained, state.opt_state),
    )
    metrics["skipped_update"] = 1.0 - finite.astype(jnp.float32)
    num_skipped = state.num_skipped + (~finite).astype(jnp.int32)
    num_updates = state.num_updates + 1
    average = state.average
    if rule.average is not None:
        weight = jnp.where(num_updates % rule.average.every == 0, 1 - rule.average.decay, 0.0)
        average = jax.tree.map(lambda old, new: old + weight * (new - old), average, trained)
    return TrainState(join_params(trained, frozen), opt_state, num_updates, num_skipped, average), metrics
