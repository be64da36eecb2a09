"""From dimension words to mesh axes: one rule table, two layouts.

*Axis* names a mesh axis, *dimension* an array dimension. The training layout shards weights over `fsdp` and `tensor`;
the sampling layout over `tensor` only, because weights sharded over `fsdp` would be gathered at every decoded token.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rethinker_jax.config import MeshConfig
from rethinker_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))  # batch rows, slots, vision rows

# Words that are not in it (layers, head_dim, rank, patch_dim) stay whole.
TRAINING_RULES: Mapping[str, str] = {
    "d_model": "fsdp",
    "vision_d_model": "fsdp",
    "merged": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "d_ff": "tensor",
    "vision_heads": "tensor",
    "vision_d_ff": "tensor",
    "merged_out": "tensor",
}
SAMPLING_RULES: Mapping[str, str] = {dim: axis for dim, axis in TRAINING_RULES.items() if axis == "tensor"}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over all devices. Raises UserError if the axis sizes do not multiply to their number."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = [config.data, config.fsdp, config.tensor]
    named = ",".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh {named}: wanted axes that multiply to the {len(devices)} visible device(s). "
            "Let one axis be -1 to take what is left, or give `--mesh` alone."
        )
    grid = mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def spec_for(dims: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh, rules: Mapping[str, str]) -> PartitionSpec:
    """Partition of one array by its dimension words. A dimension that its axis does not divide stays whole."""
    axes: list[str | None] = []
    for dim, size in zip(dims, shape, strict=True):
        axis = rules.get(dim)
        fits = axis is not None and size % mesh.shape[axis] == 0 and axis not in axes
        axes.append(axis if fits else None)
    return PartitionSpec(*axes)


def param_shardings(dims: Any, shapes: Any, mesh: Mesh, rules: Mapping[str, str]) -> Any:
    """Shardings for a tree of parameters, from the trees of their dimension words and shapes."""
    return jax.tree.map(
        lambda names, leaf: NamedSharding(mesh, spec_for(names, leaf.shape, mesh, rules)),
        dims,
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def row_shardings(tree: Any, mesh: Mesh, axis: int = 0, axis_of: Mapping[str, int] | None = None) -> Any:
    """Where host arrays belong: rows over (data, fsdp) where they divide evenly, else whole on every device.

    Rows are on `axis`, but for the fields that `axis_of` names (by their last path key).
    """
    shards = row_shards(mesh)

    def sharding(path: tuple[Any, ...], array: np.ndarray) -> NamedSharding:
        rows = (axis_of or {}).get(path[-1].name, axis)
        fits = array.ndim > rows and array.shape[rows] % shards == 0
        return NamedSharding(mesh, PartitionSpec(*[None] * rows, *ROWS) if fits else PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def place_rows(tree: Any, mesh: Mesh, axis: int = 0, axis_of: Mapping[str, int] | None = None) -> Any:
    """Put host arrays on the mesh, where `row_shardings` says."""
    return put(tree, row_shardings(tree, mesh, axis, axis_of))


def put(tree: Any, shardings: Any) -> Any:
    """Host arrays, the same in every process, on the devices; each process puts what its own devices see."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    return jax.tree.map(
        lambda array, sharding: jax.make_array_from_callback(np.shape(array), sharding, np.asarray(array).__getitem__),
        tree,
        shardings,
    )


def shards_here(mesh: Mesh) -> frozenset[int] | None:
    """Of the parts that rows are cut into, those that devices of this process see; None = all."""
    if jax.process_count() == 1:
        return None
    places = np.vectorize(lambda device: device.process_index == jax.process_index())(mesh.devices)
    return frozenset(np.flatnonzero(places.reshape(row_shards(mesh), -1).any(axis=1)).tolist())
