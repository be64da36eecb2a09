"""Bytes that a config keeps on each device of a mesh, by shapes and rules alone: no array is made, nothing compiled."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.nnx.traversals import flatten_mapping, unflatten_mapping
from jax.sharding import AxisType, Mesh

from rethinker_jax.config import Config, MeshConfig
from rethinker_jax.models.lora import adapter_layout
from rethinker_jax.models.parts import split_params
from rethinker_jax.models.precision import resolve_dtype
from rethinker_jax.models.qwen25vl import param_dims, param_shapes
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.models.sharding import AXES, SAMPLING_RULES, TRAINING_RULES, Rules, spec_for
from rethinker_jax.sampling.prefill import kv_copies
from rethinker_jax.training.optimizer import MOMENTS

Work = Literal["rl", "sft", "sample", "score"]  # what a model is loaded for; score = forward passes alone
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter: its dimension words, and its sizes."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes of one device between steps.

    weights: float32, in the training layout, adapters included; trained: of these. cast: the weights without adapters
    in the dtype of computation. optimizer: the moments, `on_host` where they lie there. copy: the sampler's.
    """

    weights: int
    trained: int
    cast: int
    optimizer: int
    on_host: int
    reference: int
    average: int
    copy: int

    @property
    def state(self) -> int:
        """What training keeps on the device."""
        return self.weights + self.optimizer + self.reference + self.average


def learns(work: Work) -> bool:
    return work in ("rl", "sft")


def draws(work: Work, config: Config) -> bool:
    return work in ("rl", "sample") or (work == "sft" and config.sft.evaluate)


def stand_in(mesh: MeshConfig) -> Mesh:
    """A mesh that is asked for its shape alone: one device stands for all. No axis is -1."""
    grid = np.full(tuple(mesh.sizes.values()), jax.devices()[0], dtype=object)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@functools.cache
def weights_of(qwen: QwenConfig) -> dict[Path, Weight]:
    """Every parameter of the model, by its path."""
    return _weights(param_dims(qwen), param_shapes(qwen))


def shard_bytes(weight: Weight, mesh: Mesh, rules: Rules, itemsize: int = 4) -> int:
    """Of one device."""
    cut = 1
    for axes in spec_for(weight.dims, weight.shape, mesh, rules):
        cut *= math.prod(mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes or ()))
    return math.prod(weight.shape) * itemsize // cut


def held_bytes(config: Config, qwen: QwenConfig, mesh: Mesh, work: Work, platform: str = "") -> Held:
    """Of a device of the mesh. `platform`: "cpu" where the sampler unties its head, as it does on CPUs.

    Raises UserError for adapters that do not fit the model.
    """
    original = weights_of(qwen)
    adapters: dict[Path, Weight] = {}
    lora = config.model.lora
    if lora.rank:
        found = _weights(*adapter_layout(qwen, lora.rank, lora.targets, config.model.freeze))
        adapters = {("lora", *path): weight for path, weight in found.items()}
    every = original | adapters
    width = jnp.dtype(resolve_dtype(config.model.dtype, qwen.dtype)).itemsize
    trained, moments = 0, 0
    if learns(work):
        tree = split_params(unflatten_mapping(every), config.model.freeze)[0]
        trained = _bytes((every[path] for path in flatten_mapping(tree)), mesh, TRAINING_RULES)
        moments = trained * sum(jnp.dtype(dtype).itemsize for dtype in MOMENTS[config.optimizer.moments]) // 4
    cast = _cast_bytes(original, mesh, TRAINING_RULES, width)
    consistency = config.reward.consistency
    averages = learns(work) and consistency.weight and consistency.model == "ema"
    return Held(
        weights=_bytes(every.values(), mesh, TRAINING_RULES),
        trained=trained,
        cast=cast,
        optimizer=0 if config.optimizer.offload else moments,
        on_host=moments if config.optimizer.offload else 0,
        reference=cast if work == "rl" and config.loss.reference == "start" else 0,
        average=trained if averages else 0,
        copy=_copy_bytes(qwen, mesh, width, platform) if draws(work, config) else 0,
    )


def _copy_bytes(qwen: QwenConfig, mesh: Mesh, width: int, platform: str) -> int:
    """As `sampling.prefill.sampling_layout` makes the copy: kv heads repeated, on CPUs with a head of its own."""
    repeated = dataclasses.replace(
        qwen, kv_heads=qwen.kv_heads * kv_copies(qwen, mesh), tied=qwen.tied and platform != "cpu"
    )
    return _cast_bytes(weights_of(repeated), mesh, SAMPLING_RULES, width)


def _weights(dims: Any, shapes: Any) -> dict[Path, Weight]:
    words = flatten_mapping(dims)
    return {path: Weight(words[path], leaf.shape) for path, leaf in flatten_mapping(shapes).items()}


def _bytes(weights: Iterable[Weight], mesh: Mesh, rules: Rules) -> int:
    return sum(shard_bytes(weight, mesh, rules) for weight in weights)


def _cast_bytes(weights: Mapping[Path, Weight], mesh: Mesh, rules: Rules, width: int) -> int:
    """As `models.precision.cast_params`: scales of norms stay float32."""
    return sum(
        shard_bytes(weight, mesh, rules, 4 if path[-1] == "scale" else width) for path, weight in weights.items()
    )
