"""Weights in and out of Hugging Face safetensors, strict in four ways: unknown, unexpected shape, twice, missing.

Each process reads only the slices that its devices hold.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rethinker_jax.errors import UserError
from rethinker_jax.models.qwen25vl import Params
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.models.weight_table import Entry, canonical_name, weight_table

MAX_SHARD_BYTES = 4 * 2**30
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened directory of safetensors: canonical name → (file, name in the file)."""

    directory: Path
    where: Mapping[str, tuple[Path, str]]
    handles: Mapping[Path, Any]

    def read(self, name: str, rows: slice, columns: slice | None) -> np.ndarray:
        path, raw_name = self.where[name]
        lazy = self.handles[path].get_slice(raw_name)
        return lazy[rows] if columns is None else lazy[rows, columns]

    def read_all(self, name: str) -> np.ndarray:
        path, raw_name = self.where[name]
        return self.handles[path].get_tensor(raw_name)


@contextlib.contextmanager
def open_checkpoint(directory: Path) -> Generator[Checkpoint, None, None]:
    """Open every *.safetensors of `directory`. Raises UserError for none, a damaged one, a name twice, a lost file."""
    files = sorted(directory.glob("*.safetensors"))
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        listed = _listed_files(index)
        lost = sorted(path.name for path in listed if not path.is_file())
        if lost:
            raise UserError(
                f"{index}: it names {', '.join(lost)}, which {directory} does not hold. Copy the missing shards."
            )
        files = sorted(listed)
    if not files:
        raise UserError(f"{directory}: wanted *.safetensors, found none. Name the directory with the weights.")
    where: dict[str, tuple[Path, str]] = {}
    with contextlib.ExitStack() as stack:
        handles = {}
        for path in files:
            try:
                handles[path] = stack.enter_context(safe_open(path, framework="np"))
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path}: cannot be read as safetensors ({error}). The file is cut or damaged: copy it again."
                ) from error
            for raw_name in handles[path].keys():  # noqa: SIM118 (not a dict)
                name = canonical_name(raw_name)
                if name in where:
                    raise UserError(
                        f"{path}: tensor {raw_name} is there twice; the other is {where[name][1]} in "
                        f"{where[name][0].name}."
                    )
                where[name] = (path, raw_name)
        yield Checkpoint(directory, where, handles)


def _listed_files(index: Path) -> set[Path]:
    try:
        return {index.parent / file for file in json.loads(index.read_text())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index}: wanted JSON with a weight_map of names to files, came something else ({error!r}). "
            "The file is cut or damaged: copy it again."
        ) from error


def _check_names(checkpoint: Checkpoint, config: QwenConfig, table: list[Entry]) -> None:
    wanted = {name: entry.hf_shape for entry in table for name in entry.names}
    missing = sorted(set(wanted) - set(checkpoint.where))
    unknown = sorted(set(checkpoint.where) - set(wanted))
    if missing or unknown:
        raise UserError(
            f"{checkpoint.directory}: the weights are not those that config.json describes.\n"
            + (f"  missing: {_some(missing)}\n" if missing else "")
            + (
                f"  unknown: {_some([f'{checkpoint.where[n][1]} in {checkpoint.where[n][0].name}' for n in unknown])}\n"
                if unknown
                else ""
            )
            + "  Check that config.json and the weights come from the same model."
        )
    for name, shape in wanted.items():
        path, raw_name = checkpoint.where[name]
        found = tuple(checkpoint.handles[path].get_slice(raw_name).get_shape())
        if found != shape:
            raise UserError(
                f"{path}: tensor {raw_name}: wanted shape {list(shape)} by config.json, came {list(found)}."
            )
        dtype = checkpoint.handles[path].get_slice(raw_name).get_dtype()
        if dtype not in FLOAT_TYPES:
            raise UserError(
                f"{path}: tensor {raw_name}: wanted one of {', '.join(FLOAT_TYPES)}, came {dtype}. Quantised "
                "checkpoints cannot be trained: take the original one."
            )


def _some(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def resolve_head(config: QwenConfig, checkpoint: Checkpoint) -> tuple[QwenConfig, bool]:
    """What transformers does about `lm_head`: the config to use, and whether the head is read from the embedding.

    Tied config and a different head on disk: the head counts (untied). Untied config without a head: it takes the
    embedding.
    """
    has_head = "lm_head.weight" in checkpoint.where
    if config.tied and has_head:
        head, embedding = (checkpoint.read_all(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        if not np.array_equal(head, embedding):
            return dataclasses.replace(config, tied=False), False
    return config, not config.tied and not has_head


def load_params(
    directory: Path, config: QwenConfig, dtype: Any, shardings: Params | None = None
) -> tuple[QwenConfig, Params]:
    """Read `directory` into parameters of `dtype`, placed by `shardings` (same structure; None = the default device).

    Returns the config too, because the weights decide whether the head is tied. Raises UserError naming key and file.
    """
    with open_checkpoint(directory) as checkpoint:
        config, head_from_embedding = resolve_head(config, checkpoint)
        table = weight_table(config)
        where = dict(checkpoint.where)
        if head_from_embedding:
            where["lm_head.weight"] = where["model.embed_tokens.weight"]
        elif config.tied:
            where.pop("lm_head.weight", None)
        checkpoint = dataclasses.replace(checkpoint, where=where)
        _check_names(checkpoint, config, table)
        params: Params = {}
        for entry in table:
            sharding = None if shardings is None else _lookup(shardings, entry.path)
            node = params
            for key in entry.path[:-1]:
                node = node.setdefault(key, {})
            node[entry.path[-1]] = _load_entry(checkpoint, entry, dtype, sharding)
    return config, params


def _lookup(tree: Params, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _load_entry(checkpoint: Checkpoint, entry: Entry, dtype: Any, sharding: Sharding | None) -> jax.Array:
    shape = (entry.num_layers, *entry.shape) if entry.num_layers else entry.shape

    def callback(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        if not entry.num_layers:
            return _read_slice(checkpoint, entry, entry.name, index).astype(dtype)
        layers = entry.names[index[0]]
        return np.stack([_read_slice(checkpoint, entry, name, index[1:]).astype(dtype) for name in layers])

    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.make_array_from_callback(shape, sharding, callback, dtype=dtype)


def _read_slice(checkpoint: Checkpoint, entry: Entry, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """Read the part of one tensor that becomes `ours[index]`: contiguous rows and columns first, the rest in memory."""
    index = (*index, *[slice(None)] * (len(entry.shape) - len(index)))
    view_index = [slice(0, 0)] * len(entry.view)
    for ours, theirs in enumerate(entry.perm):
        start, stop, _ = index[ours].indices(entry.view[theirs])
        view_index[theirs] = slice(start, stop)
    hf_shape = (entry.hf_shape[0] // entry.part[1], math.prod(entry.hf_shape[1:]))
    if len(entry.hf_shape) > 2:  # the patch embedding: never worth slicing
        view = checkpoint.read_all(name).reshape(entry.view)
        return view[tuple(view_index)].transpose(entry.perm)
    rows_axes = 1 if entry.view[0] == hf_shape[0] else 2
    groups = [range(rows_axes), range(rows_axes, len(entry.view))]
    bounds, shape = [], []
    for axes in groups:
        if len(axes) == 0:
            continue
        inner = math.prod(entry.view[axis] for axis in axes[1:])
        first = view_index[axes[0]]
        bounds.append(slice(first.start * inner, first.stop * inner))
        shape += [first.stop - first.start, *[entry.view[axis] for axis in axes[1:]]]
        view_index[axes[0]] = slice(None)
    offset = entry.part[0] * hf_shape[0]
    rows = slice(bounds[0].start + offset, bounds[0].stop + offset)
    block = checkpoint.read(name, rows, bounds[1] if len(bounds) > 1 else None)
    return block.reshape(shape)[tuple(view_index)].transpose(entry.perm)


def hf_tensors(config: QwenConfig, params: Params, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (hub name, tensor) of `dtype` for every tensor of the checkpoint, in the table's order."""
    fused: dict[str, list[np.ndarray]] = {}
    for entry in weight_table(config):
        value = _lookup(params, entry.path)
        inverse = np.argsort(entry.perm)
        for layer, name in enumerate(entry.names):
            ours = np.asarray(value[layer] if entry.num_layers else value).astype(dtype)
            part_shape = (entry.hf_shape[0] // entry.part[1], *entry.hf_shape[1:])
            theirs = ours.transpose(inverse).reshape(part_shape)
            if entry.part[1] == 1:
                yield name, theirs
                continue
            parts = fused.setdefault(name, [])
            parts.append(theirs)
            if len(parts) == entry.part[1]:
                yield name, np.concatenate(fused.pop(name))


def save_params(directory: Path, config: QwenConfig, params: Params, dtype: str) -> None:
    """Write safetensors (sharded with an index above 4 GiB) under the hub's names."""
    np_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    shards: list[dict[str, np.ndarray]] = [{}]
    size = total = 0
    for name, tensor in hf_tensors(config, params, np_dtype):
        if size + tensor.nbytes > MAX_SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = np.ascontiguousarray(tensor)
        size += tensor.nbytes
        total += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
