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
from rethinker_jax.models.precision import cast_params
from rethinker_jax.models.qwen25vl import Model, Params
from rethinker_jax.models.sharding import place_rows, put, row_shardings
from rethinker_jax.training.layout import TrainBatch
from rethinker_jax.training.log_probs import completion_log_probs
from rethinker_jax.training.losses import POLICY_LOSSES, PolicyLoss, kl_estimate, token_weights, truncated_importance
from rethinker_jax.training.offload import host_shardings


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
    optimizer: optax.GradientTransformationExtraArgs
    loss: LossConfig
    dtype: Any
    freeze: tuple[str, ...] = ()
    average: AverageRule | None = None
    offload: bool = False  # between steps the optimizer's state lies in the host's memory


class Updater:
    """One jitted optimizer step for parameters that lie as `params` do.

    The state's places are pinned: left to the compiler they would differ after the first step, which would then be
    compiled twice, and optimizer moments would be whole on every device.

    `reference`: with `loss.reference: start`, the parameters it was made with, without adapters (which begin as
    nothing), in the dtype of computation; else empty. A run that goes on makes it again from `model.path`.
    """

    def __init__(self, rule: UpdateRule, params: Params, mesh: Mesh):
        self.rule = rule
        self.mesh = mesh
        whole = NamedSharding(mesh, PartitionSpec())
        shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
        opt_state = optax.tree.map_params(
            rule.optimizer,
            lambda _, sharding: host_shardings(sharding) if rule.offload else sharding,
            jax.eval_shape(self._init_optimizer, params),
            split_params(shardings, rule.freeze)[0],
            transform_non_params=lambda _: whole,
        )
        average = split_params(shardings, rule.freeze)[0] if rule.average else {}
        places: Any = (shardings, opt_state, whole, whole, average)
        self._places = TrainState(*places)
        self.reference = _copy_of(params, rule.dtype) if rule.loss.reference == "start" else {}
        self.compiled_step = jax.jit(
            functools.partial(update_step, rule), donate_argnums=0, out_shardings=(self._places, whole)
        )
        self._log_probs = jax.jit(lambda params, batch: _row_log_probs(rule, params, batch)[0], out_shardings=whole)

    def init(self, params: Params) -> TrainState:
        """The state before the first step; takes over `params`."""
        zero = np.zeros((), np.int32)
        opt_state = jax.jit(self._init_optimizer, out_shardings=self._places.opt_state)(params)
        average = split_params(params, self.rule.freeze)[0] if self.rule.average else {}
        average = jax.tree.map(jnp.copy, average)  # the step takes over both
        counts = put((zero, zero), (self._places.num_updates, self._places.num_skipped))
        return TrainState(params, opt_state, *counts, average)

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

    def step(
        self, state: TrainState, batches: Sequence[TrainBatch], kl_coefficient: float | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Make one optimizer step on micro-batches of equal shapes; `state` is donated.

        `kl_coefficient` is that of `loss.kl: loss`, where a controller moves it; None = the config's.
        """
        config = self.rule.loss
        batch = place_batches(batches, self.mesh)
        reference = {} if config.kl == "reward" else self.reference  # the KL is in the advantages already
        coefficient = config.kl_coefficient if kl_coefficient is None else kl_coefficient
        return self.compiled_step(state, batch, reference, np.float32(coefficient))

    def log_probs(self, params: Params, batch: TrainBatch) -> jax.Array:
        """Log-probs of the completions of `batch` under `params`, float32 [rows, length], without gradients.

        Every process has all of them.
        """
        return self._log_probs(params, place_rows(batch, self.mesh, 0, {"positions": 1}))


def stack_batches(batches: Sequence[TrainBatch]) -> TrainBatch:
    """Micro-batches of one shape as one, behind an axis of their own."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def place_batches(batches: Sequence[TrainBatch], mesh: Mesh) -> TrainBatch:
    """Micro-batches of one shape on the mesh, stacked; of several processes each stacks what its own devices see."""
    if jax.process_count() == 1:
        stacked = stack_batches(batches)
        return jax.device_put(stacked, batch_shardings(stacked, mesh))

    def place(sharding: NamedSharding, *leaves: np.ndarray) -> jax.Array:
        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, "an array of several dimensions has an index for each"
            return np.stack([leaf[index[1:]] for leaf in leaves[index[0]]])

        return jax.make_array_from_callback((len(leaves), *leaves[0].shape), sharding, piece)

    stacked = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (len(batches), *leaf.shape)), batches[0])  # for shapes
    return jax.tree.map(place, batch_shardings(stacked, mesh), *batches)


def batch_shardings(stacked: TrainBatch, mesh: Mesh) -> Any:
    """Rows lie behind the micro-batch axis; those of the positions behind time, height and width too."""
    return row_shardings(stacked, mesh, 1, {"positions": 2})


def _copy_of(params: Params, dtype: Any) -> Params:
    """The parameters without adapters, cast for computation, in arrays of their own: a step takes over the others."""
    base = {part: leaves for part, leaves in params.items() if part != "lora"}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, base)
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, cast_params(tree, dtype)), out_shardings=shardings)(base)


def _row_log_probs(rule: UpdateRule, params: Params, batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
    learns_entropy = rule.loss.entropy_coefficient != 0
    return completion_log_probs(rule.model, adapt_params(params, rule.dtype), batch, learns_entropy)


def _loss(
    trained: Params,
    frozen: Params,
    rule: UpdateRule,
    batch: TrainBatch,
    counts: dict[str, jax.Array],
    reference: Params,
    kl_coefficient: jax.Array | float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The batch's share of the global loss, and sums for the metrics."""
    config = rule.loss
    log_probs, entropy = _row_log_probs(rule, join_params(trained, frozen), batch)
    weights = token_weights(
        batch.loss_mask, batch.nll_mask, counts["policy"], counts["nll"], counts["rows"],
        config.aggregation, config.constant_length,
    )  # fmt: skip
    old = jnp.where(batch.loss_mask, batch.old_log_probs, jax.lax.stop_gradient(log_probs))
    found = POLICY_LOSSES[config.policy](log_probs, old, batch.advantages, batch.loss_mask, config)
    token_loss, sums = found.loss, {}
    if config.importance_cap:
        sampler = jnp.where(batch.loss_mask, batch.sampler_log_probs, old)
        importance = truncated_importance(old, sampler, config.importance_cap)
        token_loss = token_loss * importance
        sums["importance_weight"] = jnp.sum(weights.entropy * importance)
        sums["importance_cap_fraction"] = jnp.sum(weights.entropy * (importance >= config.importance_cap))
    policy = jnp.sum(weights.policy * token_loss)
    nll = jnp.sum(weights.nll * -log_probs)
    entropy_mean = jnp.sum(weights.entropy * entropy)
    loss = policy + config.nll_coefficient * nll - config.entropy_coefficient * entropy_mean
    if reference:
        ref_log_probs = jax.lax.stop_gradient(_row_log_probs(rule, reference, batch)[0])
        kl = kl_estimate(log_probs, ref_log_probs, config.kl_estimator)
        sums["kl"] = jnp.sum(weights.entropy * kl)
        if config.kl == "loss":
            sums["kl_loss"] = jnp.sum(weights.policy * kl)
            loss = loss + kl_coefficient * sums["kl_loss"]
    sums |= {"loss": loss, "policy_loss": policy, "nll": nll, "entropy": entropy_mean}
    return loss, sums | _ratio_metrics(found, log_probs, batch, weights.entropy, counts, config)


def _ratio_metrics(
    found: PolicyLoss,
    log_probs: jax.Array,
    batch: TrainBatch,
    token_mean: jax.Array,
    counts: dict[str, jax.Array],
    config: LossConfig,
) -> dict[str, jax.Array]:
    """Sums for the metrics of how far policy, old policy and sampler lie apart; `token_mean` weighs policy tokens."""
    gap = jnp.where(batch.loss_mask & batch.fresh[:, None], jnp.abs(log_probs - batch.old_log_probs), 0.0)
    sums = {
        "ratio": jnp.sum(token_mean * found.ratio),
        "clip_low_fraction": jnp.sum(token_mean * found.clipped_low),
        "clip_high_fraction": jnp.sum(token_mean * found.clipped_high),
        "sampler_trainer_gap": jnp.sum(gap) / jnp.maximum(counts["fresh"], 1.0),
        "sampler_trainer_gap_max": jnp.max(gap),
    }
    if config.dual_clip:
        sums["dual_clip_fraction"] = jnp.sum(token_mean * found.clipped_dual)
    return sums


def update_step(
    rule: UpdateRule,
    state: TrainState,
    batches: TrainBatch,
    reference: Params | None = None,
    kl_coefficient: jax.Array | float = 0.0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The step itself: arrays in, new state and metrics out. Arrays of `batches` begin with [micro_batches, ...].

    `reference`: parameters that the KL is measured to; None or empty = no KL.
    """
    counts = {
        "policy": batches.loss_mask.sum().astype(jnp.float32),
        "nll": batches.nll_mask.sum().astype(jnp.float32),
        "rows": batches.loss_mask.any(axis=-1).sum().astype(jnp.float32),
        "fresh": (batches.loss_mask & batches.fresh[..., None]).sum().astype(jnp.float32),
    }
    trained, frozen = split_params(state.params, rule.freeze)
    gradient = jax.grad(_loss, has_aux=True)

    def accumulate(total: Params, batch: TrainBatch) -> tuple[Params, dict[str, jax.Array]]:
        grads, sums = gradient(trained, frozen, rule, batch, counts, reference or {}, kl_coefficient)
        return jax.tree.map(jnp.add, total, grads), sums

    zeros = jax.tree.map(jnp.zeros_like, trained)
    grads, sums = jax.lax.scan(accumulate, zeros, batches)
    metrics = {name: values.max() if name.endswith("_max") else values.sum() for name, values in sums.items()}
    metrics["gradient_norm"] = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["gradient_norm"]) & jnp.isfinite(metrics["loss"])
    updates, opt_state = rule.optimizer.update(grads, state.opt_state, trained, finite=finite)
    trained: Any = optax.apply_updates(trained, updates)
    metrics["skipped_update"] = 1.0 - finite.astype(jnp.float32)
    num_skipped = state.num_skipped + (~finite).astype(jnp.int32)
    num_updates = state.num_updates + 1
    average = state.average
    if rule.average is not None:
        weight = jnp.where(num_updates % rule.average.every == 0, 1 - rule.average.decay, 0.0)
        average = jax.tree.map(lambda old, new: old + weight * (new - old), average, trained)
    return TrainState(join_params(trained, frozen), opt_state, num_updates, num_skipped, average), metrics
