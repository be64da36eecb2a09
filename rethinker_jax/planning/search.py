"""A good mesh without compiling anything: a model of bytes and seconds, tried on every way to cut the devices.

What lies on a device between steps is counted exactly, from shapes and rules. Temporaries are a formula, fitted to what
the compiler of libtpu 0.0.42 said of 7B on v5p (peaks within an eighth). Seconds are those of `roofline.py` with links
counted by formula: good for ranking, and no more than that. `plan --suggest` compiles the best few.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax.numpy as jnp

from rethinker_jax.config import Config, MeshConfig
from rethinker_jax.device_bytes import Held, Work, draws, held_bytes, learns, stand_in
from rethinker_jax.models.flops import decoder_flops, image_work, vision_flops
from rethinker_jax.models.layers import Remat
from rethinker_jax.models.precision import resolve_dtype
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.models.sharding import kv_repeats
from rethinker_jax.planning.work import Longest, geometry_of
from rethinker_jax.prompts.windows import num_windows
from rethinker_jax.training.log_probs import CHUNK_BYTES

RINGS = 2  # links that a collective has on the average
MARGIN = 0.9  # of the usable memory, that an estimate may take
PACKING = 1.06  # places for tokens, to tokens
WIDE, GATED = 10, 4  # arrays that one layer at work holds: as wide as the model, and as its MLP
KEPT = {"none": (16, 3), "dots": (3, 2), "full": (1, 0)}  # of these, that every layer keeps for the backward pass
MICRO_TOKENS = (8192, 16384, 32768, 65536)
MOST_TENSOR = 16
TILE = 128  # lanes of a TPU
LONG_ROW = 16384  # tokens of a sequence from which on it is worth cutting
LOGITS = 4  # arrays of a chunk of logits at once


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Of one device: operations a second, bytes a second through its memory and, roughly, from its neighbours."""

    flops: float
    memory: float
    links: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One way to run a config; bytes are the peaks of a device, seconds those of one step of the run.

    Where nothing is updated, or drawn, its bytes are 0.
    """

    mesh: MeshConfig
    remat: Remat
    micro_batch_tokens: int
    update_bytes: int
    sample_bytes: int
    seconds: float

    @property
    def peak_bytes(self) -> int:
        return max(self.update_bytes, self.sample_bytes)


def mesh_shapes(
    num_devices: int, qwen: QwenConfig, most_tensor: int = MOST_TENSOR, context: int = 1
) -> list[MeshConfig]:
    """Every way to cut the devices over the axes by which the model's sizes are divisible, of one size of `context`.

    An axis that divides nothing would leave weights whole on every device.
    """
    found = []
    for tensor in _divisors(num_devices // context if num_devices % context == 0 else 0):
        if tensor > most_tensor or qwen.heads % tensor or qwen.d_ff % tensor or not fits_heads(qwen, tensor, context):
            continue
        for fsdp in _divisors(num_devices // context // tensor):
            cut = fsdp * context
            if qwen.d_model % cut == 0 and qwen.vision.d_model % cut == 0:
                found.append(MeshConfig(num_devices // cut // tensor, fsdp, context, tensor))
    return found


def fits_heads(qwen: QwenConfig, tensor: int, context: int) -> bool:
    """Whether inside attention every device gets heads of its own; kv heads are repeated where there are too few."""
    return context == 1 or kv_repeats(qwen.heads, qwen.kv_heads, tensor * context) > 0


def long_meshes(num_devices: int, qwen: QwenConfig) -> list[MeshConfig]:
    """Those of `mesh_shapes` that cut tokens."""
    return [
        mesh for context in _divisors(num_devices) if context > 1
        for mesh in mesh_shapes(num_devices, qwen, context=context)
    ]  # fmt: skip


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
    work: Work = "rl",
) -> list[Estimate]:
    """Of all meshes that cut no tokens (or those given), the quickest first.

    `vary`: other remat policies and micro-batches, too.
    """
    found = []
    for mesh in meshes or mesh_shapes(num_devices, qwen):
        held = held_bytes(config, qwen, stand_in(mesh), work)
        for remat, micro in _ways(config, vary):
            found.append(_estimate(config, qwen, longest, mesh, held, speeds, remat, micro, work))
    return sorted(found, key=lambda one: (one.seconds, one.peak_bytes))


def fitting(
    config: Config,
    qwen: QwenConfig,
    longest: Longest,
    num_devices: int,
    usable: int,
    speeds: Speeds,
    *,
    vary: bool = False,
    work: Work = "rl",
    slices: int = 1,
) -> tuple[list[Estimate], Estimate]:
    """(estimates that fit into `usable` bytes, the quickest first; the one that wants least).

    `context` is tried where nothing fits without it, or sequences are long: for short ones its exchanges cost more than
    they save, by less than an estimate can tell. `slices`: of TPUs, between which only `data` may lie.
    """

    def fit(some: Sequence[Estimate]) -> list[Estimate]:
        return [one for one in some if one.peak_bytes <= MARGIN * usable]

    plain = [mesh for mesh in mesh_shapes(num_devices, qwen) if mesh.data % slices == 0]
    found = estimates(config, qwen, longest, num_devices, speeds, vary=vary, meshes=plain, work=work)
    is_long = longest.prompt_tokens + longest.completion_tokens >= LONG_ROW
    cutting = [mesh for mesh in long_meshes(num_devices, qwen) if mesh.data % slices == 0]
    if cutting and learns(work) and (is_long or not fit(found)):
        found += estimates(config, qwen, longest, num_devices, speeds, vary=vary, meshes=cutting, work=work)
        found.sort(key=lambda one: (one.seconds, one.peak_bytes))
    return fit(found), min(found, key=lambda one: one.peak_bytes)


def _ways(config: Config, vary: bool) -> Iterator[tuple[Remat, int]]:
    own = config.training.micro_batch_tokens
    policies: tuple[Remat, ...] = ("none", "dots", "full") if vary else (config.model.remat,)
    for remat in policies:
        for micro in sorted({own, *(MICRO_TOKENS if vary else ())}):
            yield remat, micro


@dataclasses.dataclass(frozen=True)
class _Batch:
    """The update's work on one device: micro-batches, and of each tokens, completion tokens and images."""

    micro: int
    tokens: float
    targets: float
    images: float


def _batch(config: Config, longest: Longest, shards: int, context: int, micro_tokens: int) -> _Batch:
    """With the text cut into `shards`, and the tokens, targets and images of each among `context` devices."""
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
    tokens, targets = PACKING * max(total / cells, fullest), completions * longest.completion_tokens
    return _Batch(micro, tokens / context, targets / context, math.ceil(prompts / context))


def _estimate(
    config: Config,
    qwen: QwenConfig,
    longest: Longest,
    mesh: MeshConfig,
    held: Held,
    speeds: Speeds,
    remat: Remat,
    micro_tokens: int,
    work: Work,
) -> Estimate:
    width = jnp.dtype(resolve_dtype(config.model.dtype, qwen.dtype)).itemsize
    update = sample = seconds = 0.0
    if work != "sample":
        batch = _batch(config, longest, mesh.data * mesh.fsdp, mesh.context, micro_tokens)
        update = held.state + _temporaries(qwen, longest, batch, held, remat, width, mesh, work)
        steps = config.rollout.prompts_per_step * config.rollout.samples_per_prompt // config.training.batch_size
        seconds += max(1, steps) * _update_seconds(qwen, longest, batch, held, speeds, remat, width, mesh)
    if draws(work, config):
        prefill = min(config.sampling.prefill_tokens, longest.prompt_tokens * config.rollout.prompts_per_step)
        layer = prefill * width * (GATED * qwen.d_ff / mesh.tensor + WIDE * qwen.d_model)
        token = _token_bytes(qwen, mesh.tensor, width)
        completion = token * (2 * longest.prompt_tokens + longest.completion_tokens)
        sample = held.state + held.copy + layer + completion
        seconds += _sample_seconds(config, qwen, longest, held.copy, speeds, mesh, token)
    return Estimate(mesh, remat, micro_tokens, int(update), int(sample), seconds)


def _temporaries(
    qwen: QwenConfig,
    longest: Longest,
    batch: _Batch,
    held: Held,
    remat: Remat,
    width: int,
    mesh: MeshConfig,
    work: Work,
) -> float:
    """Gradients twice (their sum in float32, the last ones as computed), cast weights, what layers keep and hold."""
    gradients = held.trained + held.trained * width // 4
    cast = held.weights * width // 4 if width < 4 else 0
    d_model, d_ff = qwen.d_model, qwen.d_ff / mesh.tensor
    wide, gated = KEPT[remat] if learns(work) else (0, 0)
    kept = qwen.layers * batch.tokens * width * (wide * d_model + gated * d_ff)
    patches = batch.images * _window_patches(qwen, longest)
    vision_width = wide * qwen.vision.d_model + gated * qwen.vision.d_ff / mesh.tensor
    kept += qwen.vision.depth * patches * width * vision_width
    layer = batch.tokens * width * (WIDE * d_model + GATED * d_ff)
    head = qwen.d_model * qwen.vocab / mesh.tensor * (width + 4) if mesh.fsdp * mesh.context > 1 else 0
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
    held: Held,
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
    cut = mesh.fsdp * mesh.context  # of the weights' rows
    gathered = held.weights * cut * width / 4 * (1 - 1 / cut)
    if qwen.d_model / cut < TILE:  # a part of a tile is not gathered but summed, which sends twice as much
        gathered *= 2
    reduced = 2 * held.trained * (1 - 1 / mesh.data) + held.trained * cut * (1 - 1 / cut)
    summed = 5 * qwen.layers * batch.tokens * qwen.d_model * width * 2 * (1 - 1 / mesh.tensor)
    sent = batch.micro * (
        passes * (gathered + qwen.layers * batch.tokens * _exchanged(qwen, mesh, width)) + reduced + summed
    )
    moved = 2 * (held.weights + held.optimizer) + batch.micro * 6 * held.weights * cut * width / 4
    return flops / speeds.flops + sent / speeds.links + moved / speeds.memory


def _exchanged(qwen: QwenConfig, mesh: MeshConfig, width: int) -> float:
    """Bytes that a device sends for each of its tokens in a layer, where `context` cuts tokens.

    Queries, keys and values go to who has their heads, and what attention makes of them comes back.
    """
    keys = math.lcm(qwen.kv_heads, mesh.tensor * mesh.context)
    return 2 * (qwen.heads + keys) * qwen.head_dim * width / mesh.tensor * (1 - 1 / mesh.context)


def _sample_seconds(
    config: Config,
    qwen: QwenConfig,
    longest: Longest,
    copy: int,
    speeds: Speeds,
    mesh: MeshConfig,
    token: int,
) -> float:
    """Of one rollout batch: prefill, and the decode loop, which reads weights and caches at every step."""
    shards, tensor = mesh.data * mesh.fsdp * mesh.context, mesh.tensor
    prompts, samples = config.rollout.prompts_per_step, config.rollout.samples_per_prompt
    requests = prompts * samples
    slots = min(config.sampling.num_slots or requests, requests)
    slots_of_shard = math.ceil(slots / shards)
    steps = math.ceil(math.ceil(requests / shards) / slots_of_shard) * longest.completion_tokens
    length = longest.prompt_tokens + longest.completion_tokens
    reads = copy + slots_of_shard * token * length
    flops = slots_of_shard * decoder_flops(qwen, 1, length, 1) / tensor
    sums = 2 * qwen.layers * slots_of_shard * qwen.d_model * 4 * (1 - 1 / tensor)
    hops = 2 * qwen.layers * 2e-6 * (tensor - 1)
    step = max(reads / speeds.memory, flops / speeds.flops) + sums / speeds.links + hops
    tokens = prompts * longest.prompt_tokens
    first = decoder_flops(qwen, tokens, tokens * longest.prompt_tokens // 2, 0) / (shards * tensor)
    return steps * step + first / speeds.flops
