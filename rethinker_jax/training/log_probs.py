"""Log-probabilities and entropies of given tokens, in chunks, so that no [batch, seq, vocab] array exists."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rethinker_jax.models.qwen25vl import Model, Params

CHUNK_BYTES = 256 * 2**20  # of float32 logits held at once


def token_log_probs(
    model: Model, params: Params, hidden: Float[Array, "rows length d_model"], targets: Int[Array, "rows length"]
) -> tuple[Float[Array, "rows length"], Float[Array, "rows length"]]:
    """Log-probs of `targets` (natural log, full softmax, temperature 1) and the entropy of each distribution, float32.

    `hidden[r, t]` is the state that predicts `targets[r, t]`. Chunks are recomputed in the backward pass.
    """
    rows, length, d_model = hidden.shape
    total = rows * length
    num_chunks = max(1, -(-total * model.config.vocab * 4 // CHUNK_BYTES))
    chunk = -(-total // num_chunks)
    padding = num_chunks * chunk - total
    flat_hidden = jnp.pad(hidden.reshape(total, d_model), ((0, padding), (0, 0))).reshape(num_chunks, chunk, d_model)
    flat_targets = jnp.pad(targets.reshape(total), (0, padding)).reshape(num_chunks, chunk)

    def one_chunk(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = model.logits(params, inputs[0])
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
        return jnp.take_along_axis(log_probs, inputs[1][:, None], axis=-1)[:, 0], entropy

    log_probs, entropy = jax.lax.map(jax.checkpoint(one_chunk), (flat_hidden, flat_targets))
    return log_probs.reshape(-1)[:total].reshape(rows, length), entropy.reshape(-1)[:total].reshape(rows, length)
