"""The arithmetic floor of a GRPO step: its matrix products counted, and how long they take at this core's own rates."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_sampling import GRID, SEED

from rethinker_jax.models.qwen_config import QwenConfig

MAX_MEASURED_ROWS = 2048  # of a product: more of them do not change its rate


@dataclasses.dataclass(frozen=True)
class Product:
    """`times` matrix products [rows, inner] x [inner, columns]."""

    rows: int
    inner: int
    columns: int
    times: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns * self.times


@dataclasses.dataclass(frozen=True)
class Work:
    """Products with weights, and FLOPs of the two products of attention, with keys and with values."""

    products: tuple[Product, ...] = ()
    attention: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.products + other.products, self.attention + other.attention)

    @property
    def flops(self) -> int:
        return sum(product.flops for product in self.products) + self.attention


def vision_work(config: QwenConfig, images: int, backward: bool) -> Work:
    """Pictures of `GRID` through the vision tower. `backward`: with the gradients of weights and inputs.

    A product has two of its size in the backward pass, but one where patches are embedded: pixels want no gradient.
    Window layers attend inside windows only.
    """
    vision, patches = config.vision, GRID[1] * GRID[2]
    rows, d, passes = images * patches, vision.d_model, 3 if backward else 1
    window = (vision.window_size // vision.patch_size) ** 2
    assert patches % window == 0, "windows of unequal size"
    full = len(vision.full_attention_blocks)
    pairs = images * patches * (full * patches + (vision.depth - full) * window)
    unit = vision.merge_size**2
    products = (
        Product(rows, vision.patch_dim, d, 2 if backward else 1),
        Product(rows, d, 3 * d, vision.depth * passes),
        Product(rows, d, d, vision.depth * passes),
        Product(rows, d, vision.d_ff, 2 * vision.depth * passes),
        Product(rows, vision.d_ff, d, vision.depth * passes),
        Product(rows // unit, unit * d, unit * d, passes),
        Product(rows // unit, unit * d, vision.out_dim, passes),
    )
    return Work(products, 4 * pairs * d * passes)


def decoder_work(config: QwenConfig, rows: int, pairs: int, passes: int) -> Work:
    """`rows` tokens, which attend to `pairs` tokens together, through all layers, `passes` times; no logits."""
    d, heads, keys = config.d_model, config.heads * config.head_dim, config.kv_heads * config.head_dim
    times = config.layers * passes
    products = (
        Product(rows, d, heads, times),
        Product(rows, d, keys, 2 * times),
        Product(rows, heads, d, times),
        Product(rows, d, config.d_ff, 2 * times),
        Product(rows, config.d_ff, d, times),
    )
    return Work(products, 4 * pairs * heads * times)


def head_work(config: QwenConfig, rows: int, passes: int) -> Work:
    return Work((Product(rows, config.d_model, config.vocab, passes),))


def step_work(
    config: QwenConfig, prompts: int, samples: int, prompt_tokens: int, new_tokens: int, shared: bool
) -> dict[str, Work]:
    """What must be multiplied in one step, by phase: the least that the algorithm allows, without recomputation.

    Shared: a prompt's image is encoded and its tokens are read once in the rollout, and once more, forward and
    backward (three times the forward's FLOPs), in the update; its last state gives the logits of the first token of
    all its samples. Not shared: all of that once for every sample. In both the last token of a completion is never fed,
    every other one is decoded once (a product of as many rows as there are completions) and run once forward and
    backward; causal attention is counted by the pairs that are not masked. Left out: everything that is not a matrix
    product, and the optimizer.
    """
    rows, read = prompts * samples, prompts if shared else prompts * samples
    fed = new_tokens - 1
    prompt_pairs = read * prompt_tokens * (prompt_tokens + 1) // 2
    fed_pairs = rows * (fed * prompt_tokens + fed * (fed + 1) // 2)
    prefill = decoder_work(config, read * prompt_tokens, prompt_pairs, 1) + head_work(config, read, 1)
    decode = decoder_work(config, rows, 0, fed) + head_work(config, rows, fed)
    attention = Work(attention=decoder_work(config, 0, fed_pairs, 1).attention)
    update = decoder_work(config, read * prompt_tokens + rows * fed, prompt_pairs + fed_pairs, 3)
    return {
        "rollout": vision_work(config, read, False) + prefill + decode + attention,
        "update": vision_work(config, read, True) + update + head_work(config, read + rows * fed, 3),
    }


def measured_shape(product: Product) -> tuple[int, int, int]:
    return min(product.rows, MAX_MEASURED_ROWS), product.inner, product.columns


def measure_rates(products: Iterable[Product], seconds: float = 0.03) -> dict[tuple[int, int, int], float]:
    """FLOP/s of this core for each shape, the better of jax's and numpy's best run of three."""
    rng, rates = np.random.default_rng(SEED), {}
    multiply = jax.jit(jnp.matmul)
    for shape in sorted({measured_shape(product) for product in products}):
        rows, inner, columns = shape
        left, right = rng.random((rows, inner), np.float32), rng.random((inner, columns), np.float32)
        on_device = jnp.asarray(left), jnp.asarray(right)
        calls: list[Callable[[], Any]] = [
            lambda on_device=on_device: multiply(*on_device).block_until_ready(),
            lambda left=left, right=right: left @ right,
        ]
        best = min(_seconds_of(call, seconds) for call in calls)
        rates[shape] = 2 * math.prod(shape) / best
    return rates


def _seconds_of(call: Callable[[], Any], seconds: float) -> float:
    """CPU seconds of a call: the best of three runs, each of about `seconds`."""
    call()
    started = time.process_time()
    call()
    count = max(1, int(seconds / max(time.process_time() - started, 1e-6)))
    best = math.inf
    for _ in range(3):
        started = time.process_time()
        for _ in range(count):
            call()
        best = min(best, (time.process_time() - started) / count)
    return best


def floor(config: QwenConfig, prompts: int, samples: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """GFLOPs of a step and the seconds they take at rates measured here.

    `seconds`: every product at the rate of its own shape, also in the backward pass, where it is turned; attention,
    whose products are small, at the best rate of all. `seconds_at_best_rate`: everything at that.
    """
    sizes = prompts, samples, prompt_tokens, new_tokens
    works = {name: step_work(config, *sizes, shared) for name, shared in (("shared", True), ("repeated", False))}
    rates = measure_rates(one for work in works.values() for phase in work.values() for one in phase.products)
    best = max(rates.values())
    found: dict[str, Any] = {"best_gflops_per_s": round(best / 1e9, 1), "worst": round(min(rates.values()) / 1e9, 1)}
    for name, work in works.items():
        seconds = {
            phase: sum(one.flops / rates[measured_shape(one)] for one in each.products) + each.attention / best
            for phase, each in work.items()
        }
        total = sum(each.flops for each in work.values())
        found[name] = {
            "gflops": {phase: round(each.flops / 1e9, 3) for phase, each in work.items()},
            "attention_share": round(sum(each.attention for each in work.values()) / total, 4),
            "seconds": {phase: round(each, 4) for phase, each in seconds.items()},
            "seconds_of_step": round(sum(seconds.values()), 4),
            "seconds_at_best_rate": round(total / best, 4),
        }
    return found
