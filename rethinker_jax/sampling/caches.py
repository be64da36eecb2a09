"""The key-value caches of the sampler, and attention over several of them at once.

Keys are K-major: a product with a query then reads memory in order.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rethinker_jax.models.attention import MASKED

# One layer: keys [rows, kv_heads, head_dim, length], values [rows, kv_heads, length, head_dim].
LayerCache = tuple[jax.Array, jax.Array]
Caches = list[LayerCache]


def empty_caches(layers: int, rows: int, kv_heads: int, head_dim: int, length: int, dtype: jnp.dtype) -> Caches:
    keys, values = (rows, kv_heads, head_dim, length), (rows, kv_heads, length, head_dim)
    return [(jnp.zeros(keys, dtype), jnp.zeros(values, dtype)) for _ in range(layers)]


def as_cache(key: Float[Array, "rows seq kv_heads head_dim"], value: jax.Array) -> LayerCache:
    """What a layer computed, in the caches' order."""
    return jnp.transpose(key, (0, 2, 3, 1)), jnp.transpose(value, (0, 2, 1, 3))


def write_columns(cache: LayerCache, new: LayerCache, column: jax.Array) -> LayerCache:
    """`cache` with the columns of `new` from `column` on."""
    keys = jax.lax.dynamic_update_slice_in_dim(cache[0], new[0], column, axis=3)
    return keys, jax.lax.dynamic_update_slice_in_dim(cache[1], new[1], column, axis=2)


def copy_row(cache: LayerCache, row: jax.Array, source: LayerCache, source_row: jax.Array) -> LayerCache:
    """`cache` with one row of `source` in place of its own."""

    def copy(mine: jax.Array, theirs: jax.Array) -> jax.Array:
        one = jax.lax.dynamic_slice_in_dim(theirs, source_row, 1)
        return jax.lax.dynamic_update_slice_in_dim(mine, one, row, axis=0)

    return copy(cache[0], source[0]), copy(cache[1], source[1])


def copy_turned(
    cache: LayerCache, row: jax.Array, source: LayerCache, source_row: jax.Array, turn: jax.Array
) -> LayerCache:
    """`cache` with a row of `source`, whose column j comes to column (j + turn) modulo the longer of both lengths.

    What lies behind the end of a shorter `cache` then is left out.
    """

    def copy(mine: jax.Array, theirs: jax.Array, axis: int) -> jax.Array:
        one = jax.lax.dynamic_slice_in_dim(theirs, source_row, 1)
        length, missing = mine.shape[axis], mine.shape[axis] - theirs.shape[axis]
        if missing > 0:
            one = jnp.pad(one, [(0, missing if place == axis else 0) for place in range(4)])
        one = jax.lax.slice_in_dim(jnp.roll(one, turn, axis=axis), 0, length, axis=axis)
        return jax.lax.dynamic_update_slice_in_dim(mine, one, row, axis=0)

    return copy(cache[0], source[0], 3), copy(cache[1], source[1], 2)


def attend_caches(
    query: Float[Array, "rows kv_heads queries head_dim"], *caches: tuple[jax.Array, jax.Array, jax.Array]
) -> Float[Array, "rows kv_heads queries head_dim"]:
    """One softmax over several caches of (K-major keys, values, seen [rows, 1 or queries, length]); float32.

    Nothing is concatenated, and contexts are divided by the softmax's sum instead of the weights: the decode step is
    bound by the memory that it reads and writes.
    """
    scale = query.shape[-1] ** -0.5
    scores = []
    for keys, _, seen in caches:
        score = jnp.einsum("BKQH,BKHL->BKQL", query, keys, preferred_element_type=jnp.float32) * scale
        scores.append(jnp.where(seen[:, None], score, MASKED))
    top = functools.reduce(jnp.maximum, [score.max(axis=-1, keepdims=True) for score in scores])
    weights = [jnp.exp(score - top) for score in scores]
    total = sum(weight.sum(axis=-1, keepdims=True) for weight in weights)
    contexts = [
        jnp.einsum("BKQL,BKLH->BKQH", weight.astype(values.dtype), values, preferred_element_type=jnp.float32)
        for weight, (_, values, _) in zip(weights, caches, strict=True)
    ]
    return sum(contexts[1:], contexts[0]) / total


def by_kv_heads(
    query: Float[Array, "rows seq heads head_dim"], kv_heads: int
) -> Float[Array, "rows kv_heads group_seq head_dim"]:
    """The queries of a kv head together, group-major: what `attend_caches` takes."""
    rows, seq, heads, head_dim = query.shape
    grouped = query.reshape(rows, seq, kv_heads, heads // kv_heads, head_dim)
    return jnp.transpose(grouped, (0, 2, 3, 1, 4)).reshape(rows, kv_heads, -1, head_dim)


def by_heads(
    context: Float[Array, "rows kv_heads group_seq head_dim"], seq: int
) -> Float[Array, "rows seq heads head_dim"]:
    """`by_kv_heads` undone."""
    rows, kv_heads, _, head_dim = context.shape
    grouped = context.reshape(rows, kv_heads, -1, seq, head_dim)
    return jnp.transpose(grouped, (0, 3, 1, 2, 4)).reshape(rows, seq, -1, head_dim)
