"""Token choice: from logits and one uniform number a row to a token, without sorting the vocabulary."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Bool, Float, Int, UInt32

BLOCK = 64  # of the inverse CDF: float32 sums stay short, and no 150k-long prefix sum is made


def request_keys(
    seed: UInt32[Array, " requests"],
    step: int | Array,
    problem_hash: Int[Array, " requests"],
    sample: Int[Array, " requests"],
) -> UInt32[Array, "requests 2"]:
    """Raw threefry keys, one a request: randomness is named by (seed, step, problem, sample) and nothing else."""

    def fold(seed: jax.Array, problem: jax.Array, number: jax.Array) -> jax.Array:
        step_key = jax.random.fold_in(jax.random.key(seed), step)
        return jax.random.fold_in(jax.random.fold_in(step_key, problem), number)

    return jax.random.key_data(jax.vmap(fold)(seed, problem_hash, sample))


def uniforms(
    keys: UInt32[Array, "slots 2"], segment: Int[Array, " slots"], position: Int[Array, " slots"]
) -> Float[Array, " slots"]:
    """One number in [0, 1) a slot, a function of its request's key, the segment, and the position in the completion.

    One threefry block a slot, with (segment, position) as its counter; folding both into the key would take three.
    """
    counter = segment.astype(jnp.uint32), position.astype(jnp.uint32)
    bits, _ = threefry2x32_p.bind(keys[:, 0], keys[:, 1], *counter)
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def choose_tokens(
    logits: Float[Array, "slots vocab"],
    uniform: Float[Array, " slots"],
    allowed: Bool[Array, " vocab"],
    temperature: Float[Array, " slots"],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    min_p: Float[Array, ""],
) -> tuple[Int[Array, " slots"], Float[Array, " slots"]]:
    """(a token a row, its log-prob under what it was drawn from); temperature 0 takes the most probable allowed one.

    The order is temperature, top-k, top-p, min-p, as in transformers. top_k 0, top_p 1 and min_p 0 switch them off;
    ties at a threshold are all kept. A greedy token has log-prob 0.
    """
    vocab = logits.shape[-1]
    masked = jnp.where(allowed, logits, -jnp.inf)
    top = jnp.max(masked, axis=-1, keepdims=True)
    # The first of the largest; `argmax` compiles to a loop of scalars on CPUs.
    greedy = jnp.min(jnp.where(masked == top, jnp.arange(vocab), vocab - 1), axis=-1)
    # The largest logit is taken off before the division, which a temperature near zero would make overflow.
    weights = jnp.exp((masked - top) / jnp.where(temperature > 0, temperature, 1.0)[:, None])
    probs = weights / weights.sum(axis=-1, keepdims=True)
    truncating = (top_k > 0) | (top_p < 1.0) | (min_p > 0)
    probs = jax.lax.cond(truncating, lambda p: _truncate(p, top_k, top_p, min_p), lambda p: p, probs)
    drawn = _inverse_cdf(probs, uniform)
    log_prob = jnp.log(jnp.take_along_axis(probs, drawn[:, None], axis=-1)[:, 0] / probs.sum(axis=-1))
    return jnp.where(temperature > 0, drawn, greedy), jnp.where(temperature > 0, log_prob, 0.0)


def _inverse_cdf(probs: Float[Array, "slots vocab"], uniform: Float[Array, " slots"]) -> Int[Array, " slots"]:
    """First token at which the running sum exceeds uniform · total, found in blocks of blocks from the coarsest down.

    A token of probability zero is never returned. The running sums alone do not promise it: rounding may let them rise
    where nothing is added, or leave the last one with mass below the target.
    """
    levels = [probs]
    while levels[-1].shape[-1] > BLOCK:
        levels.append(_blocks(levels[-1]).sum(axis=-1))
    index = jnp.zeros(probs.shape[0], jnp.int32)
    target = uniform * levels[-1].sum(axis=-1)
    places = jnp.arange(BLOCK)
    for masses in reversed(levels):
        block = jnp.take_along_axis(_blocks(masses), index[:, None, None], axis=1)[:, 0]
        upto = places[:, None] <= places[None, :]
        sums = jnp.einsum("BP,PQ->BQ", block, upto.astype(block.dtype), precision=jax.lax.Precision.HIGHEST)
        possible = block > 0
        last = jnp.max(jnp.where(possible, places, 0), axis=-1)
        above = jnp.min(jnp.where(possible & (sums > target[:, None]), places, BLOCK), axis=-1)
        place = jnp.minimum(above, last)
        target = target - jnp.sum(jnp.where(places < place[:, None], block, 0.0), axis=-1)
        index = index * BLOCK + place
    return index


def _blocks(masses: Float[Array, "slots length"]) -> Float[Array, "slots blocks block"]:
    slots, length = masses.shape
    num_blocks = -(-length // BLOCK)
    return jnp.pad(masses, ((0, 0), (0, num_blocks * BLOCK - length))).reshape(slots, num_blocks, BLOCK)


def _truncate(probs: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)  # order of non-negative floats is the order of their bits
    by_k = _largest_threshold(bits, lambda keep: keep.sum(axis=-1) >= top_k)
    probs = jnp.where((top_k > 0) & (bits < by_k[:, None]), 0.0, probs)
    total = probs.sum(axis=-1)
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)
    by_p = _largest_threshold(bits, lambda keep: jnp.where(keep, probs, 0.0).sum(axis=-1) >= top_p * total)
    by_p = jnp.minimum(by_p, bits.max(axis=-1))  # the most probable token stays, also under top_p 0
    probs = jnp.where((top_p < 1.0) & (bits < by_p[:, None]), 0.0, probs)
    return jnp.where(probs < min_p * probs.max(axis=-1, keepdims=True), 0.0, probs)


def _largest_threshold(bits: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Largest threshold per row at which `enough(bits >= threshold)` holds, by bisection over 31 bits."""

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        good = enough(bits >= middle[:, None])
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    low = jnp.zeros(bits.shape[0], jnp.int32)
    high = jnp.full(bits.shape[0], 0x7F800000, jnp.int32)
    return jax.lax.fori_loop(0, 31, halve, (low, high))[0]
