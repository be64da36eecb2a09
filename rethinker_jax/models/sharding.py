"""From dimension words to mesh axes: one rule table, two layouts.

*Axis* names a mesh axis, *dimension* an array dimension. The training layout shards weights over `fsdp`, `context` and
`tensor`; the sampling layout over `tensor` only, because what lies apart would be gathered at every decoded token.

`context` cuts the tokens of the update's packed rows, so that a prompt of many images need not fit one device
(`training/context.py`); for all else (slots of the sampler, images) it is one more axis that cuts rows.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rethinker_jax.config import MeshConfig
from rethinker_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
ROWS = PartitionSpec(("data", "fsdp", "context"))  # slots, vision rows, rows of the loss
SHARDS = PartitionSpec(("data", "fsdp"))  # of packed text
TOKENS = PartitionSpec(*SHARDS, "context")  # of packed text: [shards, tokens, ...]

# Words that are not in it (layers, head_dim, rank, patch_dim) stay whole.
Rules = Mapping[str, tuple[str, ...]]
TRAINING_RULES: Rules = {
    "d_model": ("fsdp", "context"),
    "vision_d_model": ("fsdp", "context"),
    "merged": ("fsdp", "context"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "d_ff": ("tensor",),
    "vision_heads": ("tensor",),
    "vision_d_ff": ("tensor",),
    "merged_out": ("tensor",),
}
SAMPLING_RULES: Rules = {dim: axes for dim, axes in TRAINING_RULES.items() if axes == ("tensor",)}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over all devices. Raises UserError if the axis sizes do not multiply to their number.

    Between TPU slices the network is slow, and only `data` crosses it: its size has to be a multiple of the number of
    slices. Where it is 1 and fsdp takes what is left, as after a bare `--mesh`, it becomes that number.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = num_slices(devices)
    sizes = [config.data, config.fsdp, config.context, config.tensor]
    named = ",".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if config.data == 1 and config.fsdp == -1:
        sizes[0] = slices
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh {named}: wanted axes that multiply to the {len(devices)} visible device(s). "
            "Let one axis be -1 to take what is left, or give `--mesh` alone."
        )
    if slices == 1:
        grid = mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
    else:
        _check_slices(named, sizes, len(devices) // slices, slices)
        inside = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def num_slices(devices: Sequence[jax.Device]) -> int:
    """Of TPUs. What jax calls a slice of GPUs is a host, whose network is fast enough for fsdp."""
    # A TPU of a single slice does not always say which one it is in.
    return len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"} or {0})


def _check_slices(named: str, sizes: Sequence[int], devices_of_slice: int, slices: int) -> None:
    data, _, context, tensor = sizes
    if data % slices == 0:
        return
    if devices_of_slice % (context * tensor):
        context = tensor = 1
    inner = "".join(f",{axis}={size}" for axis, size in (("context", context), ("tensor", tensor)) if size > 1)
    raise UserError(
        f"mesh {named}: these are {slices} slices of {devices_of_slice} devices, and only data may cross the network "
        f"between slices: wanted a data that is a multiple of {slices}, came {data}. "
        f"Try --mesh data={slices},fsdp={devices_of_slice // (context * tensor)}{inner}"
    )


def spec_for(dims: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> PartitionSpec:
    """Partition of one array by its dimension words: of each dimension's axes the first ones that divide it together.

    One that not even the first axis divides stays whole. Behind the first, axes of one device are not named.
    """
    taken: list[str | tuple[str, ...] | None] = []
    used: set[str] = set()
    for dim, size in zip(dims, shape, strict=True):
        wanted = [axis for n, axis in enumerate(rules.get(dim, ())) if n == 0 or mesh.shape[axis] > 1]
        while wanted and (size % math.prod(mesh.shape[axis] for axis in wanted) or used & set(wanted)):
            wanted.pop()
        used |= set(wanted)
        taken.append(tuple(wanted) if len(wanted) > 1 else next(iter(wanted), None))
    return PartitionSpec(*taken)


def param_shardings(dims: Any, shapes: Any, mesh: Mesh, rules: Rules) -> Any:
    """Shardings for a tree of parameters, from the trees of their dimension words and shapes."""
    return jax.tree.map(
        lambda names, leaf: NamedSharding(mesh, spec_for(names, leaf.shape, mesh, rules)),
        dims,
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def row_shards(mesh: Mesh) -> int:
    """Into how many parts slots, images and the rows of a loss are cut."""
    return text_shards(mesh) * mesh.shape["context"]


def text_shards(mesh: Mesh) -> int:
    """Into how many parts, each packed by itself, the text of a batch is cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def kv_repeats(heads: int, kv_heads: int, parts: int) -> int:
    """How often each kv head is repeated, so that `parts` devices each have some with their heads; 0 = not possible."""
    repeats = math.lcm(kv_heads, parts) // kv_heads
    return repeats if heads % (kv_heads * repeats) == 0 else 0


def cut_rows(rows: int, mesh: Mesh) -> PartitionSpec:
    """How so many rows lie: over as many of the axes that cut rows as divide them, else whole on every device."""
    options = {row_shards(mesh): ROWS, text_shards(mesh): SHARDS}
    return next((spec for shards, spec in options.items() if rows % shards == 0), PartitionSpec())


def row_shardings(tree: Any, mesh: Mesh, axis: int = 0, axis_of: Mapping[str, int] | None = None) -> Any:
    """Where host arrays belong, by `cut_rows`; arrays without rows lie whole on every device.

    Rows are on `axis`, but for the fields that `axis_of` names (by their last path key).
    """

    def sharding(path: tuple[Any, ...], array: np.ndarray) -> NamedSharding:
        rows = (axis_of or {}).get(path[-1].name, axis)
        cut = cut_rows(array.shape[rows], mesh) if array.ndim > rows else PartitionSpec()
        return NamedSharding(mesh, PartitionSpec(*[None] * rows, *cut) if cut else PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def place_rows(tree: Any, mesh: Mesh, axis: int = 0, axis_of: Mapping[str, int] | None = None) -> Any:
    """Put host arrays on the mesh, where `row_shardings` says."""
    return put(tree, row_shardings(tree, mesh, axis, axis_of))


@dataclasses.dataclass(frozen=True)
class Parts:
    """Into how many parts a mesh cuts packed text, and images; images_here: those whose pixels this process's devices
    see, None = all."""

    text: int = 1
    images: int = 1
    images_here: frozenset[int] | None = None


WHOLE = Parts()


def parts_of(mesh: Mesh) -> Parts:
    return Parts(text_shards(mesh), row_shards(mesh), shards_here(mesh))


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
