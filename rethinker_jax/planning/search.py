"""A good mesh without compiling anything: a model of bytes and seconds, tried on every way to cut the devices.

What lies on a device between steps is counted exactly, from shapes and rules. Temporaries are a formula, fitted to what
the compiler of libtpu 0.0.42 said of 7B on v5p (peaks within an eighth). Seconds are those of `roofline.py` with links
counted by formula: good for ranking, and no more than that. `plan --suggest` compiles the best few.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from rethinker_jax.config import Config, MeshConfig
from rethinker_jax.errors import UserError
from rethinker_jax.models.flops import decoder_flops, image_work, vision_flops
from rethinker_jax.models.layers import Remat
from rethinker_jax.models.lora import adapter_layout
from rethinker_jax.models.parts import split_params
from rethinker_jax.models.precision import resolve_dtype
from rethinker_jax.models.qwen25vl import Params, param_dims, param_shapes
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.models.sharding import AXES, SAMPLING_RULES, TRAINING_RULES, param_shardings
from rethinker_jax.planning.layouts import mesh_words
from rethinker_jax.planning.work import Longest, geometry_of
from rethinker_jax.prompts.windows import num_windows
from rethinker_jax.sampling.prefill import kv_copies
from rethinker_jax.training.log_probs import CHUNK_BYTES
from rethinker_jax.training.optimizer import MOMENTS

MARGIN = 0.9  # of the usable memory, that an estimate may take
PACKING = 1.06  # places for tokens, to tokens
WIDE, GATED = 10, 4  # arrays that one layer at work holds: as wide as the model, and as its MLP
KEPT = {"none": (16, 3), "dots": (3, 2), "full": (1, 0)}  # of these, that every layer keeps for the backward pass
MICRO_TOKENS = (8192, 16384, 32768, 65536)
MOST_TENSOR = 16
TILE = 128  # lanes of a TPU
LORA_PART = "lora"
LOGITS = 4  # arrays of a chunk of logits at once


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Of one device: operations a second, bytes a second through its memory and, roughly, from its neighbours."""

    flops: float
    memory: float
    links: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One way to run a config; bytes are the peaks of a device, seconds those of one step of the run."""

    mesh: MeshConfig
    remat: Remat
    micro_batch_tokens: int
    update_bytes: int
    sample_bytes: int
    seconds: float

    @property
    def peak_bytes(self) -> int:
        return max(self.update_bytes, self.sample_bytes)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Bytes of one device that only the mesh decides."""

    parameters: int
    trained: int
    optimizer: int
    others: int  # reference, average
    copy: int  # of the sampler


def mesh_shapes(num_devices: int, qwen: QwenConfig, most_tensor: int = MOST_TENSOR) -> list[MeshConfig]:
    """Every way to cut the devices over the axes by which the model's sizes are divisible.

    An axis that divides nothing would leave weights whole on every device.
    """
    found = []
    for tensor in _divisors(num_devices):
        if tensor > most_tensor or qwen.heads % tensor or qwen.d_ff % tensor:
            continue
        for fsdp in _divisors(num_devices // tensor):
            if qwen.d_model % fsdp == 0 and qwen.vision.d_model % fsdp == 0:
                found.append(MeshConfig(num_devices // tensor // fsdp, fsdp, tensor))
    return found


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def estimates(
    config: Config,
    qwen: QwenConfig,
    longest: Longest,
    num_devices: int,
    speeds: Speeds,
    *,
    vary: bool = False,
    meshes: Sequence[MeshConfig] = (),
) -> list[Estimate]:
    """Of all meshes (or those given), the quickest first. `vary`: other remat policies and micro-batches, too."""
    found = []
    for mesh in meshes or mesh_shapes(num_devices, qwen):
        # Only its shape is asked, so one device stands for all of them.
        grid = np.full((mesh.data, mesh.fsdp, mesh.tensor), jax.devices()[0], dtype=object)
        sizes = _sizes(config, qwen, Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3))
        for remat, micro in _ways(config, vary):
            found.append(_estimate(config, qwen, longest, mesh, sizes, speeds, remat, micro))
    return sorted(found, key=lambda one: (one.seconds, one.peak_bytes))


def _ways(config: Config, vary: bool) -> Iterator[tuple[Remat, int]]:
    own = config.training.micro_batch_tokens
    policies: tuple[Remat, ...] = ("none", "dots", "full") if vary else (config.model.remat,)
    for remat in policies:
        for micro in sorted({own, *(MICRO_TOKENS if vary else ())}):
            yield remat, micro


def best_mesh(
    config: Config, qwen: QwenConfig, longest: Longest, num_devices: int, usable: int, speeds: Speeds
) -> MeshConfig:
    """The quickest mesh whose estimate fits. Raises UserError where none does, naming the least that is wanted."""
    found = estimates(config, qwen, longest, num_devices, speeds)
    fitting = [one for one in found if one.peak_bytes <= MARGIN * usable]
    if fitting:
        return fitting[0].mesh
    least = min(found, key=lambda one: one.peak_bytes)
    raise UserError(
        f"--mesh auto: no mesh of {num_devices} devices is estimated to fit into {MARGIN:.0%} of {usable / 2**30:.1f} "
        f"GiB; the least is {least.peak_bytes / 2**30:.1f} GiB with {mesh_words(least.mesh)}. Take more devices, lower "
        "training.micro_batch_tokens, or set model.remat=full, optimizer.moments=mu_bfloat16 or optimizer.offload=true."
    )


def _sizes(config: Config, qwen: QwenConfig, mesh: Mesh) -> _Sizes:
    dims, shapes = param_dims(qwen), param_shapes(qwen)
    params = _bytes(dims, shapes, mesh, TRAINING_RULES)
    lora = config.model.lora
    if lora.rank:
        dims_of, shapes_of = adapter_layout(qwen, lora.rank, lora.targets, config.model.freeze)
        params[LORA_PART] = _bytes(dims_of, shapes_of, mesh, TRAINING_RULES)
    trained = sum(jax.tree.leaves(split_params(params, config.model.freeze)[0]))
    whole = sum(jax.tree.leaves(params))
    moments = sum(jnp.dtype(dtype).itemsize for dtype in MOMENTS[config.optimizer.moments])
    width = jnp.dtype(resolve_dtype(config.model.dtype, qwen.dtype)).itemsize
    reference = whole * width // 4 if config.loss.reference == "start" else 0
    consistency = config.reward.consistency
    average = trained if consistency.weight and consistency.model == "ema" else 0
    copies = kv_copies(qwen, mesh)
    sampler = sum(jax.tree.leaves(_bytes(dims, shapes, mesh, SAMPLING_RULES)))
    repeated = (copies - 1) * qwen.layers * 2 * qwen.d_model * qwen.kv_heads * qwen.head_dim * 4 // mesh.shape["tensor"]
    return _Sizes(
        parameters=whole,
        trained=trained,
        optimizer=0 if config.optimizer.offload else trained * moments // 4,
        others=reference + average,
        copy=(sampler + repeated) * width // 4,
    )


def _bytes(dims: Any, shapes: Any, mesh: Mesh, rules: Any) -> Params:
    """Bytes of a device by parameter, float32."""

    def size(leaf: jax.ShapeDtypeStruct, place: NamedSharding) -> int:
        return math.prod(place.shard_shape(leaf.shape)) * 4

    return jax.tree.map(size, shapes, param_shardings(dims, shapes, mesh, rules))


@dataclasses.dataclass(frozen=True)
class _Batch:
    """The update's work on one shard: micro-batches, and of each tokens, completion tokens and images."""

    micro: int
    tokens: float
    targets: float
    images: float


def _batch(config: Config, longest: Longest, shards: int, micro_tokens: int) -> _Batch:
    samples, rows = config.rollout.samples_per_prompt, config.training.batch_size
    groups, row = -(-rows // samples), longest.prompt_tokens + longest.completion_tokens
    total = groups * (longest.prompt_tokens - 1) + rows * longest.completion_tokens
    micro = max(1, min(rows, math.ceil(total / (max(micro_tokens, row) * shards)))) if micro_tokens else 1
    cells = micro * shards
    parts = 1 if groups % cells == 0 else 2  # of a group, each with its prompt: cells are filled evenly
    parts = min(samples, max(parts, math.ceil(cells / groups)))
    total += (parts - 1) * groups * longest.prompt_tokens
    completions = math.ceil(rows / cells)  # of the fullest cell
    prompts = math.ceil(completions / samples)
    fullest = completions * longest.completion_tokens + prompts * longest.prompt_tokens
    return _Batch(micro, PACKING * max(total / cells, fullest), completions * longest.completion_tokens, prompts)


def _estimate(
    config: Config,
    qwen: QwenConfig,
    longest: Longest,
    mesh: MeshConfig,
    sizes: _Sizes,
    speeds: Speeds,
    remat: Remat,
    micro_tokens: int,
) -> Estimate:
    shards, tensor = mesh.data * mesh.fsdp, mesh.tensor
    width = jnp.dtype(resolve_dtype(config.model.dtype, qwen.dtype)).itemsize
    batch = _batch(config, longest, shards, micro_tokens)
    held = sizes.parameters + sizes.optimizer + sizes.others
    update = held + _temporaries(qwen, longest, batch, sizes, remat, width, tensor, mesh.fsdp)
    prefill = min(config.sampling.prefill_tokens, longest.prompt_tokens * config.rollout.prompts_per_step)
    layer = prefill * width * (GATED * qwen.d_ff / tensor + WIDE * qwen.d_model)
    token = _token_bytes(qwen, tensor, width)
    completion = token * (2 * longest.prompt_tokens + longest.completion_tokens)
    sample = int(held + sizes.copy + layer + completion)
    steps = config.rollout.prompts_per_step * config.rollout.samples_per_prompt // config.training.batch_size
    seconds = max(1, steps) * _update_seconds(qwen, longest, batch, sizes, speeds, remat, width, mesh)
    seconds += _sample_seconds(config, qwen, longest, sizes, speeds, shards, token, tensor)
    return Estimate(mesh, remat, micro_tokens, int(update), sample, seconds)


def _temporaries(
    qwen: QwenConfig,
    longest: Longest,
    batch: _Batch,
    sizes: _Sizes,
    remat: Remat,
    width: int,
    tensor: int,
    fsdp: int,
) -> float:
    """Gradients twice (their sum in float32, the last ones as computed), cast weights, what layers keep and hold."""
    gradients = sizes.trained + sizes.trained * width // 4
    cast = sizes.parameters * width // 4 if width < 4 else 0
    d_model, d_ff = qwen.d_model, qwen.d_ff / tensor
    wide, gated = KEPT[remat]
    kept = qwen.layers * batch.tokens * width * (wide * d_model + gated * d_ff)
    patches = batch.images * _window_patches(qwen, longest)
    kept += qwen.vision.depth * patches * width * (wide * qwen.vision.d_model + gated * qwen.vision.d_ff / tensor)
    layer = batch.tokens * width * (WIDE * d_model + GATED * d_ff)
    head = qwen.d_model * qwen.vocab / tensor * (width + 4) if fsdp > 1 else 0
    logits = LOGITS * min(4 * batch.targets * qwen.vocab, CHUNK_BYTES)
    return gradients + cast + kept + max(layer, head + logits)


def _window_patches(qwen: QwenConfig, longest: Longest) -> int:
    geometry = geometry_of(qwen)
    return num_windows((1, *longest.grid), geometry) * geometry.window_patches if longest.grid[0] else 0


def _token_bytes(qwen: QwenConfig, tensor: int, width: int) -> int:
    """Of one token's keys and values on one device."""
    heads = math.lcm(qwen.kv_heads, tensor) // tensor if qwen.heads % math.lcm(qwen.kv_heads, tensor) == 0 else 0
    return qwen.layers * 2 * (heads or qwen.kv_heads) * qwen.head_dim * width


def _update_seconds(
    qwen: QwenConfig,
    longest: Longest,
    batch: _Batch,
    sizes: _Sizes,
    speeds: Speeds,
    remat: Remat,
    width: int,
    mesh: MeshConfig,
) -> float:
    """Of one optimizer step, nothing overlapped."""
    pairs = batch.tokens * (longest.prompt_tokens + longest.completion_tokens / 2)
    images = image_work(qwen, [(1, *longest.grid)] * math.ceil(batch.images) if longest.grid[0] else [])
    forward = decoder_flops(qwen, int(batch.tokens), int(pairs), 0) + vision_flops(qwen, images)
    head = decoder_flops(qwen, 0, 0, int(batch.targets))
    flops = batch.micro * (forward * (4 if remat == "full" else 3) + 4 * head) / mesh.tensor
    passes = 3 if remat == "full" else 2
    cut = mesh.fsdp * mesh.tensor
    gathered = sizes.parameters * mesh.fsdp * width / 4 * (1 - 1 / mesh.fsdp)
    if qwen.d_model / mesh.fsdp < TILE:  # a part of a tile is not gathered but summed, which sends twice as much
        gathered *= 2
    reduced = 2 * sizes.trained * (1 - 1 / mesh.data) + sizes.trained * mesh.fsdp * (1 - 1 / mesh.fsdp)
    summed = 5 * qwen.layers * batch.tokens * qwen.d_model * width * 2 * (1 - 1 / mesh.tensor)
    sent = batch.micro * (passes * gathered + reduced + summed)
    moved = 2 * (sizes.parameters + sizes.optimizer) + batch.micro * (
        6 * sizes.parameters * cut * width / 4 / mesh.tensor
    )
    return flops / speeds.flops + sent / speeds.links + moved / speeds.memory


def _sample_seconds(
    config: Config,
    qwen: QwenConfig,
    longest: Longest,
    sizes: _Sizes,
    speeds: Speeds,
    shards: int,
    token: int,
    tensor: int,
) -> float:
    """Of one rollout batch: prefill, and the decode loop, which reads weights and caches at every step."""
    prompts, samples = config.rollout.prompts_per_step, config.rollout.samples_per_prompt
    requests = prompts * samples
    slots = min(config.sampling.num_slots or requests, requests)
    slots_of_shard = math.ceil(slots / shards)
    steps = math.ceil(math.ceil(requests / shards) / slots_of_shard) * longest.completion_tokens
    length = longest.prompt_tokens + longest.completion_tokens
    reads = sizes.copy + slots_of_shard * token * length
    flops = slots_of_shard * decoder_flops(qwen, 1, length, 1) / tensor
    sums = 2 * qwen.layers * slots_of_shard * qwen.d_model * 4 * (1 - 1 / tensor)
    hops = 2 * qwen.layers * 2e-6 * (tensor - 1)
    step = max(reads / speeds.memory, flops / speeds.flops) + sums / speeds.links + hops
    tokens = prompts * longest.prompt_tokens
    first = decoder_flops(qwen, tokens, tokens * longest.prompt_tokens // 2, 0) / (shards * tensor)
    return steps * step + first / speeds.flops
