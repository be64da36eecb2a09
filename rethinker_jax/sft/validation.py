"""Loss and token accuracy on rows that are not learned."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rethinker_jax.models.lora import adapt_params
from rethinker_jax.models.qwen25vl import Params
from rethinker_jax.models.sharding import place_rows
from rethinker_jax.training.context import take_targets
from rethinker_jax.training.layout import TrainBatch
from rethinker_jax.training.log_probs import CHUNK_BYTES, packed_hidden
from rethinker_jax.training.update import Updater, UpdateRule


def measure(updater: Updater, params: Params, batches: Iterable[TrainBatch]) -> dict[str, float]:
    """Means over all learned tokens: negative log-likelihood in nats, and the share that are the likeliest next token.

    Empty where no token is learned.
    """
    nll, num_hits, count = 0.0, 0, 0
    for batch in batches:
        placed = place_rows(batch, updater.mesh, 0, {"positions": 1})
        log_probs, hits = (np.asarray(jax.device_get(one)) for one in _scores(updater.rule, params, placed))
        learned = np.asarray(batch.nll_mask)
        nll -= float(log_probs[learned].sum(dtype=np.float64))
        num_hits += int(hits[learned].sum())
        count += int(learned.sum())
    return {"validation_nll": nll / count, "validation_token_accuracy": num_hits / count} if count else {}


@functools.partial(jax.jit, static_argnums=0)
def _scores(rule: UpdateRule, params: Params, batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
    """Log-probs float32 [rows, length] of the completions, and whether each token is the likeliest."""
    model, compute = rule.model, adapt_params(params, rule.dtype)
    table = None if batch.vision is None else model.encode_images(compute, batch.vision)
    hidden = packed_hidden(model, compute, batch.text, table)
    states = take_targets(hidden, batch.target_index, model.mesh)

    def one_place(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """One token of every shard."""
        state, target = inputs
        logits = model.logits(compute, state)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), target[..., None], axis=-1)
        return log_probs[..., 0], jnp.argmax(logits, axis=-1) == target

    chunk = max(1, CHUNK_BYTES // (4 * model.config.vocab))
    found = jax.lax.map(one_place, (states.swapaxes(0, 1), batch.target_ids.swapaxes(0, 1)), batch_size=chunk)
    log_probs, hits = (one.swapaxes(0, 1).reshape(-1)[batch.token_index] for one in found)
    if model.mesh is not None:  # every process wants all of them
        whole = NamedSharding(model.mesh, PartitionSpec())
        log_probs, hits = (jax.lax.with_sharding_constraint(one, whole) for one in (log_probs, hits))
    return log_probs, hits
