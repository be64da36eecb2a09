"""Low-rank adapters (LoRA, Hu et al. 2021, §4.1): a kernel W becomes W + scale · A · B, and only A and B are trained.

Adapters are the subtree `lora` of the parameters: `scale` = alpha / rank, and {"a", "b"} at the path of each adapted
kernel. A is [*inputs, rank] and B is [rank, *outputs], behind `layers` where the kernel is stacked. B begins at zero.

The trainer makes the sum, in float32, and rounds it as the sampler and an export do: in bfloat16 x·W + x·A·B would be
another policy than the one that drew the samples, since small A·B are lost when they are merged. The sum of one layer
exists at a time, with its gradient; the price is that a frozen kernel's gradient is computed on the way to A and B,
and that without `remat` the sums of all layers are kept for the backward pass.
"""

import dataclasses
import math
import types
import zlib
from collections.abc import Sequence
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax.nnx.traversals import flatten_mapping, unflatten_mapping

from rethinker_jax.errors import UserError
from rethinker_jax.models.parts import LORA_SCALE, part_of
from rethinker_jax.models.precision import cast_params
from rethinker_jax.models.qwen25vl import Params, param_dims, param_shapes
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.models.sharding import put

TARGETS = ("query", "key", "value", "output", "gate", "up", "down")


def adapter_layout(
    config: QwenConfig, rank: int, targets: Sequence[str], freeze: Sequence[str]
) -> tuple[Params, Params]:
    """(dimension words, shapes) of adapters for the kernels `targets` (() = all) of the parts that are not frozen.

    Raises UserError where there is no such kernel, or where `rank` is not below the sides of one.
    """
    all_dims, all_shapes = flatten_mapping(param_dims(config)), flatten_mapping(param_shapes(config))
    dims: dict[tuple[str, ...], tuple[str, ...]] = {LORA_SCALE: ()}
    shapes = {LORA_SCALE: jax.ShapeDtypeStruct((), jnp.float32)}
    for path, words in all_dims.items():
        name = path[-2] if path[-1] == "kernel" else path[-1]
        if name not in (targets or TARGETS) or part_of(path) in freeze:
            continue
        size = all_shapes[path].shape
        stacked = int(words[0] == "layers")
        split = len(words) - 1 if name == "output" else stacked + 1  # inputs stand before outputs
        most = min(math.prod(size[stacked:split]), math.prod(size[split:]))
        if rank >= most:
            raise UserError(
                f"model.lora.rank={rank}: wanted less than {most}, the smaller side of {'.'.join(path)}. Lower it, or "
                "leave that kernel out of model.lora.targets."
            )
        for key, names, shape in (
            ("a", (*words[:split], "rank"), (*size[:split], rank)),
            ("b", (*words[:stacked], "rank", *words[split:]), (*size[:stacked], rank, *size[split:])),
        ):
            dims["lora", *path, key] = names
            shapes["lora", *path, key] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if len(dims) == 1:
        raise UserError(
            f"model.lora.targets={list(targets)}: there is no such kernel outside of model.freeze={list(freeze)}, so "
            "nothing would be trained. Name others, or freeze less."
        )
    return unflatten_mapping(dims)["lora"], unflatten_mapping(shapes)["lora"]


def init_adapters(dims: Params, shapes: Params, shardings: Params, scale: float, seed: int) -> Params:
    """A is normal with variance 1 / inputs, B is zero: at first the model is the one without adapters, bit for bit.

    Arrays are drawn whole and put in their places one by one.
    """
    words, places = flatten_mapping(dims), flatten_mapping(shardings)

    def value(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1] != "a":
            return jnp.full(leaf.shape, scale if path[-1] == "scale" else 0.0, leaf.dtype)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(".".join(path).encode()))
        sizes = zip(words[path], leaf.shape, strict=True)
        inputs = math.prod(size for word, size in sizes if word not in ("layers", "rank"))
        return inputs**-0.5 * jax.random.normal(key, leaf.shape, leaf.dtype)

    return unflatten_mapping(
        {path: put(value(path, leaf), places[path]) for path, leaf in flatten_mapping(shapes).items()}
    )


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedKernel:
    """Stands in a kernel's place among the parameters: `kernel[...]`, as layers read it, is the sum, in `dtype`.

    `a` is scaled. A scan over layers slices it like any kernel.
    """

    kernel: jax.Array
    a: jax.Array
    b: jax.Array
    dtype: Any = dataclasses.field(metadata={"static": True})

    def __getitem__(self, index: types.EllipsisType) -> jax.Array:
        assert index is ...
        add = jax.vmap(_add_product) if self.a.ndim + self.b.ndim > self.kernel.ndim + 2 else _add_product
        return add(self.kernel, self.a, self.b).astype(self.dtype)


def _add_product(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return kernel + jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)


def adapt_params(params: Params, dtype: Any) -> Params:
    """Cast parameters for computation, each kernel that has an adapter as an `AdaptedKernel`."""
    base = flatten_mapping({key: value for key, value in params.items() if key != "lora"})
    cast = flatten_mapping(cast_params(unflatten_mapping(base), dtype))
    adapters = flatten_mapping(params.get("lora", {}))
    for path in (path[:-1] for path in adapters if path[-1] == "a"):
        a, b = adapters[*path, "a"] * params["lora"]["scale"], adapters[*path, "b"]
        cast[path] = AdaptedKernel(base[path], a, b, dtype)
    return unflatten_mapping(cast)


def merge_adapters(params: Params) -> Params:
    """Replace every `AdaptedKernel` by its value."""

    def is_adapted(node: Any) -> bool:
        return isinstance(node, AdaptedKernel)

    return jax.tree.map(lambda node: node[...] if is_adapted(node) else node, params, is_leaf=is_adapted)
