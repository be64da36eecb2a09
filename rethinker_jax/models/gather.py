"""Rows of an array by number, with a gradient that does not lose small parts in 16 bits."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from rethinker_jax.models.sharding import ROWS, TOKENS, row_shards

# (table, index, the dimension words of the table) → rows of the table
Take = Callable[[jax.Array, jax.Array, tuple[str, str]], jax.Array]


@jax.custom_vjp
def take_rows(table: Float[Array, "rows *rest"], index: Int[Array, "*taken"]) -> Float[Array, "..."]:
    """`table[index]`. What comes back to a row that was taken often is summed in float32, and rounded once."""
    return table[index]


def _forward(table: jax.Array, index: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return table[index], (index, jnp.zeros((table.shape[0], 0), table.dtype))  # its size and dtype, without the table


def _backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None]:
    index, like = residuals
    zeros = jnp.zeros((like.shape[0], *gradient.shape[index.ndim :]), jnp.float32)
    return zeros.at[index].add(gradient.astype(jnp.float32)).astype(like.dtype), None


take_rows.defvjp(_forward, _backward)


def take_whole(table: jax.Array, index: jax.Array, words: tuple[str, str]) -> jax.Array:
    """As a `Take`, of tables that every device has. Only rows of a vocabulary are taken often."""
    return take_rows(table, index) if words[0] == "vocab" else table[index]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def take_cut_rows(
    table: Float[Array, "rows width"], index: Int[Array, "shards taken"], mesh: Mesh, spec: PartitionSpec
) -> Float[Array, "shards taken width"]:
    """`take_rows` of a table that lies on the mesh by `spec`, for shards whose places lie over `context`.

    Each device takes from its part of the table what all those want that have the other columns, and they exchange what
    they took. Left to XLA, the gradients of all shards would be gathered on every device.
    """
    columns, rows = _names(spec, 1, mesh), _names(spec, 0, mesh)

    def own(table: jax.Array, index: jax.Array) -> jax.Array:
        place = _wanted(index, columns) - _first(rows, table.shape[0])
        here = (place >= 0) & (place < table.shape[0])
        found = jnp.where(here[..., None], table[jnp.clip(place, 0, table.shape[0] - 1)], 0)
        if columns:
            found = jax.lax.all_to_all(found, columns, split_axis=0, concat_axis=3, tiled=True)
        return jax.lax.psum(found[0], rows) if rows else found[0]

    specs = spec, TOKENS
    return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=TOKENS, check_vma=False)(table, index)


def turn_table(table: Float[Array, "rows width"], mesh: Mesh, columns: PartitionSpec) -> Float[Array, "rows width"]:
    """A table that was made in rows, over all axes that cut rows, as it is cut by columns for `take_cut_rows`.

    XLA would make it whole on the way where `data` cuts it too. Left to it is what the axes do not divide.
    """
    names = _names(columns, 1, mesh)
    if names != tuple(name for name in ROWS[0][1:] if mesh.shape[name] > 1) or table.shape[0] % row_shards(mesh):
        return table

    def own(table: jax.Array) -> jax.Array:
        if names:
            table = jax.lax.all_to_all(table, names, split_axis=1, concat_axis=0, tiled=True)
        return jax.lax.all_gather(table, "data", axis=0, tiled=True) if mesh.shape["data"] > 1 else table

    return jax.shard_map(own, mesh=mesh, in_specs=ROWS, out_specs=columns, check_vma=False)(table)


def _cut_forward(
    table: jax.Array, index: jax.Array, mesh: Mesh, spec: PartitionSpec
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return take_cut_rows(table, index, mesh, spec), (index, jnp.zeros((table.shape[0], 0), table.dtype))


def _cut_backward(
    mesh: Mesh, spec: PartitionSpec, residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None]:
    index, like = residuals
    columns, rows = _names(spec, 1, mesh), _names(spec, 0, mesh)
    size = like.shape[0] // _size(mesh, rows)
    others = tuple(name for name in mesh.axis_names if name not in (*columns, "tensor") and mesh.shape[name] > 1)

    def own(index: jax.Array, gradient: jax.Array) -> jax.Array:
        wanted = _wanted(index, columns)
        parts = gradient[None]
        if columns:
            parts = jax.lax.all_to_all(parts, columns, split_axis=3, concat_axis=0, tiled=True)
        place = wanted - _first(rows, size)
        place = jnp.where((place >= 0) & (place < size), place, size)  # behind the end: dropped
        total = jnp.zeros((size, parts.shape[-1]), jnp.float32).at[place].add(parts.astype(jnp.float32), mode="drop")
        return (jax.lax.psum(total, others) if others else total).astype(like.dtype)

    specs = TOKENS, TOKENS
    return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(index, gradient), None


take_cut_rows.defvjp(_cut_forward, _cut_backward)


def _names(spec: PartitionSpec, dimension: int, mesh: Mesh) -> tuple[str, ...]:
    """The axes that cut a dimension. One of a single device cuts nothing, and libtpu fails at collectives in it."""
    named = spec[dimension] if dimension < len(spec) else None
    names = (named,) if isinstance(named, str) else tuple(named or ())
    return tuple(name for name in names if mesh.shape[name] > 1)


def _size(mesh: Mesh, names: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _wanted(index: jax.Array, columns: tuple[str, ...]) -> Int[Array, "parts shards taken"]:
    """What is wanted by all those that have other columns of the same rows."""
    return jax.lax.all_gather(index, columns) if columns else index[None]


def _first(rows: tuple[str, ...], size: int) -> jax.Array | int:
    return jax.lax.axis_index(rows) * size if rows else 0
