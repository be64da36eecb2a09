"""Checksums of arrays, the same on every mesh: do bytes that come back from a disk say what was written?

What orbax writes is compressed without a checksum of its own, so a flipped bit can come back as another number.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rethinker_jax.training.offload import is_on_host

Described = dict[str, list[Any]]  # name → [dtype, shape, checksum]
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes of an element


def describe_tree(tree: Any) -> Described:
    """Of every array of a tree, on devices, by its path. With several processes all must call it.

    The checksum is Σ (2i + 1) · bits of element i, modulo 2³²: a sum of whole numbers, which shards may add in any
    order, and any one element that differs changes it, as its weight is odd. Of larger damage one in 2³² is missed.
    """
    named = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in named]
    leaves = [leaf for _, leaf in named]
    if not leaves:
        return {}
    places = [leaf.sharding for leaf in leaves if isinstance(leaf, jax.Array)]
    meshes = [place.mesh for place in places if isinstance(place, NamedSharding)]
    whole = NamedSharding(meshes[0], PartitionSpec()) if meshes else None  # every process reads the result
    sums = np.asarray(jax.jit(_checksums, out_shardings=whole)(leaves))
    return {
        name: [str(leaf.dtype), list(leaf.shape), int(found)]
        for name, leaf, found in zip(names, leaves, sums, strict=True)
    }


def expected_of(tree: Any) -> dict[str, list[Any]]:
    """Name → [dtype, shape] of the arrays, or shapes, of a tree."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): [str(leaf.dtype), list(leaf.shape)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def describe_arrays(arrays: Mapping[str, np.ndarray]) -> Described:
    """The same of arrays on the host, with the CRC-32 of their bytes."""
    return {name: [str(array.dtype), list(array.shape), zlib.crc32(array.tobytes())] for name, array in arrays.items()}


def hash_of_json(value: Any) -> str:
    """SHA-256 of a JSON value, however it is laid out in a file."""
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _checksums(leaves: list[jax.Array]) -> jax.Array:
    """uint32 [leaves]. Arrays in host memory are fetched one after the other, so that one at a time takes room."""
    found: list[jax.Array] = []
    for leaf in leaves:
        if is_on_host(leaf):
            waited, _ = jax.lax.optimization_barrier((leaf, found[-1:]))
            leaf = jax.device_put(waited, jax.memory.Space.Device)
        found.append(_checksum(leaf))
    return jnp.stack(found)


def _checksum(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, _UNSIGNED[leaf.dtype.itemsize]).astype(jnp.uint32)
    number, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        place = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        number += place * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[axis]
    return jnp.sum(bits * (2 * number + 1), dtype=jnp.uint32)
