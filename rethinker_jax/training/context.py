"""The mesh axis `context`: the tokens of an update cut among devices, so that no prompt has to fit one.

All but attention looks at one token at a time, and works on its part of a shard's tokens. Attention wants all tokens,
but its heads know nothing of each other. So devices exchange before it: each gives tokens away and gets heads, and
after it the other way round (Ulysses: Jacobs et al., arXiv 2309.14509, §3). Attention itself, its kernels and prefixes
stay as they are, and under causality all devices have the same to do.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from rethinker_jax.models.sharding import SHARDS, TOKENS, kv_repeats
from rethinker_jax.models.text import Attend
from rethinker_jax.training.layout import PackedText


def cuts_tokens(mesh: Mesh | None) -> bool:
    return mesh is not None and mesh.shape["context"] > 1


def cut_tokens(x: jax.Array, axis: int, mesh: Mesh | None) -> jax.Array:
    """`x` with its tokens, which are on `axis` behind the shards, over `context`: padded with zeros to equal parts."""
    if mesh is None or not cuts_tokens(mesh):
        return x
    widths = [(0, -size % mesh.shape["context"] if n == axis else 0) for n, size in enumerate(x.shape)]
    places = NamedSharding(mesh, PartitionSpec(*[None] * (axis - 1), *TOKENS))
    return jax.lax.with_sharding_constraint(jnp.pad(x, widths), places)


def take_targets(
    hidden: Float[Array, "shards tokens width"], index: Int[Array, "shards targets"], mesh: Mesh | None
) -> Float[Array, "shards targets width"]:
    """The states at these places of each shard's tokens; over `context` they come in equal parts, padded."""
    if mesh is None or not cuts_tokens(mesh):
        return jnp.take_along_axis(hidden, index[..., None], axis=1)
    return _take_targets(hidden, cut_tokens(index, 1, mesh), mesh)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take_targets(hidden: jax.Array, index: jax.Array, mesh: Mesh) -> jax.Array:
    def own(hidden: jax.Array, index: jax.Array) -> jax.Array:
        whole = jax.lax.all_gather(hidden, "context", axis=1, tiled=True)
        return jnp.take_along_axis(whole, index[..., None], axis=1)

    return jax.shard_map(own, mesh=mesh, in_specs=(TOKENS, TOKENS), out_specs=TOKENS, check_vma=False)(hidden, index)


def _targets_forward(hidden: jax.Array, index: jax.Array, mesh: Mesh) -> tuple[jax.Array, tuple[jax.Array, int]]:
    return _take_targets(hidden, index, mesh), (index, hidden.shape[1])


def _targets_backward(
    mesh: Mesh, residuals: tuple[jax.Array, int], gradient: jax.Array
) -> tuple[Float[Array, "shards tokens width"], None]:
    """Each device sends the others what is theirs, and sums what it gets, in float32."""
    index, num_tokens = residuals
    parts = mesh.shape["context"]

    def own(index: jax.Array, gradient: jax.Array) -> jax.Array:
        shards, _, width = gradient.shape
        total = jnp.zeros((shards, num_tokens, width), jnp.float32)
        total = total.at[jnp.arange(shards)[:, None], index].add(gradient.astype(jnp.float32))
        sent = total.astype(gradient.dtype).reshape(shards, parts, num_tokens // parts, width)
        found = jax.lax.all_to_all(sent, "context", split_axis=1, concat_axis=1)
        return found.sum(axis=1, dtype=jnp.float32).astype(gradient.dtype)

    summed = jax.shard_map(own, mesh=mesh, in_specs=(TOKENS, TOKENS), out_specs=TOKENS, check_vma=False)
    return summed(index, gradient), None


_take_targets.defvjp(_targets_forward, _targets_backward)


# (text, query, key, value) of one shard and some heads → context
AttendShard = Callable[[PackedText, jax.Array, jax.Array, jax.Array], jax.Array]


def exchange_heads(attend: AttendShard, text: PackedText, mesh: Mesh) -> Attend:
    """`attend`, which wants all tokens of a shard of `text`, for tokens that lie over `context`.

    Inside, heads are cut over `tensor` and `context`; where there are more devices than kv heads, these are repeated.
    Raises ValueError where the axes do not divide the heads.
    """
    num_tokens = math.prod(text.token_ids.shape[1:])
    parts = mesh.shape["tensor"] * mesh.shape["context"]
    by_token = PartitionSpec(*TOKENS, "tensor")
    text = dataclasses.replace(text, positions=None)  # whose shards are on another axis; attention does not read them

    def own_heads(text: PackedText, *tokens: jax.Array) -> jax.Array:
        def give_tokens(x: jax.Array) -> jax.Array:
            return jax.lax.all_to_all(x, "context", split_axis=2, concat_axis=1, tiled=True)[:, :num_tokens]

        found = attend(text, *map(give_tokens, tokens))
        found = jnp.pad(found, ((0, 0), (0, -num_tokens % mesh.shape["context"]), (0, 0), (0, 0)))
        return jax.lax.all_to_all(found, "context", split_axis=1, concat_axis=2, tiled=True)

    def exchanging(
        query: Float[Array, "shards tokens heads head_dim"], key: jax.Array, value: jax.Array, cache: None
    ) -> tuple[Float[Array, "shards tokens heads head_dim"], None]:
        heads, kv_heads = query.shape[2], key.shape[2]
        copies = kv_repeats(heads, kv_heads, parts)
        if not copies:
            raise ValueError(f"tensor·context = {parts} does not divide {heads} heads over {kv_heads} kv heads")
        key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
        specs = jax.tree.map(lambda _: SHARDS, text), by_token, by_token, by_token
        own = jax.shard_map(own_heads, mesh=mesh, in_specs=specs, out_specs=by_token, check_vma=False)
        return own(text, query, key, value), cache

    return exchanging
