"""Attention, defined once: `attend`. What a query may see is a `Mask`; `attention_kernels.py` has faster ways there.

Softmax is in float32 everywhere.
"""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Far below any score, and finite, so that fully masked rows stay numbers in the forward and the backward pass.
MASKED = -1e30


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query of the same row may see, told by structure, because kernels want no [seq, seq] array.

    causal    a query sees no key behind it. Static.
    lengths   int32 [*rows]: rows are padded on the right from there on. None = they are full.
    segments  int32 [*rows, seq]: a query sees the keys of its own segment; 0 = padding. None = all are of one segment.

    All that is given must hold. Padding is not seen, and what it sees is nobody's business: `real` tells it apart.
    """

    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    lengths: Any = None
    segments: Any = None

    def real(self, seq: int) -> Bool[Array, "*rows seq"]:
        """Is there a token; without rows where all are real."""
        real = jnp.ones(seq, bool)
        if self.lengths is not None:
            real = real & (jnp.arange(seq) < self.lengths[..., None])
        return real if self.segments is None else real & (self.segments > 0)

    def dense(self, seq: int) -> Bool[Array, "*rows queries seq"]:
        """As a boolean array, True where a key is seen; one query stands for all where they see the same."""
        seen = self.real(seq)[..., None, :]
        if self.causal:
            places = jnp.arange(seq)
            seen = (places[:, None] >= places[None, :]) & seen
        if self.segments is not None:
            seen = (self.segments[..., :, None] == self.segments[..., None, :]) & seen
        return seen


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Keys before a row's own, of the prompts that its segments go on from.

    key, value      [*rows, prefix, kv_heads, head_dim]
    segments        int32 [*rows, prefix]: which prompt a key belongs to; 0 = padding.
    query_segments  int32 [*rows, seq]: which prompt a query goes on from, and sees all keys of; 0 = none.
    """

    key: Any
    value: Any
    segments: Any
    query_segments: Any

    def dense(self) -> Bool[Array, "*rows queries prefix"]:
        """As a boolean array, True where a key is seen."""
        of_query = self.query_segments[..., :, None]
        return (of_query == self.segments[..., None, :]) & (of_query > 0)


def attend(
    query: Float[Array, "*rows seq heads head_dim"],
    key: Float[Array, "*rows keys kv_heads head_dim"],
    value: Float[Array, "*rows keys kv_heads head_dim"],
    mask: Bool[Array, "*#rows #seq keys"],
) -> Float[Array, "*rows seq heads head_dim"]:
    """Scaled dot-product attention with grouped heads: query head n reads kv head n // (heads / kv_heads).

    `mask` is True where a key may be seen. A query that sees nothing gets uniform weights, not NaN.
    """
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
