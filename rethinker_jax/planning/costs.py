"""What programs do, counted from shapes: products, and bytes that pass through a device's memory. Of one device.

Compiled programs do not tell: XLA's own count takes a loop's body once and knows nothing of a kernel. Products are
counted twice, what the model needs (`models/flops.py`), and what is run for it, with padding and recomputation. Bytes
are a rough count of weights, caches, gradients and activations, each as often as it is read or written.
"""

import dataclasses

from jax.sharding import Mesh

from rethinker_jax.config import Config
from rethinker_jax.models.flops import decoder_flops, image_work, merger_flops, update_flops, vision_flops
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.planning.work import Longest, UpdateWork

WIDE = 14  # arrays as wide as the model that a decoder layer reads or writes in its forward pass
GATED = 8  # of those as wide as its MLP
LOGITS = 6  # times that logits are read or written, forward and backward


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one device: products that are needed, products that are run, bytes read and written."""

    useful_flops: float
    executed_flops: float
    moved_bytes: float


def update_costs(config: Config, qwen: QwenConfig, work: UpdateWork, held: dict[str, int], mesh: Mesh) -> Costs:
    """Of one optimizer step. `held`: bytes of a device by what they hold (`update_state`)."""
    num_devices, tensor, context = mesh.size, mesh.shape["tensor"], mesh.shape["context"]
    packed, freeze, adapters = work.packed, config.model.freeze, config.model.lora.rank > 0
    useful = update_flops(qwen, packed.num_tokens, packed.num_pairs, packed.num_targets, packed.grids, freeze, adapters)
    micro, shards, rows, length = work.batch.text.token_ids.shape
    prefix, targets = work.batch.text.prefix_index.shape[-1], work.batch.target_ids.shape[-1]
    tokens, num_targets = micro * shards * rows * length, micro * shards * targets
    pairs = tokens * (prefix + length)
    grids = [] if work.batch.vision is None else _padded_grids(qwen, work.batch.vision.segment.shape)
    executed = update_flops(qwen, tokens, pairs, num_targets, grids, freeze, adapters)
    executed += decoder_flops(qwen, 0, 0, num_targets)  # chunks of logits are made again in the backward pass
    once_more = (config.model.remat == "full") + (config.loss.reference == "start" and config.loss.kl != "reward")
    images = image_work(qwen, grids)
    forward = decoder_flops(qwen, tokens, pairs, 0) + vision_flops(qwen, images) + merger_flops(qwen, images)
    executed += once_more * forward
    passes = 4 if config.model.remat == "full" else 3
    shard_tokens = tokens / (shards * context)
    activations = passes * qwen.layers * shard_tokens * 2 * (WIDE * qwen.d_model + GATED * qwen.d_ff / tensor)
    weights = micro * passes * 2 * _decoder_parameters(qwen) * 2 / tensor
    gradients = micro * 3 * held["parameters"]
    state = 2 * (held["parameters"] + held["optimizer"])
    logits = LOGITS * 4 * num_targets / (shards * context) * qwen.vocab / tensor
    return Costs(useful / num_devices, executed / num_devices, activations + weights + gradients + state + logits)


def _padded_grids(qwen: QwenConfig, shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Vision rows of [micro, rows, windows] as pictures of one window's height: the same patches, the same pairs."""
    micro, rows, windows = shape
    side = qwen.vision.window_size // qwen.vision.patch_size
    return [(rows, side, side * windows)] * micro


def _decoder_parameters(qwen: QwenConfig) -> int:
    heads, keys = qwen.heads * qwen.head_dim, qwen.kv_heads * qwen.head_dim
    layer = 2 * qwen.d_model * (heads + keys) + 3 * qwen.d_model * qwen.d_ff
    return qwen.layers * layer + qwen.d_model * qwen.vocab


def prefill_costs(
    qwen: QwenConfig, longest: Longest, num_prompts: int, num_waves: int, num_devices: int, shards: int, tensor: int
) -> Costs:
    """Of all waves of a rollout batch."""
    tokens = num_prompts * longest.prompt_tokens
    pairs = num_prompts * longest.prompt_tokens * (longest.prompt_tokens + 1) // 2
    images = image_work(qwen, [(1, *longest.grid)] * num_prompts if longest.grid[0] else [])
    flops = decoder_flops(qwen, tokens, pairs, 0) + vision_flops(qwen, images) + merger_flops(qwen, images)
    wide = WIDE * qwen.d_model + GATED * qwen.d_ff / tensor
    moved = qwen.layers * tokens / shards * 2 * wide + num_waves * 2 * _decoder_parameters(qwen) / tensor
    return Costs(flops / num_devices, flops / num_devices, moved)


def decode_costs(
    qwen: QwenConfig,
    longest: Longest,
    num_requests: int,
    slot_steps: int,
    num_steps: int,
    step_bytes: float,
    num_devices: int,
) -> Costs:
    """Of all completions of a rollout batch. slot_steps: of all slots; step_bytes: that a device reads at each step."""
    length, prompt = longest.completion_tokens, longest.prompt_tokens
    pairs = length * prompt + length * (length + 1) // 2
    useful = num_requests * decoder_flops(qwen, length, pairs, length)
    run = slot_steps * decoder_flops(qwen, 1, prompt + length, 1)
    return Costs(useful / num_devices, run / num_devices, num_steps * step_bytes)
