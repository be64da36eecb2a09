"""Parameters and training state of a config as shapes with their places on a mesh, without an array."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rethinker_jax.config import Config, MeshConfig
from rethinker_jax.errors import UserError
from rethinker_jax.mesh_spec import mesh_words
from rethinker_jax.models.attention_kernels import choose_attention
from rethinker_jax.models.lora import adapter_layout
from rethinker_jax.models.precision import resolve_dtype
from rethinker_jax.models.qwen25vl import Model, Params, define_model, param_shapes
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.models.sharding import TRAINING_RULES, param_shardings
from rethinker_jax.system import training_shardings


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model on a mesh: its definition, its training parameters as shapes with places, the dtype of computation."""

    config: Config
    qwen: QwenConfig
    mesh: Mesh
    model: Model
    params: Params
    dtype: Any


def lay_out(config: Config, qwen: QwenConfig, mesh: Mesh) -> Layout:
    """Raises UserError where the config asks for an attention kernel that the devices do not have."""
    dtype = resolve_dtype(config.model.dtype, qwen.dtype)
    attention = choose_attention(config.model.attention, qwen, dtype, mesh)
    model = define_model(qwen, config.model.remat, attention, mesh)
    params = placed(param_shapes(qwen), training_shardings(qwen, mesh))
    lora = config.model.lora
    if lora.rank:
        dims, shapes = adapter_layout(qwen, lora.rank, lora.targets, config.model.freeze)
        params["lora"] = placed(shapes, param_shardings(dims, shapes, mesh, TRAINING_RULES))
    return Layout(config, qwen, mesh, model, params, dtype)


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes with places: what a jitted function is lowered with."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
    )


def cast_shapes(params: Params, dtype: Any) -> Params:
    """As `models.precision.cast_params` does with arrays: all but the scales of norms."""

    def cast(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        kept = path[-1].key == "scale" or dtype == jnp.float32
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if kept else dtype, sharding=leaf.sharding)

    return jax.tree_util.tree_map_with_path(cast, params)


def bytes_per_device(tree: Any) -> int:
    """Of the leaves of a tree of placed shapes, on the fullest device; what lies in host memory is not counted."""

    def size(leaf: jax.ShapeDtypeStruct) -> int:
        place: Any = leaf.sharding
        if place.memory_kind == "pinned_host":
            return 0
        return math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def fill_mesh(mesh: MeshConfig, num_devices: int, slices: int = 1) -> MeshConfig:
    """The mesh with its -1 filled in, as `make_mesh` does. Raises UserError where it does not fit the devices."""
    if mesh.data == 1 and mesh.fsdp == -1:
        mesh = dataclasses.replace(mesh, data=slices)
    sizes = mesh.sizes
    rest = math.prod(size for size in sizes.values() if size != -1)
    filled = {axis: num_devices // rest if size == -1 else size for axis, size in sizes.items()}
    if math.prod(filled.values()) != num_devices:
        raise UserError(
            f"mesh {mesh_words(mesh)}: wanted axes that multiply to the {num_devices} devices of the topology."
        )
    return mesh.with_sizes(filled)
