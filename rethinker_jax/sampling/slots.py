"""What the decode loop holds, and where it lies: requests, prefilled prompts, slots, outputs.

Every array begins with a dimension that is cut over the shards of the batch axes: requests, prompts, slots, or one
number a shard. A shard sees only its own part, and numbers (a request's prompt, a slot's request) count in that part.
"""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rethinker_jax.models.sharding import ROWS, row_shards
from rethinker_jax.sampling.caches import Caches, empty_caches
from rethinker_jax.types import FinishReason

RUNNING, STOP, LENGTH, STOP_STRING = range(4)  # codes of `Outputs.finish`
FINISH_REASONS: tuple[FinishReason, ...] = ("length", "stop", "length", "stop_string")


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests:
    """What is asked for; every array begins with [requests].

    prompt: row of the prefilled prompts. key: uint32 [·, 2]. budget: tokens of the first response.
    prefix_ids, prefix_segments [·, prefix]: tokens that stand before anything is drawn. The caches of the first
    `resumed` are in row `resumed_from` of what is resumed, their log-probs in resumed_*; the others are fed.
    trigger_ids [·, trigger]: fed in place of the end token of the first response; trigger_length 0 = none.
    second_budget, second_temperature: of what follows a trigger.
    """

    prompt: Any
    key: Any
    budget: Any
    prefix_ids: Any
    prefix_segments: Any
    prefix_length: Any
    resumed: Any
    resumed_from: Any
    resumed_log_probs: Any
    resumed_truncated: Any
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
class Turn:
    """One turn of the loop, told each shard: [shards], and `stopped` bool [requests], completions to end first.

    num_steps: at most. limit: how many requests may be begun, because their prompts are there. total: of all waves.
    """

    num_steps: Any
    limit: Any
    total: Any
    stopped: Any


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """[requests, length] tokens, log-probs, segments; [requests] lengths, finish codes, how first responses ended.

    log_probs are under the full softmax, truncated under what was drawn from (0 where a token was inserted).
    """

    tokens: Any
    log_probs: Any
    truncated: Any
    segments: Any
    lengths: Any
    finish: Any
    first_end_token: Any  # the end token that a trigger replaced, -1 = none
    first_end_log_prob: Any
    first_end_truncated: Any


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """[slots], all. request -1 = idle."""

    request: Any
    prompt_length: Any
    position: Any  # m-RoPE position of the first completion token
    token: Any  # fed next
    emitted: Any  # completion tokens so far
    segment: Any
    written: Any  # tokens drawn or fed in the current segment
    prompt_caches: Any  # copied at refill
    ring: Any


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """[shards], all: loop steps, slot steps that wrote a token, and of both those after the last request was begun."""

    steps: Any
    busy: Any
    drain_steps: Any
    drain_busy: Any


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoopState:
    """clock, next_request: [shards]. The ring's next column is clock mod its length.

    kept: caches of finished requests, [requests, ...] in the order of feeding; None = they go with their slot.
    """

    clock: Any
    next_request: Any
    counts: Counts
    slots: Slots
    outputs: Outputs
    kept: Any


@dataclasses.dataclass(frozen=True)
class Places:
    """Where all this lies. Left to the compiler it would move in the first call, and the second compile again.

    shared: every shard has all prompts. tensor: the caches' kv heads are cut over `tensor`.
    """

    mesh: Mesh
    shared: bool
    tensor: bool

    @property
    def prompts(self) -> PartitionSpec:
        return PartitionSpec() if self.shared else ROWS

    def put(self, state: LoopState) -> LoopState:
        slots = dataclasses.replace(
            self.put_rows(state.slots),
            prompt_caches=self.put_caches(state.slots.prompt_caches),
            ring=self.put_caches(state.slots.ring),
        )
        return dataclasses.replace(self.put_rows(state), slots=slots, kept=self.put_caches(state.kept))

    def put_rows(self, tree: Any) -> Any:
        return self._constrain(tree, ROWS)

    def put_everywhere(self, tree: Any) -> Any:
        """Whole on every device: what the host of each process wants to see."""
        return self._constrain(tree, PartitionSpec())

    def put_caches(self, caches: Any, rows: PartitionSpec = ROWS) -> Any:
        first = rows[0] if len(rows) else None
        return self._constrain(caches, PartitionSpec(first, "tensor") if self.tensor else rows)

    def _constrain(self, tree: Any, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(self.mesh, spec)
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding), tree)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes of the loop, over all shards. `length` bounds every completion, inserted tokens included.

    ring: columns of the ring at first. kept: tokens of first responses whose caches are kept, 0 = none.
    """

    requests: int
    slots: int
    length: int
    ring: int
    kept: int = 0


def start(places: Places, prompts: Prompts, requests: Requests, sizes: Sizes) -> LoopState:
    """Idle slots and outputs that hold nothing but what is resumed. Call it inside jit."""
    keys = prompts.caches[0][0]
    layers, (_, kv_heads, head_dim, prompt_length) = len(prompts.caches), keys.shape
    shards = row_shards(places.mesh)

    def empty(rows: int, length: int) -> Caches:
        return empty_caches(layers, rows, kv_heads, head_dim, length, keys.dtype)

    idle = jnp.full(sizes.slots, -1, jnp.int32)
    zeros = jnp.zeros(sizes.slots, jnp.int32)
    slots = Slots(
        idle,
        zeros,
        zeros,
        zeros,
        zeros,
        zeros,
        zeros,
        empty(sizes.slots, prompt_length),
        empty(sizes.slots, sizes.ring),
    )
    none = jnp.zeros(shards, jnp.int32)
    state = LoopState(
        clock=none,
        next_request=none,
        counts=Counts(none, none, none, none),
        slots=slots,
        outputs=_outputs(requests, sizes),
        kept=empty(sizes.requests, sizes.kept) if sizes.kept else None,
    )
    return places.put(state)


def _outputs(requests: Requests, sizes: Sizes) -> Outputs:
    def begun(values: jax.Array) -> jax.Array:
        """[requests, length], beginning with what may be resumed."""
        empty = jnp.zeros((sizes.requests, sizes.length), values.dtype)
        return jax.lax.dynamic_update_slice(empty, values[:, : sizes.length], (0, 0))

    counts = jnp.zeros(sizes.requests, jnp.int32)
    log_probs = jnp.zeros(sizes.requests, jnp.float32)
    return Outputs(
        tokens=begun(requests.prefix_ids),
        log_probs=begun(requests.resumed_log_probs),
        truncated=begun(requests.resumed_truncated),
        segments=begun(requests.prefix_segments.astype(jnp.int8)),
        lengths=counts,
        finish=counts,
        first_end_token=counts - 1,
        first_end_log_prob=log_probs,
        first_end_truncated=log_probs,
    )
