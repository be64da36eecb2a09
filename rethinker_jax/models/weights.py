"""Weights in and out of Hugging Face safetensors, strict in four ways: unknown, unexpected shape, twice, missing.

A process reads of each tensor the box that its devices hold, once, and gives it to them before it reads the next one:
beyond the parameters the host holds one tensor of the checkpoint. The cast is the host's, in both directions: its
rounding is the same whatever the accelerator does to subnormal numbers.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from safetensors.numpy import save_file

from rethinker_jax.errors import UserError
from rethinker_jax.models.qwen25vl import Params
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.models.safetensors_files import INDEX, SafetensorsDirectory, open_safetensors
from rethinker_jax.models.weight_table import Entry, weight_table

MAX_SHARD_BYTES: int = 4 * 2**30
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Box = tuple[tuple[int, int], ...]  # (start, stop) along each axis


def load_params(
    directory: Path, config: QwenConfig, dtype: Any, shardings: Params | None = None
) -> tuple[QwenConfig, Params]:
    """Read `directory` into parameters of `dtype`, placed by `shardings` (same structure; None = the default device).

    Returns the config too, because the weights decide whether the head is tied. Raises UserError naming key and file.
    """
    with open_safetensors(directory) as files:
        config, files = resolve_head(config, files)
        table = weight_table(config)
        _check_names(files, table)
        params: Params = {}
        for entry in table:
            sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            node = params
            for key in entry.path[:-1]:
                node = node.setdefault(key, {})
            node[entry.path[-1]] = _load_entry(
                files, entry, np.dtype(dtype), sharding if shardings is None else _lookup(shardings, entry.path)
            )
    return config, params


def resolve_head(config: QwenConfig, files: SafetensorsDirectory) -> tuple[QwenConfig, SafetensorsDirectory]:
    """What transformers does about a tied `lm_head`: the config to use, and the tensors to read.

    A different head on disk counts (untied), and to see that every process reads both whole. Where one of the two is
    missing, the other serves. An untied config wants both, as for any tensor.
    """
    where = dict(files.where)
    if not config.tied or HEAD not in where:
        return config, files
    if EMBEDDING in where and not _equal(files, HEAD, EMBEDDING):
        return dataclasses.replace(config, tied=False), files
    head = where.pop(HEAD)
    where.setdefault(EMBEDDING, head)
    return config, dataclasses.replace(files, where=where)


def _equal(files: SafetensorsDirectory, one: str, other: str, rows: int = 4096) -> bool:
    shape = files.where[one].shape
    if shape != files.where[other].shape:
        return False
    parts = [range(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]
    return all(np.array_equal(files.read(one, part), files.read(other, part)) for part in parts)


def _check_names(files: SafetensorsDirectory, table: list[Entry]) -> None:
    wanted = {name: entry.hf_shape for entry in table for name in entry.names}
    missing = sorted(set(wanted) - set(files.where))
    strange = [files.where[name] for name in sorted(set(files.where) - set(wanted))]
    unknown = [f"{stored.name} in {stored.path.name}" for stored in strange]
    if missing or unknown:
        raise UserError(
            f"{files.directory}: the weights are not those that config.json describes.\n"
            + (f"  missing: {_some(missing)}\n" if missing else "")
            + (f"  unknown: {_some(unknown)}\n" if unknown else "")
            + "  Check that config.json and the weights come from the same model."
        )
    for name, shape in wanted.items():
        stored = files.where[name]
        if stored.shape != shape:
            raise UserError(
                f"{stored.path}: tensor {stored.name}: wanted shape {list(shape)} by config.json, came "
                f"{list(stored.shape)}."
            )


def _some(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _lookup(tree: Params, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _load_entry(files: SafetensorsDirectory, entry: Entry, dtype: np.dtype, sharding: Sharding) -> jax.Array:
    if not entry.num_layers:
        return _load_tensor(files, entry, entry.name, dtype, sharding)
    of_layer = sharding
    if isinstance(sharding, NamedSharding):
        assert not sharding.spec or sharding.spec[0] is None, "layers are not cut over the mesh"
        of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stack = jnp.zeros((entry.num_layers, *entry.shape), dtype, device=sharding)
    for layer, name in enumerate(entry.names):
        stack = _set_layer(stack, _load_tensor(files, entry, name, dtype, of_layer), layer)
        jax.block_until_ready(stack)  # else layers that wait for it heap up
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, value: jax.Array, layer: int | jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)


def _load_tensor(
    files: SafetensorsDirectory, entry: Entry, name: str, dtype: np.dtype, sharding: Sharding
) -> jax.Array:
    """One tensor of the checkpoint in our axes, on the devices of this process."""
    devices: dict[Box, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(entry.shape).items():
        assert index is not None
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, entry.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    edges = [list(zip(*sides, strict=True)) for sides in zip(*devices, strict=True)]
    box = tuple((min(starts), max(stops)) for starts, stops in edges)
    block = _read_box(files, entry, name, box)
    arrays = []
    for bounds, holders in devices.items():
        inside = tuple(slice(start - low, stop - low) for (start, stop), (low, _) in zip(bounds, box, strict=True))
        piece = block[inside].astype(dtype, order="C")
        arrays += jax.block_until_ready([jax.device_put(piece, device) for device in holders])
    return jax.make_array_from_single_device_arrays(entry.shape, sharding, arrays)


def _read_box(files: SafetensorsDirectory, entry: Entry, name: str, box: Box) -> np.ndarray:
    """Read the part of one tensor that is `ours[box]`: whole rows or columns from disk, the rest cut in memory."""
    view_box = [box[entry.perm.index(axis)] for axis in range(len(entry.view))]
    part_rows = entry.hf_shape[0] // entry.part[1]
    split = 1 if entry.view[0] == part_rows else 2  # axes of the view that are rows of the matrix
    ranges, shape, cut = [], [], []
    for axes in (range(split), range(split, len(entry.view))):
        inner = math.prod(entry.view[axis] for axis in axes[1:])
        start, stop = view_box[axes[0]] if axes else (0, 1)
        ranges.append(range(start * inner, stop * inner))
        shape += [stop - start, *[entry.view[axis] for axis in axes[1:]]] if axes else []
        cut += [slice(None), *[slice(*view_box[axis]) for axis in axes[1:]]] if axes else []
    first = entry.part[0] * part_rows
    block = files.read(name, range(ranges[0].start + first, ranges[0].stop + first), ranges[1])
    return block.reshape(shape)[tuple(cut)].transpose(entry.perm)


def hf_tensors(config: QwenConfig, params: Params, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (hub name, tensor) of `dtype` for every tensor of the checkpoint, layer by layer.

    With several processes all must take part; each is given every tensor.
    """
    for name, sources in _sources(config).items():
        parts = []
        for entry, layer in sources:
            ours = _fetch(_lookup(params, entry.path), layer).astype(dtype)
            part_shape = (entry.hf_shape[0] // entry.part[1], *entry.hf_shape[1:])
            parts.append(ours.transpose(np.argsort(entry.perm)).reshape(part_shape))
        # The writer takes memory as it lies, and concatenating turned arrays may give a turned one.
        yield name, np.ascontiguousarray(np.concatenate(parts))


def _sources(config: QwenConfig) -> dict[str, list[tuple[Entry, int | None]]]:
    """Hub name → the parameters it is made of, with the layer in a stack; a layer's tensors follow each other."""
    found = [
        (entry, layer if entry.num_layers else None, name)
        for entry in weight_table(config)
        for layer, name in enumerate(entry.names)
    ]
    found.sort(key=lambda source: (source[0].path[0], -1 if source[1] is None else source[1]))
    sources: dict[str, list[tuple[Entry, int | None]]] = {}
    for entry, layer, name in found:
        sources.setdefault(name, []).append((entry, layer))
    return sources


def _fetch(value: jax.Array | np.ndarray, layer: int | None) -> np.ndarray:
    """A parameter, or one layer of it, on the host. What jax keeps of the copy goes with the array made here."""
    if isinstance(value, np.ndarray):
        return value if layer is None else value[layer]
    part = jnp.array(value, copy=True) if layer is None else _take_layer(value, layer)
    return np.asarray(part if part.is_fully_addressable else multihost_utils.process_allgather(part, tiled=True))


@jax.jit
def _take_layer(stack: jax.Array, layer: int | jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)


def checkpoint_bytes(config: QwenConfig, dtype: str) -> int:
    """Bytes of the tensors that `save_params` writes."""
    sizes = {name: math.prod(entry.hf_shape) for entry in weight_table(config) for name in entry.names}
    return sum(sizes.values()) * _numpy_dtype(dtype).itemsize


def _numpy_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def save_params(directory: Path, config: QwenConfig, params: Params, dtype: str) -> None:
    """Write safetensors (sharded with an index above 4 GiB) under the hub's names; the host holds one shard at a time.

    With several processes all must call it; the first one writes.
    """
    np_dtype = _numpy_dtype(dtype)
    shards: list[list[str]] = [[]]
    size = 0
    for name, sources in _sources(config).items():
        nbytes = math.prod(sources[0][0].hf_shape) * np_dtype.itemsize
        if size + nbytes > MAX_SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    tensors = hf_tensors(config, params, np_dtype)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(names, file)
        shard = {name: tensor for name, tensor in (next(tensors) for _ in names) if jax.process_index() == 0}
        if shard:
            save_file(shard, directory / file, metadata={"format": "pt"})
        del shard  # before the next one is gathered
    if len(shards) > 1 and jax.process_index() == 0:
        index = {"metadata": {"total_size": checkpoint_bytes(config, dtype)}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=1))
