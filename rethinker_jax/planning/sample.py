"""The sampler's programs, compiled for a mesh whose devices are not there: new layout, prefill of a wave, decode loop.

Sizes are found as a call of the sampler finds them (`sampling/call.py`), for a whole rollout batch at its longest.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rethinker_jax.config import Config
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.models.sharding import ROWS, row_shardings, row_shards
from rethinker_jax.planning.layouts import Layout, bytes_per_device, placed
from rethinker_jax.planning.work import Longest, make_prompt, prompt_work, shapes_of
from rethinker_jax.prompts.windows import choose_bucket
from rethinker_jax.sampling import decode, slots
from rethinker_jax.sampling.memory import SHARE, CacheNeeds, CachePlan, plan_caches
from rethinker_jax.sampling.prefill import kv_copies, prefill, sampling_layout
from rethinker_jax.sampling.requests import Asked, Request
from rethinker_jax.sampling.schedule import Schedule, make_schedule
from rethinker_jax.sampling.tables import drawing_rules, request_table
from rethinker_jax.types import Problem

GIB = 2**30
KEPT_PART = ("prompt_caches", "ring", "kept")  # of the loop's state: caches, which `tensor` may cut


@dataclasses.dataclass(frozen=True)
class SampleWork:
    """One rollout batch: what of it lies in the caches at once, and which request goes where.

    most_slots: that would have room, were `sampling.num_slots` not there.
    """

    needs: CacheNeeds
    plan: CachePlan
    schedule: Schedule
    prompt_tokens: int
    tensor_divides: bool
    asked: Asked
    most_slots: int

    @property
    def num_waves(self) -> int:
        return len(self.schedule.waves)

    @property
    def num_steps(self) -> int:
        """Of the decode loop of one shard, where every completion is as long as it may be."""
        slots_of_shard = self.plan.num_slots // self.schedule.shards
        return -(-int(self.schedule.totals.max()) // slots_of_shard) * self.asked.budgets.total


def tensor_divides(qwen: QwenConfig, mesh: Mesh) -> bool:
    return qwen.kv_heads * kv_copies(qwen, mesh) % mesh.shape["tensor"] == 0


def cache_needs(config: Config, qwen: QwenConfig, longest: Longest, mesh: Mesh, itemsize: int) -> CacheNeeds:
    """What a call of the sampler would ask for, for the rollout batch of a step."""
    rows, samples, settings = config.rollout.prompts_per_step, config.rollout.samples_per_prompt, config.sampling
    prompt_tokens = choose_bucket(longest.prompt_tokens, config.buckets.prompt_tokens, 32)
    heads = qwen.kv_heads * kv_copies(qwen, mesh) // (mesh.shape["tensor"] if tensor_divides(qwen, mesh) else 1)
    shards = row_shards(mesh)
    keeps = config.rethink.rule == "paper"
    return CacheNeeds(
        bytes_per_token=qwen.layers * 2 * heads * qwen.head_dim * itemsize,
        shards=shards,
        num_slots=min(settings.num_slots or rows * samples, rows * samples),
        prompt_tokens=prompt_tokens,
        new_tokens=longest.budgets.total,
        num_prompts=rows,
        wave_rows=max(1, settings.prefill_tokens // prompt_tokens) * shards,
        kept_rows=-(-rows // shards) * samples,
        kept_tokens=min(longest.budgets.first, config.rethink.max_first_tokens) if keeps else 0,
    )


def room_for(config: Config, usable: int, held: int) -> int:
    """Bytes that caches may take on a device with `usable` bytes, of which `held` are taken: as the sampler asks it."""
    gib = config.sampling.cache_gib
    return int(gib * GIB) if gib else int(SHARE * max(0, usable - held))


def sample_work(layout: Layout, longest: Longest, usable: int, held: int) -> SampleWork:
    """Raises UserError where one completion does not fit."""
    config, qwen, mesh = layout.config, layout.qwen, layout.mesh
    needs = cache_needs(config, qwen, longest, mesh, np.dtype(layout.dtype).itemsize)
    room = room_for(config, usable, held)
    plan = plan_caches(needs, room)
    most = plan_caches(dataclasses.replace(needs, num_slots=needs.shards * needs.kept_rows), room).num_slots
    rows, samples = config.rollout.prompts_per_step, config.rollout.samples_per_prompt
    schedule = make_schedule(
        [number // samples for number in range(rows * samples)], rows, shards=needs.shards, shared=plan.shared,
        wave_rows=plan.wave_rows, requests_per_prompt=samples, images_of=[[number] for number in range(rows)],
    )  # fmt: skip
    like = make_prompt(qwen, longest, "")
    prompts = [dataclasses.replace(like, problem=Problem(str(number), "", "")) for number in range(rows)]
    trigger = np.zeros(longest.budgets.trigger_width, np.int32)
    requests = [Request(prompt, sample, trigger) for prompt in prompts for sample in range(samples)]
    asked = Asked(tuple(requests), config.sampling, longest.budgets, (0, 0), config.rethink.temperature)
    return SampleWork(needs, plan, schedule, needs.prompt_tokens, tensor_divides(qwen, mesh), asked, most)


def lower_layout(layout: Layout) -> Any:
    """Training parameters → the sampler's: cast, gathered over fsdp, a list of layers."""
    convert = functools.partial(sampling_layout, layout.model, mesh=layout.mesh, dtype=layout.dtype)
    return jax.jit(lambda params: convert(params)).lower(layout.params)


def sampling_params(layout: Layout, compiled_layout: Any) -> Any:
    """The sampler's parameters as shapes, in their places."""
    convert = functools.partial(sampling_layout, layout.model, mesh=layout.mesh, dtype=layout.dtype)
    shapes = jax.eval_shape(lambda params: convert(params), layout.params)
    return placed(shapes, compiled_layout.output_shardings)


def _places(layout: Layout, work: SampleWork) -> slots.Places:
    return slots.Places(layout.mesh, work.schedule.shared, work.tensor_divides)


def lower_prefill(layout: Layout, longest: Longest, work: SampleWork, params: Any) -> Any:
    """Of a full wave."""
    mesh, config = layout.mesh, layout.config
    num_rows, shards = work.schedule.waves.shape[1], work.schedule.shards
    padded = dataclasses.replace(longest, prompt_tokens=work.prompt_tokens)
    batch = prompt_work(config, layout.qwen, padded, num_rows, shards)
    batch = placed(batch, row_shardings(batch, mesh, 0, {"positions": 1}))
    per_shard, most = work.prompt_tokens * (-(-num_rows // shards)), config.sampling.prefill_tokens
    chunk = -(-work.prompt_tokens // -(-per_shard // most)) if per_shard > most else 0
    return prefill.lower(layout.model, _places(layout, work), params, batch, chunk, num_rows)


def lower_decode(layout: Layout, work: SampleWork, params: Any) -> tuple[Any, int]:
    """The loop with its ring at its longest, and bytes of a device that the loop's state takes."""
    qwen, mesh, schedule, budgets = layout.qwen, layout.mesh, work.schedule, work.asked.budgets
    places = _places(layout, work)
    prompts = _prompt_shapes(layout, work, places)
    table = request_table(work.asked, schedule, [0] * len(work.asked.requests), schedule.round_place)
    rows = NamedSharding(mesh, ROWS)
    requests = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows), table)
    sizes = slots.Sizes(
        schedule.num_rows, work.plan.num_slots, budgets.total, budgets.total,
        work.needs.kept_tokens if work.plan.keep_responses else 0,
    )  # fmt: skip
    state = jax.eval_shape(lambda prompts, requests: slots.start(places, prompts, requests, sizes), prompts, requests)
    caches = NamedSharding(mesh, PartitionSpec(ROWS[0], "tensor") if places.tensor else ROWS)

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        is_cache = any(getattr(step, "name", "") in KEPT_PART for step in path)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=caches if is_cache else rows)

    state = jax.tree_util.tree_map_with_path(place, state)
    none = np.zeros(0, np.int32)
    rules = drawing_rules(qwen.vocab, none, (), work.asked.settings)
    counts = np.zeros(schedule.shards, np.int32)
    turn = slots.Turn(counts, counts, counts, np.zeros(schedule.num_rows, bool))
    lowered = decode.run.lower(layout.model, places, params, prompts, None, requests, rules, turn, state)
    return lowered, bytes_per_device(state)


def _prompt_shapes(layout: Layout, work: SampleWork, places: slots.Places) -> slots.Prompts:
    """The prefilled prompts of one wave."""
    qwen, mesh = layout.qwen, layout.mesh
    heads, rows = qwen.kv_heads * kv_copies(qwen, mesh), work.schedule.waves.shape[1]
    first = places.prompts[0] if len(places.prompts) else None
    caches = NamedSharding(mesh, PartitionSpec(first, "tensor") if places.tensor else places.prompts)
    keys = (rows, heads, qwen.head_dim, work.prompt_tokens)
    values = (rows, heads, work.prompt_tokens, qwen.head_dim)
    pair = tuple(jax.ShapeDtypeStruct(shape, layout.dtype, sharding=caches) for shape in (keys, values))
    numbers = shapes_of(np.zeros(rows, np.int32))
    return slots.Prompts([pair] * qwen.layers, numbers, numbers, numbers)
