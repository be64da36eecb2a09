"""Log-probabilities and entropies of completions: packed rows → hidden states → chunks of logits → rows of the loss.

No [rows, length, vocab] array exists, and no prompt is run twice.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from rethinker_jax.models.attention import Mask, Prefix
from rethinker_jax.models.attention_kernels import Attention
from rethinker_jax.models.gather import Take, take_cut_rows, take_rows, take_whole, turn_table
from rethinker_jax.models.qwen25vl import Model, Params, head_dims
from rethinker_jax.models.sharding import TOKENS, TRAINING_RULES, spec_for, text_shards
from rethinker_jax.training.context import cut_tokens, cuts_tokens, exchange_heads, take_targets
from rethinker_jax.training.layout import PackedText, TrainBatch

CHUNK_BYTES: int = 256 * 2**20  # of float32 logits held at once on a shard


def completion_log_probs(
    model: Model, params: Params, batch: TrainBatch, with_entropy_gradient: bool = True
) -> tuple[Float[Array, "rows length"], Float[Array, "rows length"]]:
    """Log-probs of the batch's completions and entropies of their distributions, float32; 0 behind a completion's end.

    Exact: what a row gets, and what it gives to the gradient, is what it would be with a prompt of its own.
    """
    table = None if batch.vision is None else model.encode_images(params, batch.vision)
    hidden = packed_hidden(model, params, batch.text, table)
    states = take_targets(hidden, batch.target_index, model.mesh)
    found = token_log_probs(model, params, states, batch.target_ids, with_entropy_gradient)
    log_probs, entropy = (jnp.where(batch.completion_mask, x.reshape(-1)[batch.token_index], 0.0) for x in found)
    return log_probs, entropy


def packed_hidden(
    model: Model, params: Params, text: PackedText, table: Float[Array, "merged d_model"] | None
) -> Float[Array, "shards tokens d_model"]:
    """Final hidden states (before the last norm) of each shard's flattened rows, padded where `context` cuts them."""
    shards, mesh = text.token_ids.shape[0], model.mesh
    ids, image_index = (cut_tokens(x.reshape(shards, -1), 1, mesh) for x in (text.token_ids, text.image_index))
    x = cut_tokens(model.embed(params, ids, image_index, table, _taker(mesh, shards)), 1, mesh)
    angles = model.angles(cut_tokens(text.positions.reshape(3, shards, -1), 2, mesh))
    if mesh is not None and cuts_tokens(mesh):
        one = dataclasses.replace(model.attention, mesh=None)
        attend = exchange_heads(functools.partial(_attend_packed, one), text, mesh)
    else:
        attend = functools.partial(_attend_shards, model.attention, text)
    return model.run_layers(params["text"]["layers"], x, angles, attend)[0]


def _taker(mesh: Mesh | None, shards: int) -> Take:
    """How rows are taken from the embedding and from the images' table: on a mesh both are cut by columns."""
    if mesh is None or mesh.size == 1 or shards % text_shards(mesh):
        return take_whole

    def take(table: jax.Array, index: jax.Array, words: tuple[str, str]) -> jax.Array:
        spec = spec_for(words, table.shape, mesh, TRAINING_RULES)
        if words[0] == "images":
            table = turn_table(table, mesh, spec)
        return take_cut_rows(table, index, mesh, spec)

    return take


def _attend_shards(
    attention: Attention, text: PackedText, query: jax.Array, key: jax.Array, value: jax.Array, cache: None
) -> tuple[Float[Array, "shards tokens heads head_dim"], None]:
    return _attend_packed(attention, text, query, key, value), cache


def _attend_packed(
    attention: Attention, text: PackedText, query: jax.Array, key: jax.Array, value: jax.Array
) -> Float[Array, "shards tokens heads head_dim"]:
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
    return context.reshape(query.shape)


def token_log_probs(
    model: Model,
    params: Params,
    hidden: Float[Array, "shards tokens d_model"],
    targets: Int[Array, "shards tokens"],
    with_entropy_gradient: bool = True,
) -> tuple[Float[Array, "shards tokens"], Float[Array, "shards tokens"]]:
    """Log-probs of `targets` (natural log, full softmax, temperature 1) and the entropy of each distribution, float32.

    `hidden[s, t]` is the state that predicts `targets[s, t]`. On a mesh each part works on its own tokens and, over
    `tensor`, its own words; the head is gathered over the other axes once, and its gradient crosses once. Left to XLA,
    both would happen in every chunk. Without its gradient the entropy costs nothing backwards.
    """
    head = {"text": {key: params["text"][key] for key in ("norm", "head", "embedding") if key in params["text"]}}
    if "head" in head["text"]:
        del head["text"]["embedding"]
    # In float32, so that the head's gradient is summed over chunks and parts before it is rounded.
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), head)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, head)
    mesh = model.mesh
    if mesh is None or mesh.size == 1 or hidden.shape[0] % text_shards(mesh):
        return _chunked_log_probs(model, wide, dtypes, hidden, targets, with_entropy_gradient)
    specs = jax.tree.map(
        lambda leaf, words: spec_for(words, leaf.shape, mesh, TRAINING_RULES), head, head_dims(model.config)
    )
    over = "tensor" if any("tensor" in spec for spec in jax.tree.leaves(specs)) else None

    def own_part(head: Params, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole = jax.tree.map(_whole, head, dtypes, specs)
        return _chunked_log_probs(model, whole, dtypes, hidden, targets, with_entropy_gradient, over)

    parts = jax.shard_map(own_part, mesh=mesh, in_specs=(specs, TOKENS, TOKENS), out_specs=TOKENS, check_vma=False)
    found = parts(wide, cut_tokens(hidden, 1, mesh), cut_tokens(targets, 1, mesh))
    return found[0][:, : targets.shape[1]], found[1][:, : targets.shape[1]]


def _whole(leaf: jax.Array, dtype: Any, spec: PartitionSpec) -> jax.Array:
    """All parts of an array that is cut by `spec`, but for those over `tensor`."""
    for axis, names in enumerate(spec):
        if names is not None and names != "tensor":
            leaf = _gather(leaf, axis, names, dtype)
    return leaf


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(leaf: jax.Array, axis: int, names: str | tuple[str, ...], dtype: Any) -> jax.Array:
    """The parts travel in `dtype`; backwards, each part gets the sum of what is its own, in float32."""
    return jax.lax.all_gather(leaf.astype(dtype), names, axis=axis, tiled=True).astype(jnp.float32)


def _gather_forward(leaf: jax.Array, axis: int, names: str | tuple[str, ...], dtype: Any) -> tuple[jax.Array, None]:
    return _gather(leaf, axis, names, dtype), None


def _gather_backward(
    axis: int, names: str | tuple[str, ...], _: Any, residuals: None, gradient: jax.Array
) -> tuple[jax.Array]:
    return (jax.lax.psum_scatter(gradient, names, scatter_dimension=axis, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)


def _chunked_log_probs(
    model: Model,
    wide: Params,
    dtypes: Any,
    hidden: jax.Array,
    targets: jax.Array,
    with_entropy_gradient: bool,
    over: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`token_log_probs` of one part, with a head in float32 that is used in `dtypes`; `over`: the axis that cuts its
    vocabulary. The backward pass recomputes chunks, but for a single one.
    """
    shards, length, d_model = hidden.shape
    num_chunks = max(1, -(-length * model.config.vocab * 4 // CHUNK_BYTES))
    chunk = -(-length // num_chunks)
    padding = (0, num_chunks * chunk - length)
    hidden = jnp.pad(hidden, ((0, 0), padding, (0, 0))).reshape(shards, num_chunks, chunk, d_model)
    targets = jnp.pad(targets, ((0, 0), padding)).reshape(shards, num_chunks, chunk)

    def one_chunk(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        head = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), wide, dtypes)
        # Shards flattened into rows: XLA's CPU backend takes twice as long for the head's gradient otherwise, and for
        # the entropy ten times.
        logits = model.logits(head, inputs[0].reshape(-1, d_model))
        log_z = _log_sum(logits, over)
        drawn = _pick(logits, inputs[1].reshape(-1), over)
        scores, total = (logits, log_z) if with_entropy_gradient else jax.lax.stop_gradient((logits, log_z))
        below = scores - total[:, None]
        entropy = -_sum(jnp.sum(jnp.exp(below) * below, axis=-1), over)
        return (drawn - log_z).reshape(shards, chunk), entropy.reshape(shards, chunk)

    if num_chunks == 1:  # the backward pass would begin with recomputing it: nothing saved
        log_probs, entropy = one_chunk((hidden[:, 0], targets[:, 0]))
    else:
        chunks = hidden.swapaxes(0, 1), targets.swapaxes(0, 1)
        found = jax.lax.map(jax.checkpoint(one_chunk), chunks)
        log_probs, entropy = (x.swapaxes(0, 1).reshape(shards, -1) for x in found)
    return log_probs[:, :length], entropy[:, :length]


def _sum(values: jax.Array, over: str | None) -> jax.Array:
    return values if over is None else jax.lax.psum(values, over)


def _log_sum(logits: Float[Array, "tokens vocab"], over: str | None) -> Float[Array, " tokens"]:
    """log Σ exp over the vocabulary, of which `logits` are a part where it is cut."""
    if over is None:
        return jax.nn.logsumexp(logits, axis=-1)
    top = jax.lax.pmax(jax.lax.stop_gradient(logits.max(axis=-1)), over)
    return top + jnp.log(_sum(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1), over))


def _pick(
    logits: Float[Array, "tokens vocab"], targets: Int[Array, " tokens"], over: str | None
) -> Float[Array, " tokens"]:
    """The logit of each target, from the part that has it."""
    if over is None:
        return jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    size = logits.shape[-1]
    place = targets - jax.lax.axis_index(over) * size
    found = jnp.take_along_axis(logits, jnp.clip(place, 0, size - 1)[:, None], axis=-1)[:, 0]
    return _sum(jnp.where((place >= 0) & (place < size), found, 0.0), over)
