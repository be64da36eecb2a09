"""Splash attention on more than one device: what `test_attention.py` compares, as JSON.

JAX_NUM_CPU_DEVICES=8 python tests/attention_devices.py mesh MODEL_DIRECTORY    # runs, interpreted
python tests/attention_devices.py tpu MODEL_DIRECTORY                           # compiles for TPUs, with libtpu
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rethinker_jax.models.attention import Mask, Prefix
from rethinker_jax.models.attention_kernels import PLAIN, Attention, choose_attention
from rethinker_jax.models.precision import cast_params
from rethinker_jax.models.qwen25vl import Model, Params, define_model, init_params, param_dims, param_shapes
from rethinker_jax.models.qwen_config import QwenConfig, read_config
from rethinker_jax.models.sharding import AXES, ROWS, TRAINING_RULES, param_shardings
from rethinker_jax.prompts.batch import TextBatch
from rethinker_jax.prompts.windows import VisionBatch, VisionGeometry, pack_images
from rethinker_jax.types import ImagePatches

# name: (mesh, rows, heads, kv_heads)
CASES = {
    "divided": ((2, 2, 2), 4, 4, 2),
    "fewer kv heads than tensor": ((1, 2, 4), 4, 8, 2),
    "nothing divides": ((2, 1, 4), 3, 6, 3),
}
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


def named(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def make_mesh(shape: tuple[int, ...], devices: Any) -> Mesh:
    """shape: data, fsdp, tensor."""
    shape = (*shape[:2], 1, shape[2])
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def error(found: Any, wanted: Any) -> float:
    """The largest over a tree, as a part of each leaf's size."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / (np.abs(np.asarray(b)).max() + 1e-9)) for a, b in pairs
    )


def attention_gradients(attention: Attention, arrays: tuple[Any, ...], mask: Mask) -> Any:
    def total(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attention(query, key, value, mask)).astype(jnp.float32))

    return jax.value_and_grad(total, (0, 1, 2))(*arrays)


def gradients_behind(attention: Attention, arrays: tuple[Any, ...], mask: Mask, ids: tuple[Any, Any]) -> Any:
    """Arrays: query, key, value, and the prefix's key and value. Ids: the prefix's, and of the queries' prompts."""

    def total(query: jax.Array, key: jax.Array, value: jax.Array, *prefix: jax.Array) -> jax.Array:
        context = attention(query, key, value, mask, Prefix(*prefix, *ids))
        return jnp.sum(jnp.sin(context).astype(jnp.float32))

    return jax.value_and_grad(total, tuple(range(5)))(*arrays)


def kernel_errors(shape: tuple[int, ...], rows: int, heads: int, kv_heads: int) -> tuple[float, float]:
    """Without a prefix, and behind one."""
    mesh = make_mesh(shape, jax.devices())
    rng = np.random.default_rng(0)
    sizes = (40, heads), (40, kv_heads), (40, kv_heads), (30, kv_heads), (30, kv_heads)
    arrays = tuple(rng.normal(size=(rows, *size, 8)).astype(np.float32) for size in sizes)
    segments, before, prompts = (rng.integers(0, 3, (rows, n)).astype(np.int32) for n in (40, 30, 40))
    mask = Mask(causal=True, segments=segments)
    splash = Attention("splash", mesh, interpret=True)

    def compare(gradients: Any, *arguments: Any) -> float:
        run = jax.jit(gradients, static_argnums=0)
        whole = NamedSharding(mesh, PartitionSpec())
        return error(run(splash, *jax.device_put(arguments, whole)), run(PLAIN, *arguments))

    return (
        compare(attention_gradients, arrays[:3], mask),
        compare(gradients_behind, arrays, mask, (before, prompts)),
    )


def make_batch(config: QwenConfig) -> tuple[TextBatch, VisionBatch]:
    """Four rows of two lengths, each begun by the tokens of an image."""
    vision = config.vision
    geometry = VisionGeometry(vision.patch_size, vision.merge_size, vision.window_size)
    rng = np.random.default_rng(1)
    images = [ImagePatches(rng.normal(size=(h * 4, vision.patch_dim)).astype(np.float32), (1, h, 4)) for h in (4, 6)]
    packed = pack_images(images, geometry, row_multiple=2)
    index = np.full((4, 24), -1, np.int32)
    for row in range(4):
        tokens = packed.merged_index[row % 2]
        index[row, : len(tokens)] = tokens
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), (3, 4, 24)).copy()
    ids, lengths = rng.integers(5, 200, (4, 24)).astype(np.int32), np.array([24, 17, 24, 17], np.int32)
    arrays = packed.patches, packed.hw, packed.segment, packed.valid
    return TextBatch(ids, positions, index, lengths), VisionBatch(*arrays, merged_index=())


def model_gradients(model: Model, dtype: Any, params: Params, text: TextBatch, vision: VisionBatch) -> Any:
    def loss(params: Params) -> jax.Array:
        params = cast_params(params, dtype)
        hidden = model.hidden(params, text, model.encode_images(params, vision))
        real = jnp.arange(hidden.shape[1]) < text.lengths[:, None]
        return jnp.sum(jnp.where(real[..., None], jnp.sin(hidden.astype(jnp.float32)), 0))

    return jax.value_and_grad(loss)(params)


def run_on_a_mesh(config: QwenConfig) -> dict[str, Any]:
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of what this costs
    mesh = make_mesh((2, 2, 2), jax.devices())
    shardings = param_shardings(param_dims(config), param_shapes(config), mesh, TRAINING_RULES)
    drawn, alone = init_params(config, 7, shardings), init_params(config, 7)
    batch = make_batch(config)
    run = jax.jit(model_gradients, static_argnums=(0, 1))
    splash = define_model(config, remat="full", attention=Attention("splash", mesh, interpret=True))
    cudnn = define_model(config, remat="full", attention=Attention("cudnn", mesh, interpret=True))
    placed = jax.device_put(batch, NamedSharding(mesh, PartitionSpec()))
    found, by_cudnn = (run(model, jnp.float32, drawn, *placed) for model in (splash, cudnn))
    wanted = run(define_model(config), jnp.float32, alone, *batch)
    specs = jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, drawn, shardings)
    return {
        "kernel": {name: kernel_errors(*case) for name, case in CASES.items()},
        "model": error(found, wanted),
        "model by cudnn": error(by_cudnn, wanted),
        "init": error(drawn, alone),
        "in their places": all(jax.tree.leaves(specs)),
    }


def count_kernels(config: QwenConfig, mesh: Mesh) -> dict[str, Any]:
    """In compiled programs: text and vision with the head sizes of the published 7B, and the example's whole model."""
    attention = choose_attention("auto", config, jnp.bfloat16, mesh)

    def on(shape: tuple[int, ...], dtype: Any, *spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def arrays(seq: int, sizes: tuple[int, ...], head_dim: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(on((4, seq, n, head_dim), jnp.bfloat16, *ROWS, None, "tensor") for n in sizes)

    def count(function: Any, *arguments: Any) -> int:
        text = jax.jit(function).lower(*arguments).compile().as_text()
        assert text is not None
        return text.count("tpu_custom_call")

    shapes = param_shapes(config)
    shardings = param_shardings(param_dims(config), shapes, mesh, TRAINING_RULES)
    params = jax.tree.map(lambda leaf, place: on(leaf.shape, leaf.dtype, *place.spec), shapes, shardings)
    batch = jax.tree.map(lambda leaf: on(leaf.shape, leaf.dtype), make_batch(config))
    model = define_model(config, remat="full", attention=attention)
    gradients = functools.partial(attention_gradients, attention)
    ids = [on((4, n), jnp.int32, *ROWS) for n in (1024, 600, 1024)]
    behind = (*arrays(1024, (28, 4, 4), 128), *arrays(600, (4, 4), 128)), Mask(True, segments=ids[0]), tuple(ids[1:])
    return {
        "chosen": attention.name,
        "text": count(gradients, arrays(1024, (28, 4, 4), 128), Mask(True, on((4,), jnp.int32, *ROWS))),
        "behind": count(functools.partial(gradients_behind, attention), *behind),
        "vision": count(gradients, arrays(1280, (16, 16, 16), 80), Mask(segments=on((4, 1280), jnp.int32, *ROWS))),
        "model": count(functools.partial(model_gradients, model, jnp.bfloat16), params, *batch),
    }


def compile_for_tpus(config: QwenConfig) -> dict[str, Any]:
    chips = {name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices for name in TOPOLOGIES}
    return {name: count_kernels(config, make_mesh((1, 2, 2), devices)) for name, devices in chips.items()}


if __name__ == "__main__":
    modes = {"mesh": run_on_a_mesh, "tpu": compile_for_tpus}
    print(json.dumps(modes[sys.argv[1]](read_config(Path(sys.argv[2])))))
