"""Attention, defined once. Softmax in float32; masks are boolean, True where a key may be seen.

A row that may see nothing (padding) gets uniform weights, not NaN; nothing reads it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Far below any score, and finite, so that fully masked rows stay numbers in the forward and the backward pass.
MASKED = -1e30


def attend(
    query: Float[Array, "*rows seq heads head_dim"],
    key: Float[Array, "*rows keys kv_heads head_dim"],
    value: Float[Array, "*rows keys kv_heads head_dim"],
    mask: Bool[Array, "*rows #seq keys"],
) -> Float[Array, "*rows seq heads head_dim"]:
    """Scaled dot-product attention with grouped heads: query head n reads kv head n // (heads / kv_heads)."""
    *rows, seq, heads, head_dim = query.shape
    kv_heads = key.shape[-2]
    group = heads // kv_heads
    # The queries of a group stand in one matrix before their keys: [*rows, kv_heads, group · seq, head_dim].
    grouped = jnp.moveaxis(query.reshape(*rows, seq, kv_heads, group, head_dim), -4, -2)
    grouped = grouped.reshape(*rows, kv_heads, group * seq, head_dim)
    scores = jnp.einsum("...KSH,...TKH->...KST", grouped, key, preferred_element_type=jnp.float32) * head_dim**-0.5
    seen = mask if mask.shape[-2] == 1 else jnp.concatenate([mask] * group, axis=-2)
    weights = jax.nn.softmax(jnp.where(seen[..., None, :, :], scores, MASKED), axis=-1).astype(value.dtype)
    context = jnp.einsum("...KST,...TKH->...KSH", weights, value).reshape(*rows, kv_heads, group, seq, head_dim)
    return jnp.moveaxis(context, -2, -4).reshape(query.shape)
