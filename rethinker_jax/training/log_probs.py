"""Log-probabilities and entropies of completions: packed rows → hidden states → chunks of logits → rows of the loss.

No [rows, length, vocab] array exists, and no prompt is run twice.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from rethinker_jax.models.attention import Mask, Prefix
from rethinker_jax.models.attention_kernels import Attention
from rethinker_jax.models.gather import take_rows
from rethinker_jax.models.qwen25vl import Model, Params, head_dims
from rethinker_jax.models.sharding import ROWS, TRAINING_RULES, row_shards, spec_for
from rethinker_jax.training.layout import PackedText, TrainBatch

CHUNK_BYTES = 256 * 2**20  # of float32 logits held at once on a shard


def completion_log_probs(
    model: Model, params: Params, batch: TrainBatch, with_entropy_gradient: bool = True
) -> tuple[Float[Array, "rows length"], Float[Array, "rows length"]]:
    """Log-probs of the batch's completions and entropies of their distributions, float32; 0 behind a completion's end.

    Exact: what a row gets, and what it gives to the gradient, is what it would be with a prompt of its own.
    """
    table = None if batch.vision is None else model.encode_images(params, batch.vision)
    hidden = packed_hidden(model, params, batch.text, table)
    states = jnp.take_along_axis(hidden, batch.target_index[..., None], axis=1)
    found = token_log_probs(model, params, states, batch.target_ids, with_entropy_gradient)
    log_probs, entropy = (jnp.where(batch.completion_mask, x.reshape(-1)[batch.token_index], 0.0) for x in found)
    return log_probs, entropy


def packed_hidden(
    model: Model, params: Params, text: PackedText, table: Float[Array, "merged d_model"] | None
) -> Float[Array, "shards tokens d_model"]:
    """Final hidden states (before the last norm) of each shard's flattened rows."""
    shards = text.token_ids.shape[0]
    x = model.embed(params, text.token_ids.reshape(shards, -1), text.image_index.reshape(shards, -1), table)
    angles = model.angles(text.positions.reshape(3, shards, -1))
    attend = functools.partial(_attend_packed, model.attention, text)
    return model.run_layers(params["text"]["layers"], x, angles, attend)[0]


def _attend_packed(
    attention: Attention, text: PackedText, query: jax.Array, key: jax.Array, value: jax.Array, cache: None
) -> tuple[Float[Array, "shards tokens heads head_dim"], None]:
    shards, rows, _ = text.segments.shape

    def by_rows(x: jax.Array) -> jax.Array:
        return x.reshape(shards * rows, -1, *x.shape[2:])

    prefix = None
    if text.prefix_index.shape[-1]:
        index = text.prefix_index.reshape(shards, -1)
        keys, values = by_rows(jax.vmap(take_rows)(key, index)), by_rows(jax.vmap(take_rows)(value, index))
        prefix = Prefix(
            keys,
            values,
            text.prefix_segments.reshape(shards * rows, -1),
            text.query_segments.reshape(shards * rows, -1),
        )
    mask = Mask(causal=True, segments=text.segments.reshape(shards * rows, -1))
    context = attention(by_rows(query), by_rows(key), by_rows(value), mask, prefix)
    return context.reshape(query.shape), cache


def token_log_probs(
    model: Model,
    params: Params,
    hidden: Float[Array, "shards tokens d_model"],
    targets: Int[Array, "shards tokens"],
    with_entropy_gradient: bool = True,
) -> tuple[Float[Array, "shards tokens"], Float[Array, "shards tokens"]]:
    """Log-probs of `targets` (natural log, full softmax, temperature 1) and the entropy of each distribution, float32.

    `hidden[s, t]` is the state that predicts `targets[s, t]`. Where the mesh cuts rows, each part works on its own
    tokens with a whole head, which is gathered once, and the head's gradient crosses parts once: XLA left alone gathers
    the head, and sums its gradient, in every chunk. Without its gradient the entropy costs nothing backwards.
    """
    head = {"text": {key: params["text"][key] for key in ("norm", "head", "embedding") if key in params["text"]}}
    if "head" in head["text"]:
        del head["text"]["embedding"]
    mesh = model.mesh
    if mesh is None or row_shards(mesh) == 1 or hidden.shape[0] % row_shards(mesh):
        return _chunked_log_probs(model, head, hidden, targets, with_entropy_gradient)
    dims = head_dims(model.config)
    rules = {dim: axis for dim, axis in TRAINING_RULES.items() if axis == "fsdp"}  # `tensor` stays XLA's business
    specs = jax.tree.map(lambda leaf, words: spec_for(words, leaf.shape, mesh, rules), head, dims)

    def own_rows(head: Params, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole = jax.tree.map(_gather, head, specs)
        return _chunked_log_probs(model, whole, hidden, targets, with_entropy_gradient)

    shards = jax.shard_map(
        own_rows, mesh=mesh, in_specs=(specs, ROWS, ROWS), out_specs=ROWS, axis_names={"data", "fsdp"}, check_vma=False
    )
    return shards(head, hidden, targets)


def _gather(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    """All parts of an array that is cut over `fsdp`; backwards, each part gets the sum of what is its own."""
    for axis, name in enumerate(spec):
        if name == "fsdp":
            leaf = jax.lax.all_gather(leaf, name, axis=axis, tiled=True)
    return leaf


def _chunked_log_probs(
    model: Model, head: Params, hidden: jax.Array, targets: jax.Array, with_entropy_gradient: bool
) -> tuple[jax.Array, jax.Array]:
    """`token_log_probs` with a head that is all there. The backward pass recomputes chunks, but for a single one."""
    shards, length, d_model = hidden.shape
    num_chunks = max(1, -(-length * model.config.vocab * 4 // CHUNK_BYTES))
    chunk = -(-length // num_chunks)
    padding = (0, num_chunks * chunk - length)
    hidden = jnp.pad(hidden, ((0, 0), padding, (0, 0))).reshape(shards, num_chunks, chunk, d_model)
    targets = jnp.pad(targets, ((0, 0), padding)).reshape(shards, num_chunks, chunk)

    def one_chunk(head: Params, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # Shards flattened into rows: XLA's CPU backend takes twice as long for the head's gradient otherwise, and for
        # the entropy ten times.
        logits = model.logits(head, inputs[0].reshape(-1, d_model))
        log_z = jax.nn.logsumexp(logits, axis=-1)
        drawn = jnp.take_along_axis(logits, inputs[1].reshape(-1, 1), axis=-1)[:, 0]
        scores, total = (logits, log_z) if with_entropy_gradient else jax.lax.stop_gradient((logits, log_z))
        below = scores - total[:, None]
        found = drawn - log_z, -jnp.sum(jnp.exp(below) * below, axis=-1)
        return found[0].reshape(shards, chunk), found[1].reshape(shards, chunk)

    if num_chunks == 1:  # the backward pass would begin with recomputing it: nothing saved
        log_probs, entropy = one_chunk(head, (hidden[:, 0], targets[:, 0]))
        return log_probs[:, :length], entropy[:, :length]

    # The head's gradient is summed over the chunks in the dtype that it comes in here: in float32.
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), head)

    def narrow_chunk(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return one_chunk(jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), wide, head), inputs)

    chunks = hidden.swapaxes(0, 1), targets.swapaxes(0, 1)
    found = jax.lax.map(jax.checkpoint(narrow_chunk), chunks)
    log_probs, entropy = (x.swapaxes(0, 1).reshape(shards, -1) for x in found)
    return log_probs[:, :length], entropy[:, :length]
