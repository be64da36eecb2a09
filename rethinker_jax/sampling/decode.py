"""The compiled decode loop: slots, refilled inside the loop, each writing one request's completion.

A slot starts by feeding the *last prompt token* again, so the first token of a completion is drawn like every other.
All slots of a shard write their keys and values to the same column of a ring: one in-place update, no scatter. A slot's
own columns are the last ones it wrote, and rotary positions are in the keys, so order in the ring does not matter. The
ring is as long as the longest completion that is under way wants, and `resize` makes it longer.

Inserted tokens (a prefix that another pass wrote, a Forced Rethinking trigger) go the same way as drawn ones: they
replace the draw. A trigger is fed when the first response ends by itself; no second prefill, no second encoding. What
another pass wrote is not even fed where its cache is there: the slot begins behind it.

Every shard of the batch axes runs its own loop on its own slots and queue, as many steps as it needs; only `tensor`
communicates.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from rethinker_jax.models.qwen25vl import Model, Params
from rethinker_jax.models.sharding import ROWS
from rethinker_jax.sampling.caches import (
    Caches,
    LayerCache,
    as_cache,
    attend_caches,
    by_heads,
    by_kv_heads,
    copy_row,
    copy_turned,
    write_columns,
)
from rethinker_jax.sampling.choose import choose_tokens, uniforms
from rethinker_jax.sampling.slots import (
    LENGTH,
    RUNNING,
    STOP,
    STOP_STRING,
    Counts,
    LoopState,
    Outputs,
    Places,
    Prompts,
    Requests,
    Rules,
    Sizes,
    Slots,
    Turn,
    start,
)
from rethinker_jax.types import FIRST, SECOND, TRIGGER

begin = jax.jit(start, static_argnums=(0, 3))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=8)
def run(
    model: Model,
    places: Places,
    params: Params,
    prompts: Prompts,
    resumed: Caches | None,
    requests: Requests,
    rules: Rules,
    turn: Turn,
    state: LoopState,
) -> LoopState:
    """Run every shard until `turn` is over for it, its requests are finished, or it wants the next wave.

    `resumed` holds the caches that `requests.resumed_from` names, in the order of feeding. `state` is donated.
    """
    shards = jax.shard_map(
        functools.partial(_run_shard, model),
        mesh=places.mesh,
        in_specs=(PartitionSpec(), places.prompts, ROWS, ROWS, PartitionSpec(), ROWS, ROWS),
        out_specs=ROWS,
        axis_names=set(ROWS[0]),
        check_vma=False,
    )
    return places.put(shards(params, prompts, resumed, requests, rules, turn, state))


def _run_shard(
    model: Model,
    params: Params,
    prompts: Prompts,
    resumed: Caches | None,
    requests: Requests,
    rules: Rules,
    turn: Turn,
    state: LoopState,
) -> LoopState:
    refill = functools.partial(_refill, prompts, resumed, requests, turn.limit[0])
    stop = state.counts.steps[0] + turn.num_steps[0]
    # Back to the host for the next wave, but not where other shards have yet to begin requests of this one.
    more_comes = (turn.limit[0] < turn.total[0]) & (state.next_request[0] < turn.limit[0])

    def unfinished(state: LoopState) -> Bool[Array, ""]:
        active = state.slots.request >= 0
        return (state.counts.steps[0] < stop) & active.any() & ~(more_comes & ~active.all())

    def body(state: LoopState) -> LoopState:
        state = dataclasses.replace(state, counts=_count(state, turn))
        logits, ring = _forward(model, params, state)
        state = dataclasses.replace(state, clock=state.clock + 1, slots=dataclasses.replace(state.slots, ring=ring))
        slots, outputs, finish = _write_tokens(logits, state.slots, requests, rules, state.outputs)
        state = _free(dataclasses.replace(state, slots=slots, outputs=outputs), finish)
        return refill(state)

    active = state.slots.request >= 0
    stopped = active & turn.stopped[jnp.maximum(state.slots.request, 0)]
    state = refill(_free(state, jnp.where(stopped, STOP_STRING, RUNNING)))
    return jax.lax.while_loop(unfinished, body, state)


def _count(state: LoopState, turn: Turn) -> Counts:
    busy = (state.slots.request >= 0).sum()
    draining = state.next_request >= turn.total
    counts = state.counts
    return Counts(
        steps=counts.steps + 1,
        busy=counts.busy + busy,
        drain_steps=counts.drain_steps + draining,
        drain_busy=counts.drain_busy + jnp.where(draining, busy, 0),
    )


def _refill(
    prompts: Prompts, resumed: Caches | None, requests: Requests, limit: Int[Array, ""], state: LoopState
) -> LoopState:
    """Give waiting requests to idle slots, in order, and copy the caches of their prompts, slot by slot."""
    slots = state.slots
    idle = slots.request < 0
    candidate = state.next_request[0] + jnp.cumsum(idle) - 1
    new = idle & (candidate < limit)
    request = jnp.where(new, candidate, slots.request)
    asked = jnp.maximum(request, 0)
    prompt, begun = requests.prompt[asked], requests.resumed[asked]

    def copy(slot: jax.Array, caches: tuple[Caches, Caches]) -> tuple[Caches, Caches]:
        mine, ring = caches
        mine = [copy_row(one, slot, store, prompt[slot]) for one, store in zip(mine, prompts.caches, strict=True)]
        if resumed is not None:
            # The column of token 0 comes as many columns before the clock as tokens were fed since.
            turn = state.clock[0] % ring[0][0].shape[-1] - begun[slot]
            row = requests.resumed_from[asked[slot]]
            ring = [copy_turned(one, slot, store, row, turn) for one, store in zip(ring, resumed, strict=True)]
        return mine, ring

    prompt_caches, ring = _for_each(new, copy, (slots.prompt_caches, slots.ring))
    last_begun = _pick(requests.prefix_ids[asked], begun - 1)
    slots = Slots(
        request=request,
        prompt_length=jnp.where(new, prompts.lengths[prompt], slots.prompt_length),
        position=jnp.where(new, prompts.next_positions[prompt], slots.position),
        token=jnp.where(new, jnp.where(begun > 0, last_begun, prompts.last_tokens[prompt]), slots.token),
        emitted=jnp.where(new, begun, slots.emitted),
        segment=jnp.where(new, FIRST, slots.segment),
        written=jnp.where(new, begun, slots.written),
        prompt_caches=prompt_caches,
        ring=ring,
    )
    return dataclasses.replace(state, slots=slots, next_request=state.next_request + new.sum())


def _for_each(chosen: Bool[Array, " slots"], do: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
    """do(slot, carry) for the chosen slots: what is not chosen costs nothing."""
    order = jnp.nonzero(chosen, size=chosen.shape[0], fill_value=0)[0]
    return jax.lax.fori_loop(0, chosen.sum(), lambda place, carry: do(order[place], carry), carry)


def _forward(model: Model, params: Params, state: LoopState) -> tuple[Float[Array, "slots vocab"], Caches]:
    """One token through all layers: logits that follow `slots.token`, and the ring with its key and value."""
    slots = state.slots
    position = slots.position - 1 + slots.emitted
    angles = model.angles(jnp.broadcast_to(position[None, :, None], (3, position.shape[0], 1)))
    ring_length = slots.ring[0][0].shape[-1]
    column = state.clock[0] % ring_length
    age = (column - jnp.arange(ring_length)) % ring_length
    seen_ring = age[None, None, :] <= slots.emitted[:, None, None]
    # The prompt's last token is fed again, so its prefilled column is left out.
    columns = jnp.arange(slots.prompt_caches[0][0].shape[-1])
    seen_prompt = columns[None, None, :] < slots.prompt_length[:, None, None] - 1

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, cache: Any) -> tuple[jax.Array, LayerCache]:
        prompt_cache, ring = cache
        ring = write_columns(ring, as_cache(key, value), column)
        context = attend_caches(by_kv_heads(query, key.shape[2]), (*prompt_cache, seen_prompt), (*ring, seen_ring))
        return by_heads(context, 1).astype(query.dtype), ring

    x = model.embed(params, slots.token[:, None])
    caches = list(zip(slots.prompt_caches, slots.ring, strict=True))
    x, ring = model.run_layers(params["text"]["layers"], x, angles, attend, caches)
    # Whole on every device of `tensor`: choosing a token asks the whole vocabulary dozens of times, one by one.
    return jax.lax.with_sharding_constraint(model.logits(params, x[:, 0]), PartitionSpec()), ring


def _write_tokens(
    logits: Float[Array, "slots vocab"], slots: Slots, requests: Requests, rules: Rules, outputs: Outputs
) -> tuple[Slots, Outputs, Int[Array, " slots"]]:
    """Draw or insert the next token of every slot and write it down; how each slot's completion ended, if it did."""
    active = slots.request >= 0
    request = jnp.maximum(slots.request, 0)
    asked: Requests = jax.tree.map(lambda leaf: leaf[request], requests)
    second = slots.segment == SECOND
    temperature = jnp.where(second, asked.second_temperature, asked.temperature)
    noise = uniforms(asked.key, slots.segment, slots.emitted)
    drawn, truncated = choose_tokens(logits, noise, rules.allowed, temperature, rules.top_k, rules.top_p, rules.min_p)

    in_prefix = slots.emitted < asked.prefix_length
    in_trigger = (slots.segment == TRIGGER) & ~in_prefix
    ended = rules.ends[drawn] & ~in_prefix & ~in_trigger
    begins = ended & (slots.segment == FIRST) & (asked.trigger_length > 0) & (slots.emitted < asked.max_first)
    trigger_at = jnp.where(in_trigger, slots.written, 0)
    token = jnp.where(in_prefix, _pick(asked.prefix_ids, slots.emitted), drawn)
    token = jnp.where(in_trigger | begins, _pick(asked.trigger_ids, trigger_at), token)
    segment = jnp.where(in_prefix, _pick(asked.prefix_segments, slots.emitted), slots.segment)
    segment = jnp.where(begins, TRIGGER, segment)
    inserted = in_prefix | in_trigger | begins
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
        truncated=outputs.truncated.at[row, slots.emitted].set(jnp.where(inserted, 0.0, truncated), mode="drop"),
        segments=outputs.segments.at[row, slots.emitted].set(segment.astype(jnp.int8), mode="drop"),
        lengths=outputs.lengths.at[row].set(emitted, mode="drop"),
        finish=outputs.finish,
        first_end_token=outputs.first_end_token.at[ending].set(drawn, mode="drop"),
        first_end_log_prob=outputs.first_end_log_prob.at[ending].set(end_log_prob, mode="drop"),
        first_end_truncated=outputs.first_end_truncated.at[ending].set(truncated, mode="drop"),
    )
    # A trigger that is done makes way for the second look; a prefix, for the segment after its last token.
    trigger_done = (segment == TRIGGER) & ~in_prefix & (written >= asked.trigger_length)
    prefix_done = in_prefix & (emitted >= asked.prefix_length)
    next_segment = jnp.where(trigger_done | (prefix_done & (segment == TRIGGER)), SECOND, segment)
    slots = dataclasses.replace(
        slots,
        token=token,
        emitted=emitted,
        segment=next_segment,
        written=jnp.where(next_segment == segment, written, 0),
    )
    return slots, outputs, jnp.where(active, finish, RUNNING)


def _free(state: LoopState, finish: Int[Array, " slots"]) -> LoopState:
    """Write down how completions ended and free their slots; keep their caches if that is wanted."""
    slots, outputs = state.slots, state.outputs
    ended = finish != RUNNING
    row = jnp.where(ended, slots.request, outputs.finish.shape[0])
    kept = state.kept
    if kept is not None:

        def keep(slot: jax.Array, kept: Caches) -> Caches:
            turn = slots.emitted[slot] - state.clock[0] % slots.ring[0][0].shape[-1]
            return [
                copy_turned(store, slots.request[slot], ring, slot, turn)
                for store, ring in zip(kept, slots.ring, strict=True)
            ]

        kept = _for_each(ended, keep, kept)
    return dataclasses.replace(
        state,
        slots=dataclasses.replace(slots, request=jnp.where(ended, -1, slots.request)),
        outputs=dataclasses.replace(outputs, finish=outputs.finish.at[row].set(finish, mode="drop")),
        kept=kept,
    )


def _pick(table: Int[Array, "slots width"], column: Int[Array, " slots"]) -> Int[Array, " slots"]:
    return jnp.take_along_axis(table, jnp.clip(column, 0, table.shape[1] - 1)[:, None], axis=1)[:, 0]


def resize(places: Places, length: int, state: LoopState) -> LoopState:
    """The state with a longer ring, its oldest column first. The clock of every shard becomes the old length.

    Layer by layer, and `state` is taken over: a second ring is never there as a whole.
    """
    old = state.slots.ring[0][0].shape[-1]
    ring = []
    for layer in state.slots.ring:
        ring.append(_lengthen(places, length, state.clock, layer))
        for array in layer:
            array.delete()
    slots = dataclasses.replace(state.slots, ring=ring)
    return dataclasses.replace(state, clock=_set_clock(places, old, state.clock), slots=slots)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _lengthen(places: Places, length: int, clock: Int[Array, " shards"], layer: LayerCache) -> LayerCache:
    old = layer[0].shape[-1]

    def shard(clock: jax.Array, layer: LayerCache) -> LayerCache:
        def one(array: jax.Array, axis: int) -> jax.Array:
            turned = jnp.roll(array, -(clock[0] % old), axis=axis)
            return jnp.pad(turned, [(0, length - old if place == axis else 0) for place in range(4)])

        return one(layer[0], 3), one(layer[1], 2)

    shards = jax.shard_map(
        shard, mesh=places.mesh, in_specs=ROWS, out_specs=ROWS, axis_names=set(ROWS[0]), check_vma=False
    )
    return places.put_caches(shards(clock, layer))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _set_clock(places: Places, value: int, clock: Int[Array, " shards"]) -> Int[Array, " shards"]:
    return places.put_rows(jnp.full_like(clock, value))


__all__ = ["Sizes", "begin", "resize", "run"]
