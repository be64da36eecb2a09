"""Attention to a prefix, of every implementation: completions packed behind the prompts that they go on from.

The splash kernel runs in interpret mode here, and cuDNN's arguments through the XLA implementation that takes the same
ones. `test_attention.py` has them on a mesh and compiled for TPUs.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from test_attention import errors

from rethinker_jax.models.attention import Mask, Prefix, attend
from rethinker_jax.models.attention_kernels import BLOCK, PLAIN, WHOLE, Attention, attend_cudnn_behind, attend_in_blocks
from rethinker_jax.models.splash import Part

pytestmark = pytest.mark.usefixtures("quick_compilation")
SPLASH = Attention("splash", interpret=True)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Mask, Prefix], jax.Array]


def through_xla(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, prefix: Prefix) -> jax.Array:
    """What cuDNN is asked for, computed by XLA."""
    context = attend_cudnn_behind(query, key, value, mask, prefix, implementation="xla")
    return jnp.where(mask.real(query.shape[-3])[..., None, None], context, 0)


IMPLEMENTATIONS = pytest.mark.parametrize(
    "attention", [PLAIN, through_xla, SPLASH], ids=["plain", "cudnn's arguments", "splash"]
)


# --- rows as the update step packs them ---


def ids(*runs: tuple[int, int]) -> list[int]:
    """(id, how often) written out."""
    return [number for number, times in runs for _ in range(times)]


@dataclasses.dataclass(frozen=True)
class Case:
    """Segments of [rows, seq] and of [rows, prefix], as `Mask` and `Prefix` want them, and numbers of heads."""

    mask: Mask
    prefix_segments: np.ndarray
    query_segments: np.ndarray
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8

    def draw(self, dtype: type = jnp.float32) -> tuple[jax.Array, ...]:
        """Query, key, value, the prefix's key and value, and weights with which the context is summed."""
        rng = np.random.default_rng(3)
        (rows, seq), prefix = self.query_segments.shape, self.prefix_segments.shape[1]
        sizes = [(seq, self.heads), *[(seq, self.kv_heads)] * 2, *[(prefix, self.kv_heads)] * 2, (seq, self.heads)]
        return tuple(jnp.asarray(rng.normal(size=(rows, *size, self.head_dim)), dtype) for size in sizes)

    def seen(self) -> np.ndarray:
        """Which keys a query sees, the prefix's first, worked out anew: [rows, seq, prefix + seq]."""
        rows, seq = self.query_segments.shape
        places = np.arange(seq)
        own = np.ones((rows, seq), int) if self.mask.segments is None else np.array(self.mask.segments)
        if self.mask.lengths is not None:
            own[places >= self.mask.lengths[:, None]] = 0
        ids = np.concatenate([self.prefix_segments, own], axis=1)[:, None]
        prefix = self.prefix_segments.shape[1]
        of_query = np.repeat(np.stack([self.query_segments, own], axis=2), [prefix, seq], axis=2)
        past = np.concatenate([np.ones((seq, prefix), bool), places <= places[:, None]], axis=1)
        return (of_query == ids) & (ids > 0) & (past if self.mask.causal else True)


def packed(segments: list[list[int]], prefix: list[list[int]], query_segments: list[list[int]], **sizes: int) -> Case:
    mask = Mask(causal=True, segments=np.array(segments, np.int32))
    return Case(mask, np.array(prefix, np.int32), np.array(query_segments, np.int32), **sizes)


# Row 0: completions 1 and 2 of prompt 1, 3 of prompt 2, padding between and behind. Row 1: completion 1 of prompt 3,
# which has no keys; completion 2 of no prompt; completion 3 of prompt 1. Row 2 is empty, its prefix is not.
PACKED = packed(
    [
        ids((1, 11), (2, 9), (0, 3), (3, 14), (0, 10)),
        ids((1, 7), (2, 12), (3, 20), (0, 8)),
        ids((0, 47)),
    ],
    [ids((1, 9), (0, 2), (2, 7), (0, 4)), ids((1, 13), (2, 9)), ids((1, 20), (0, 2))],
    [
        ids((1, 20), (0, 3), (2, 14), (0, 10)),
        ids((3, 7), (0, 12), (1, 20), (0, 8)),
        ids((0, 47)),
    ],
)
LENGTHS = np.array([33, 7, 0], np.int32)
CASES = {
    "packed": PACKED,
    "own keys seen in full, heads of more than a lane": dataclasses.replace(
        PACKED, mask=Mask(segments=PACKED.mask.segments), heads=6, kv_heads=3, head_dim=136
    ),
    "several tiles, in blocks": packed(
        [ids((1, 130), (2, 100), (3, 60), (0, 10))],
        [ids((1, 260), (0, 5), (2, 300), (0, 36))],
        [ids((1, 230), (2, 60), (0, 10))],
        heads=2,
        kv_heads=1,
    ),
    "one completion a row": Case(
        Mask(causal=True, lengths=LENGTHS), np.array([ids((1, 9), (0, 6))] * 3), np.ones((3, 33), np.int32)
    ),
    "no padding": Case(Mask(causal=True), np.ones((2, 9), np.int32), np.ones((2, 16), np.int32)),
}


NAMES = "context", "query", "key", "value", "prefix key", "prefix value"


@functools.partial(jax.jit, static_argnums=0)
def gradients(attention: Attend, arrays: tuple[jax.Array, ...], mask: Mask, ids: tuple[jax.Array, jax.Array]) -> Any:
    def total(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        *own, prefix_key, prefix_value, weights = arrays
        context = attention(*own, mask, Prefix(prefix_key, prefix_value, *ids))
        return jnp.sum(context * weights, dtype=jnp.float32), context

    return jax.value_and_grad(total, has_aux=True)(arrays)


def values(attention: Attend, case: Case, arrays: tuple[jax.Array, ...]) -> dict[str, np.ndarray]:
    """Context and gradients, float32."""
    (_, context), found = gradients(attention, arrays, case.mask, (case.prefix_segments, case.query_segments))
    return {name: np.asarray(x, np.float32) for name, x in zip(NAMES, (context, *found[:5]), strict=True)}


def by_definition(case: Case) -> Attend:
    """`attend`, on all keys at once."""

    def run(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, prefix: Prefix) -> jax.Array:
        keys, values = (jnp.concatenate(pair, axis=1) for pair in ((prefix.key, key), (prefix.value, value)))
        context = attend(query, keys, values, jnp.asarray(case.seen()))
        return jnp.where(mask.real(query.shape[1])[..., None, None], context, 0)

    return run


# --- each implementation equals the definition ---


@pytest.mark.parametrize("case", CASES)
@IMPLEMENTATIONS
def test_implementations_agree(attention: Attend, case: str) -> None:
    """Forward and gradients, float32. Catches a softmax for each part, padding queries and padding keys that meet
    because both have the id 0, a prefix under the causal mask, heads that read another kv head, and a last block that
    is lost.

    The bound: contexts and gradients are sums of up to 900 products, rounded to 6e-8 each, in another order; measured
    are 7.1e-7 at most. Wrong answers are off by 1e-3 and more."""
    arrays = CASES[case].draw()
    wanted, found = values(by_definition(CASES[case]), CASES[case], arrays), values(attention, CASES[case], arrays)
    assert {name: error for name, error in errors(found, wanted).items() if not error < 1e-5} == {}


@IMPLEMENTATIONS
def test_bfloat16_rounds_operands_only(attention: Attend) -> None:
    """Root mean square error below 2^-8, the coarsest rounding of bfloat16. Catches parts whose log-sum-exp is rounded
    before they are merged. Plain has 2.4e-3 at most and splash 3.2e-3, with heads of 16. Their scale, 1/4, rounds
    nothing: with heads of 8 splash, which wants scaled queries, rounds these too, and has 4.1e-3."""
    case = dataclasses.replace(PACKED, head_dim=16)
    narrow = case.draw(jnp.bfloat16)
    wanted = values(by_definition(case), case, tuple(x.astype(jnp.float32) for x in narrow))
    found = values(attention, case, narrow)
    for name, array in wanted.items():
        assert np.sqrt(np.mean((found[name] - array) ** 2) / np.mean(array**2)) < 2**-8, name


# --- and means what it should ---


@IMPLEMENTATIONS
def test_one_softmax_by_hand(attention: Attend) -> None:
    """Queries are 0, so that all keys weigh the same; the prompt's three have the value 1, those of the two completions
    of four tokens 0. Token t of a completion sees 3 and t + 1 keys: 3 / (4 + t). A softmax for each part would give 1
    or 1/2, a prefix counted once for each completion 6 / (7 + t), and cross-talk 3 / (8 + t) in the second."""
    case = packed([ids((1, 4), (2, 4))], [ids((1, 3), (2, 1))], [ids((1, 8))], heads=1, kv_heads=1)
    zeros = jnp.zeros((1, 8, 1, 8))
    prefix = Prefix(zeros[:, :4], jnp.ones((1, 4, 1, 8)), case.prefix_segments, case.query_segments)
    found = jax.jit(attention)(zeros, zeros, zeros, case.mask, jax.tree.map(jnp.asarray, prefix))
    wanted = 2 * [3 / 4, 3 / 5, 3 / 6, 3 / 7]
    np.testing.assert_allclose(found[0, :, 0, 0], wanted, rtol=1e-6)


@IMPLEMENTATIONS
def test_packed_equals_each_completion_behind_its_prompt(attention: Attend) -> None:
    """A group's completions in one row, against a causal row for each: prompt, then completion. Contexts, gradients of
    the completions, and for the prompt the sum over its completions. Catches completions of a group that see each
    other, a prompt's gradient that comes from one completion alone, and keys of the prompt that count twice."""
    arrays = PACKED.draw()
    found = values(attention, PACKED, arrays)
    prompt_of = {1: 1, 2: 1, 3: 2}  # of the completions in row 0
    wanted = {name: np.zeros_like(array[0]) for name, array in found.items()}

    def alone(own: tuple[jax.Array, ...], weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        query, key, value, prefix_key, prefix_value = own
        keys, values = jnp.concatenate([prefix_key, key]), jnp.concatenate([prefix_value, value])
        prompt = jnp.zeros((len(prefix_key), *query.shape[1:]))  # its own contexts are not asked for
        queries = jnp.concatenate([prompt, query])
        context = attend(queries, keys, values, Mask(causal=True).dense(len(keys)))[len(prompt) :]
        return jnp.sum(context * weights), context

    run = jax.jit(jax.value_and_grad(alone, has_aux=True))
    for completion, prompt in prompt_of.items():
        own, before = PACKED.mask.segments[0] == completion, PACKED.prefix_segments[0] == prompt
        places = own, own, own, before, before
        parts = tuple(x[0][place] for x, place in zip(arrays, places, strict=False))
        (_, context), gradients = run(parts, arrays[5][0][own])
        for name, place, part in zip(NAMES, (own, *places), (context, *gradients), strict=True):
            wanted[name][place] += part
    found = {name: array[0] for name, array in found.items()}
    assert {name: error for name, error in errors(found, wanted).items() if not error < 1e-5} == {}


@IMPLEMENTATIONS
def test_what_is_not_seen_does_not_matter(attention: Attend) -> None:
    """Padding and the prompt's keys that nobody goes on from are huge. Catches masks that let a trace through, NaN out
    of queries or parts that see nothing, and gradients into padding."""
    arrays = PACKED.draw()
    real, seen = PACKED.mask.segments > 0, np.any(PACKED.seen()[..., :22], axis=1)
    places = real, real, real, seen, seen, real
    huge = tuple(jnp.where(place[..., None, None], x, 1e4) for x, place in zip(arrays, places, strict=True))
    wanted, found = values(attention, PACKED, arrays), values(attention, PACKED, huge)
    for name, place in zip(NAMES, (real, *places[:5]), strict=True):
        assert np.isfinite(found[name]).all()
        assert not found[name][~place].any() and found[name][place].any(), name
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6)


# --- what they are made of ---


def test_blocks_keep_no_scores() -> None:
    """Of a row that is longer than what is held at once, and no multiple of a block. Catches a loop whose scores are
    kept for the backward pass; those are [4 heads, 2000, 2100] in float32."""
    seq = 2000
    case = packed([ids((1, seq))], [ids((1, 100))], [ids((1, seq))])
    assert seq * (seq + 100) > WHOLE and seq % BLOCK
    *inputs, weights = case.draw()

    def total(way: Callable[..., jax.Array], inputs: list[jax.Array], seen: jax.Array) -> jax.Array:
        query, key, value, prefix_key, prefix_value = inputs
        keys, values = jnp.concatenate([prefix_key, key], axis=1), jnp.concatenate([prefix_value, value], axis=1)
        return jnp.sum(way(query, keys, values, seen) * weights)

    def bytes_of(way: Callable[..., jax.Array]) -> int:
        compiled = jax.jit(jax.grad(total, 1), static_argnums=0).lower(way, inputs, jnp.asarray(case.seen())).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert bytes_of(attend) > 4 * seq * (seq + 100) * 4 > 2 * bytes_of(attend_in_blocks)


def test_the_kernel_has_the_backward_pass_we_call() -> None:
    """jax does not promise it. Catches a version in which it takes other arguments: then `splash._part_backward` must
    be written anew, from what the kernel's own `defvjp` is given."""
    wanted = ["save_residuals", "mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name", "mask_function"]
    wanted += ["attn_logits_soft_cap", "interpret", "res", "do"]
    found = inspect.signature(splash._splash_attention_bwd).parameters
    message = f"jax {jax.__version__} has another backward pass of splash attention; models/splash.py calls it"
    assert list(found) == wanted, message
    kernel = Part(causal=True, heads=1, queries=128, keys=128, interpret=True).kernel()
    assert {*kernel.kwargs, "res", "do"} == set(wanted), message
    residuals = inspect.getsource(splash._splash_attention_bwd).partition(") = res")[0].rpartition("(\n")[2]
    order = "q k v segment_ids sinks o logsumexp dq_mask_info dkv_mask_info"
    assert residuals.replace(",", "").split() == order.split(), message
