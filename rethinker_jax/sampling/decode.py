"""The compiled decode loop: slots, refilled inside the loop, each writing one request's completion.

A slot starts by feeding the *last prompt token* again, so the first token of a completion is drawn like every other.
All slots write their keys and values of loop step g to column g mod L of a ring: one in-place update, no scatter; a
slot's own columns are the last ones it wrote, and rotary positions are in the keys, so order in the ring does not
matter.

Inserted tokens (a prefix that another pass wrote, a Forced Rethinking trigger) go the same way as drawn ones: they
replace the draw. A trigger is fed when the first response ends by itself; no second prefill, no second encoding.
"""

import dataclasses
import functools
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from rethinker_jax.models.attention import MASKED
from rethinker_jax.models.qwen25vl import Model, Params
from rethinker_jax.models.sharding import ROWS
from rethinker_jax.sampling.choose import choose_tokens, uniforms
from rethinker_jax.sampling.prefill import LayerCache
from rethinker_jax.types import FIRST, SECOND, TRIGGER, FinishReason

RUNNING, STOP, LENGTH, STOP_STRING = range(4)  # codes of `Outputs.finish`
FINISH_REASONS: tuple[FinishReason, ...] = ("length", "stop", "length", "stop_string")


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests:
    """What is asked for; every array begins with [requests].

    prompt: row of the prefilled prompts. key: uint32 [·, 2]. budget: tokens of the first response.
    prefix_ids, prefix_segments [·, prefix]: tokens that are fed before anything is drawn.
    trigger_ids [·, trigger]: fed in place of the end token of the first response; trigger_length 0 = none.
    second_budget, second_temperature: of what follows a trigger.
    """

    prompt: Any
    key: Any
    budget: Any
    prefix_ids: Any
    prefix_segments: Any
    prefix_length: Any
    trigger_ids: Any
    trigger_length: Any
    max_first: Any
    second_budget: Any
    temperature: Any
    second_temperature: Any


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prefilled prompts: caches, lengths [prompts], m-RoPE position of the first completion token, last token."""

    caches: Any
    lengths: Any
    next_positions: Any
    last_tokens: Any


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """What may be drawn and what ends a completion: arrays, so that changing them compiles nothing."""

    allowed: Any  # bool [vocab]
    ends: Any  # bool [vocab]
    top_k: Any
    top_p: Any
    min_p: Any


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """[requests, length] tokens, log-probs, segments; [requests] lengths, finish codes, how first responses ended."""

    tokens: Any
    log_probs: Any
    segments: Any
    lengths: Any
    finish: Any
    first_end_token: Any  # the end token that a trigger replaced, -1 = none
    first_end_log_prob: Any


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The loop's state; every array begins with [slots]. request -1 = idle."""

    request: Any
    token: Any  # fed next
    emitted: Any  # completion tokens so far
    segment: Any
    written: Any  # tokens drawn or fed in the current segment
    prompt_caches: Any  # list of LayerCache, copied at refill
    ring: Any  # list of LayerCache


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoopState:
    step: Any  # loop steps made: the ring's clock
    next_request: Any
    busy: Any  # slot steps that wrote a token, for the utilisation
    slots: Slots
    outputs: Outputs


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the loop's state lies. Left to the compiler it would move in the first call, and the second compile again.

    slots: over the batch axes. caches: these and kv_heads over `tensor`. whole: on every device.
    """

    slots: NamedSharding
    caches: NamedSharding
    whole: NamedSharding

    @classmethod
    def on(cls, mesh: Mesh, num_slots: int, kv_heads: int) -> "Places":
        """Slots stay whole where the batch axes do not divide their number, kv_heads where `tensor` does not."""
        rows = ROWS if num_slots % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else PartitionSpec(None)
        heads = "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None
        specs = rows, PartitionSpec(*rows, heads), PartitionSpec()
        return cls(*[NamedSharding(mesh, spec) for spec in specs])

    def put(self, state: LoopState) -> LoopState:
        def place(tree: Any, sharding: NamedSharding) -> Any:
            return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding), tree)

        slots = dataclasses.replace(
            place(state.slots, self.slots),
            prompt_caches=place(state.slots.prompt_caches, self.caches),
            ring=place(state.slots.ring, self.caches),
        )
        return dataclasses.replace(place(state, self.whole), slots=slots)


@functools.partial(jax.jit, static_argnums=(0, 1, 3, 4, 5))
def start(model: Model, places: Places, prompts: Prompts, num_requests: int, num_slots: int, length: int) -> LoopState:
    """Idle slots and empty outputs; `length` bounds every completion, inserted tokens included."""
    config = model.config
    dtype, prompt_length = prompts.caches[0][0].dtype, prompts.caches[0][0].shape[-1]

    def empty(size: int) -> list[LayerCache]:
        shape = (num_slots, config.kv_heads)
        return [
            (jnp.zeros((*shape, config.head_dim, size), dtype), jnp.zeros((*shape, size, config.head_dim), dtype))
            for _ in range(config.layers)
        ]

    zeros = jnp.zeros(num_slots, jnp.int32)
    slots = Slots(zeros - 1, zeros, zeros, zeros, zeros, empty(prompt_length), empty(length))
    shape = (num_requests, length)
    counts = jnp.zeros(num_requests, jnp.int32)
    outputs = Outputs(
        jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int8), counts, counts,
        counts - 1, jnp.zeros(num_requests, jnp.float32),
    )  # fmt: skip
    zero = jnp.zeros((), jnp.int32)
    return places.put(LoopState(zero, zero, zero, slots, outputs))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=6)
def run(
    model: Model,
    places: Places,
    params: Params,
    prompts: Prompts,
    requests: Requests,
    rules: Rules,
    state: LoopState,
    num_requests: Any,
    num_steps: Any,
) -> LoopState:
    """Run `num_steps` loop steps, fewer if the first `num_requests` requests are finished. `state` is donated."""
    stop = state.step + num_steps

    def unfinished(state: LoopState) -> jax.Array:
        waiting = state.next_request < num_requests
        return (state.step < stop) & (waiting | (state.slots.request >= 0).any())

    def body(state: LoopState) -> LoopState:
        slots, next_request = _refill(state.slots, prompts, requests, state.next_request, num_requests)
        busy = state.busy + (slots.request >= 0).sum()
        logits, ring = _forward(model, params, prompts, requests, slots, state.step)
        slots = dataclasses.replace(slots, ring=ring)
        slots, outputs = _write_tokens(logits, slots, requests, rules, state.outputs)
        return LoopState(state.step + 1, next_request, busy, slots, outputs)

    return places.put(jax.lax.while_loop(unfinished, body, state))


def _refill(
    slots: Slots, prompts: Prompts, requests: Requests, next_request: jax.Array, num_requests: jax.Array
) -> tuple[Slots, jax.Array]:
    """Give waiting requests to idle slots, in order, and copy their prompts' caches."""
    idle = slots.request < 0
    candidate = next_request + jnp.cumsum(idle) - 1
    new = idle & (candidate < num_requests)
    request = jnp.where(new, candidate, slots.request)
    prompt = requests.prompt[jnp.maximum(request, 0)]

    def copy(caches: list[LayerCache]) -> list[LayerCache]:
        chosen = new[:, None, None, None]
        return jax.tree.map(lambda mine, store: jnp.where(chosen, store[prompt], mine), caches, prompts.caches)

    caches = jax.lax.cond(new.any(), copy, lambda caches: caches, slots.prompt_caches)
    return (
        Slots(
            request=request,
            token=jnp.where(new, prompts.last_tokens[prompt], slots.token),
            emitted=jnp.where(new, 0, slots.emitted),
            segment=jnp.where(new, FIRST, slots.segment),
            written=jnp.where(new, 0, slots.written),
            prompt_caches=caches,
            ring=slots.ring,
        ),
        next_request + new.sum(),
    )


def _forward(
    model: Model, params: Params, prompts: Prompts, requests: Requests, slots: Slots, step: jax.Array
) -> tuple[Float[Array, "slots vocab"], list[LayerCache]]:
    """One token through all layers: logits that follow `slots.token`, and the ring with its key and value."""
    prompt = requests.prompt[jnp.maximum(slots.request, 0)]
    position = prompts.next_positions[prompt] - 1 + slots.emitted
    angles = model.angles(jnp.broadcast_to(position[None, :, None], (3, position.shape[0], 1)))
    ring_length = slots.ring[0][0].shape[-1]
    column = step % ring_length
    age = (column - jnp.arange(ring_length)) % ring_length
    seen_ring = age[None, :] <= slots.emitted[:, None]
    # The prompt's last token is fed again, so its prefilled column is left out.
    seen_prompt = jnp.arange(slots.prompt_caches[0][0].shape[-1])[None, :] < prompts.lengths[prompt][:, None] - 1

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, cache: Any) -> tuple[jax.Array, LayerCache]:
        (prompt_keys, prompt_values), (ring_keys, ring_values) = cache
        ring_keys = jax.lax.dynamic_update_slice_in_dim(ring_keys, jnp.transpose(key, (0, 2, 3, 1)), column, axis=3)
        ring_values = jax.lax.dynamic_update_slice_in_dim(ring_values, value.swapaxes(1, 2), column, axis=2)
        num_slots, _, heads, head_dim = query.shape
        grouped = query.reshape(num_slots, key.shape[2], heads // key.shape[2], head_dim)
        context = attend_both(grouped, (prompt_keys, prompt_values, seen_prompt), (ring_keys, ring_values, seen_ring))
        return context.astype(query.dtype).reshape(query.shape), (ring_keys, ring_values)

    x = model.embed(params, slots.token[:, None])
    caches = list(zip(slots.prompt_caches, slots.ring, strict=True))
    x, ring = model.run_layers(params["text"]["layers"], x, angles, attend, caches)
    return model.logits(params, x[:, 0]), ring


def attend_both(
    query: Float[Array, "slots kv_heads group head_dim"], *caches: tuple[jax.Array, jax.Array, jax.Array]
) -> Float[Array, "slots kv_heads group head_dim"]:
    """One softmax over several caches of (K-major keys, values, seen [slots, length]); float32.

    Nothing is concatenated, and contexts are divided by the softmax's sum instead of the weights: this step is bound by
    the memory that it reads and writes.
    """
    scale = query.shape[-1] ** -0.5
    scores = []
    for keys, _, seen in caches:
        score = jnp.einsum("BKGH,BKHL->BKGL", query, keys, preferred_element_type=jnp.float32) * scale
        scores.append(jnp.where(seen[:, None, None, :], score, MASKED))
    top = functools.reduce(jnp.maximum, [score.max(axis=-1, keepdims=True) for score in scores])
    weights = [jnp.exp(score - top) for score in scores]
    total = sum(weight.sum(axis=-1, keepdims=True) for weight in weights)
    contexts = [
        jnp.einsum("BKGL,BKLH->BKGH", weight.astype(values.dtype), values, preferred_element_type=jnp.float32)
        for weight, (_, values, _) in zip(weights, caches, strict=True)
    ]
    return sum(contexts[1:], contexts[0]) / total


def _write_tokens(
    logits: jax.Array, slots: Slots, requests: Requests, rules: Rules, outputs: Outputs
) -> tuple[Slots, Outputs]:
    """Draw or insert the next token of every slot, write it down, and free the slots that are finished."""
    active = slots.request >= 0
    request = jnp.maximum(slots.request, 0)
    asked: Requests = jax.tree.map(lambda leaf: leaf[request], requests)
    second = slots.segment == SECOND
    temperature = jnp.where(second, asked.second_temperature, asked.temperature)
    noise = uniforms(asked.key, slots.segment, slots.emitted)
    drawn = choose_tokens(logits, noise, rules.allowed, temperature, rules.top_k, rules.top_p, rules.min_p)

    in_prefix = slots.emitted < asked.prefix_length
    in_trigger = (slots.segment == TRIGGER) & ~in_prefix
    ended = rules.ends[drawn] & ~in_prefix & ~in_trigger
    begins = ended & (slots.segment == FIRST) & (asked.trigger_length > 0) & (slots.emitted < asked.max_first)
    trigger_at = jnp.where(in_trigger, slots.written, 0)
    token = jnp.where(in_prefix, _pick(asked.prefix_ids, slots.emitted), drawn)
    token = jnp.where(in_trigger | begins, _pick(asked.trigger_ids, trigger_at), token)
    segment = jnp.where(in_prefix, _pick(asked.prefix_segments, slots.emitted), slots.segment)
    segment = jnp.where(begins, TRIGGER, segment)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    log_prob = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - log_z
    end_log_prob = jnp.take_along_axis(logits, drawn[:, None], axis=-1)[:, 0] - log_z

    # Idle slots write out of bounds, which is dropped.
    nowhere = outputs.lengths.shape[0]
    row = jnp.where(active, request, nowhere)
    ending = jnp.where(begins, row, nowhere)
    written = jnp.where(segment == slots.segment, slots.written, 0) + 1
    emitted = slots.emitted + 1
    budget = jnp.where(segment == SECOND, asked.second_budget, asked.budget)
    out_of_budget = (segment != TRIGGER) & (written >= budget) & ~in_prefix
    finish = jnp.where(ended & ~begins, STOP, jnp.where(out_of_budget, LENGTH, RUNNING))
    outputs = Outputs(
        tokens=outputs.tokens.at[row, slots.emitted].set(token, mode="drop"),
        log_probs=outputs.log_probs.at[row, slots.emitted].set(log_prob, mode="drop"),
        segments=outputs.segments.at[row, slots.emitted].set(segment.astype(jnp.int8), mode="drop"),
        lengths=outputs.lengths.at[row].set(emitted, mode="drop"),
        finish=outputs.finish.at[row].set(finish, mode="drop"),
        first_end_token=outputs.first_end_token.at[ending].set(drawn, mode="drop"),
        first_end_log_prob=outputs.first_end_log_prob.at[ending].set(end_log_prob, mode="drop"),
    )
    # A trigger that is done makes way for the second look; a prefix, for the segment after its last token.
    trigger_done = (segment == TRIGGER) & ~in_prefix & (written >= asked.trigger_length)
    prefix_done = in_prefix & (emitted >= asked.prefix_length)
    next_segment = jnp.where(trigger_done | (prefix_done & (segment == TRIGGER)), SECOND, segment)
    slots = dataclasses.replace(
        slots,
        request=jnp.where(active & (finish != RUNNING), -1, slots.request),
        token=token,
        emitted=emitted,
        segment=next_segment,
        written=jnp.where(next_segment == segment, written, 0),
    )
    return slots, outputs


def _pick(table: Int[Array, "slots width"], column: Int[Array, " slots"]) -> Int[Array, " slots"]:
    return jnp.take_along_axis(table, jnp.clip(column, 0, table.shape[1] - 1)[:, None], axis=1)[:, 0]
