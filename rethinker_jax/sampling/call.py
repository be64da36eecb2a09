"""One call of the sampler under way.

The host looks every `steps_per_call` steps: it fetches the completions that ended, prefills the next wave of prompts
once all requests of the last one were begun, sends the device on its way, and hands the completions over, so that they
are judged while others are drawn.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from rethinker_jax import peers
from rethinker_jax.config import BucketsConfig
from rethinker_jax.errors import UserError
from rethinker_jax.models.qwen25vl import Model, Params
from rethinker_jax.models.sharding import ROWS, place_rows, put, row_shards, shards_here
from rethinker_jax.processes import exchange
from rethinker_jax.prompts.batch import pack_prompts, unique_images
from rethinker_jax.prompts.template import ChatTokenizer
from rethinker_jax.prompts.windows import VisionGeometry, bucket, choose_bucket
from rethinker_jax.sampling import decode, slots
from rethinker_jax.sampling.caches import Caches
from rethinker_jax.sampling.completions import Drawn, Reader
from rethinker_jax.sampling.memory import CacheNeeds, CachePlan, plan_caches, room_for_caches
from rethinker_jax.sampling.prefill import kv_copies, prefill, prefill_responses
from rethinker_jax.sampling.requests import Asked, Counters, Kept
from rethinker_jax.sampling.schedule import make_schedule
from rethinker_jax.sampling.tables import drawing_rules, request_table
from rethinker_jax.types import TRIGGER

MOST_STEPS = 1 << 20  # of one turn: counters are 32 bits
BLOCK = 16  # completions that are fetched together: one compiled copy serves any number of them
Copies = list[tuple[list[int], slots.Outputs]]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What stays the same from call to call.

    never: ids that are never drawn. ring: columns of the slots' caches at first; they double as completions grow.
    plans: what was planned, by what was asked for.
    """

    model: Model
    mesh: Mesh
    tokenizer: ChatTokenizer
    geometry: VisionGeometry
    end_ids: tuple[int, ...]
    never: np.ndarray
    buckets: BucketsConfig
    ring: int = 256
    plans: dict[Any, CachePlan] = dataclasses.field(default_factory=dict, repr=False, compare=False)


class Call:
    """One call of `generate` under way: where the requests lie on the device, and what the host knows of it."""

    def __init__(
        self,
        sampler: Setup,
        params: Params,
        asked: Asked,
        kept: Kept | None,
        num_prompts: int | None,
        num_requests: int | None,
    ):
        self.sampler, self.params, self.asked, self.kept = sampler, params, asked, kept
        self.reusing = kept is not None and kept.filled
        requests = asked.requests
        prompts = kept.prompts if kept is not None and kept.filled else [one.prompt for one in requests]
        self.prompts = list({id(prompt): prompt for prompt in prompts}.values())
        number_of = {id(prompt): number for number, prompt in enumerate(self.prompts)}
        prompt_of = [number_of[id(request.prompt)] for request in requests]
        rows = max(num_prompts or 0, len(self.prompts))
        per_prompt = max(int(np.bincount(prompt_of).max()), -(-(num_requests or 0) // rows))

        self.prompt_tokens = choose_bucket(max(map(len, self.prompts)), sampler.buckets.prompt_tokens, 32)
        self.shards = row_shards(sampler.mesh)
        self.plan = self._plan(rows, per_prompt)
        # What was kept is found where the call before put it.
        layout = kept.layout if kept is not None and kept.layout else (self.plan.shared, self.plan.wave_rows)
        self.schedule = make_schedule(
            prompt_of, rows, shards=self.shards, shared=layout[0], wave_rows=layout[1],
            requests_per_prompt=per_prompt, images_of=[[id(image) for image in one.images] for one in self.prompts],
            shard_of=self._kept_shards(), round_requests=self._choose_resumed(),
        )  # fmt: skip
        self.request_of = np.full(self.schedule.num_rows, -1)
        self.request_of[self.schedule.row_of] = np.arange(len(requests))

        self.places = slots.Places(sampler.mesh, self.schedule.shared, self._tensor_divides())
        self.reader = Reader(sampler.tokenizer, asked.settings.stop_strings)
        self.rules = drawing_rules(sampler.model.config.vocab, sampler.never, sampler.end_ids, asked.settings)
        self.num_images = self.num_prefilled = self.read_tokens = self.fed_tokens = 0
        self.slot_steps = self.drain_slot_steps = 0
        table = request_table(asked, self.schedule, self.num_resumed, self._resumed_from())
        rows_lie = NamedSharding(sampler.mesh, ROWS)
        self.device_requests = put(table, jax.tree.map(lambda _: rows_lie, table))
        self.fills: list[tuple[int, int, float]] = []
        self.waves: list[slots.Prompts] = []
        self.round = self.wave = -1
        self._next_round()
        self.ring = self._first_ring()
        keep = self.asked.budgets.first if kept is None else min(self.asked.budgets.first, kept.max_tokens)
        sizes = slots.Sizes(
            self.schedule.num_rows, self.plan.num_slots, asked.budgets.total, self.ring,
            keep if self.plan.keep_responses else 0,
        )  # fmt: skip
        self.state = decode.begin(self.places, self.prefilled, self.device_requests, sizes)
        self.last: _Look | None = None
        self.stopped = np.zeros(self.schedule.num_rows, bool)

    def _tensor_divides(self) -> bool:
        config, mesh = self.sampler.model.config, self.sampler.mesh
        return config.kv_heads * kv_copies(config, mesh) % mesh.shape["tensor"] == 0

    def _plan(self, rows: int, per_prompt: int) -> CachePlan:
        """What there is room for: the same as in an earlier call that asked for the same, because shapes follow it."""
        settings, kept, plans = self.asked.settings, self.kept, self.sampler.plans
        filling = kept is not None and not self.reusing
        needs = CacheNeeds(
            bytes_per_token=self._bytes_per_token(),
            shards=self.shards,
            num_slots=min(settings.num_slots or rows * per_prompt, rows * per_prompt),
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.asked.budgets.total,
            num_prompts=rows,
            wave_rows=max(1, settings.prefill_tokens // self.prompt_tokens) * self.shards,
            kept_rows=-(-rows // self.shards) * per_prompt,
            kept_tokens=min(self.asked.budgets.first, kept.max_tokens) if kept is not None and filling else 0,
            prefilled=kept is not None and bool(kept.waves),
        )
        held = kept.bytes_per_device if kept is not None else 0
        # Every process has to plan alike, so the one with the least room decides.
        room = min(exchange(room_for_caches(self.sampler.mesh.local_devices[0], settings.cache_gib, held)))
        key = needs, settings.cache_gib, held
        if key not in plans:
            try:
                plans[key] = plan_caches(needs, room)
            except UserError:
                if kept is None or not held:
                    raise
                kept.drop()
                return self._plan(rows, per_prompt)
        self.room_left = room - plans[key].bytes_per_device
        return dataclasses.replace(plans[key], bytes_per_device=plans[key].bytes_per_device + held)

    def _kept_shards(self) -> list[int] | None:
        """Where the call before put each request; those that it did not have go round."""
        if self.kept is None or not self.reusing:
            return None
        place_of = self.kept.place_of
        return [
            place_of.get(request.name, (number % self.shards, 0))[0]
            for number, request in enumerate(self.asked.requests)
        ]

    def _bytes_per_token(self) -> int:
        """Keys and values of one token on one device, all layers."""
        config, mesh = self.sampler.model.config, self.sampler.mesh
        heads = config.kv_heads * kv_copies(config, mesh) // (mesh.shape["tensor"] if self._tensor_divides() else 1)
        return config.layers * 2 * heads * config.head_dim * self.params["text"]["embedding"].dtype.itemsize

    def _choose_resumed(self) -> int | None:
        """Sets of each request how many tokens have caches, or will be read again in one chunk: none if no room is.

        Returns how many responses of a shard fit at once where they are read again.
        """
        wanted, kept = [request.num_resumed for request in self.asked.requests], self.kept
        self.num_resumed = wanted
        if kept is not None and self.reusing and kept.caches is not None:
            stored = kept.caches[0][0].shape[-1]
            known = [request.name in kept.place_of for request in self.asked.requests]
            self.num_resumed = [min(count, stored) if there else 0 for count, there in zip(wanted, known, strict=True)]
            return None
        if not any(wanted):
            return None
        fits = self.room_left // self._bytes_to_read()
        if not fits:
            self.num_resumed = [0] * len(wanted)
        return fits or None

    def _bytes_to_read(self) -> int:
        """Of one response that is read again; it is there twice while it is made."""
        return 2 * self._bytes_per_token() * self._read_width()

    def _read_width(self) -> int:
        """Columns of the store of first responses that are read again: of the longest that may come."""
        return min(bucket(self.asked.budgets.prefix_width, 32), self.asked.budgets.total)

    def _first_ring(self) -> int:
        """Columns that the first turn wants, and all that is resumed."""
        resumed = max(self.num_resumed)
        stored = self.resumed[0][0].shape[-1] if self.resumed is not None else 0
        return max(self._ring_for(resumed + self.asked.settings.steps_per_call), stored)

    def _ring_for(self, columns: int) -> int:
        size = self.sampler.ring
        while size < columns:
            size *= 2
        return min(size, self.asked.budgets.total)

    def _next_round(self) -> None:
        """Prefill the next wave of prompts, or take it from the call before, and what its requests resume."""
        kept, self.resumed = self.kept, None  # frees them before what comes next is made
        self.round += 1
        wave = int(self.schedule.wave_of[self.round])
        if wave != self.wave:
            self.wave, self.prefilled = wave, None
            if kept is not None and self.reusing and kept.waves:
                self.prefilled = kept.waves[wave]
            else:
                self.prefilled = self._prefill(self.schedule.waves[wave])
                if self.plan.keep_prompts:
                    self.waves.append(self.prefilled)
        if any(self.num_resumed):
            stored = kept.caches if kept is not None and self.reusing else None
            self.resumed = stored if stored is not None else self._read_responses()

    def _prefill(self, wave: np.ndarray) -> slots.Prompts:
        places = np.flatnonzero((wave >= 0) & (wave < len(self.prompts)))
        prompts = [self.prompts[number] for number in wave[places]]
        rows = -(-len(wave) // self.shards) * self.shards
        sampler = self.sampler
        batch = pack_prompts(
            prompts, sampler.geometry, batch_size=rows, rows=places, seq_buckets=(self.prompt_tokens,),
            seq_minimum=self.prompt_tokens, vision_buckets=sampler.buckets.vision,
            vision_minimum=(bucket(max(1, rows // 2), 4), 4), row_multiple=self.shards,
            shards_here=shards_here(sampler.mesh),
        )  # fmt: skip
        lengths = batch.text.lengths
        self.fills.append(
            (int(lengths.sum()), batch.text.token_ids.size, 1.0 if batch.vision is None else batch.vision.fill)
        )
        self.num_images += len(unique_images(prompts)[0])
        self.num_prefilled += len(prompts)
        if batch.vision is not None:
            batch = dataclasses.replace(batch, vision=dataclasses.replace(batch.vision, merged_index=()))
        placed = place_rows(batch, sampler.mesh, 0, {"positions": 1})
        most = self.asked.settings.prefill_tokens
        per_shard = self.prompt_tokens * rows // self.shards
        chunk = -(-self.prompt_tokens // -(-per_shard // most)) if per_shard > most else 0
        num_rows = len(wave)
        caches = prefill(sampler.model, self.places, self.params, placed, chunk, num_rows)
        last = batch.text.token_ids[np.arange(rows), np.maximum(lengths - 1, 0)]
        return slots.Prompts(caches, lengths[:num_rows], batch.next_positions[:num_rows], last[:num_rows])

    def _read_responses(self) -> Caches:
        """Caches of what the requests of this round resume, each response in one chunk behind its prompt."""
        schedule = self.schedule
        mine = np.flatnonzero(schedule.round_of == self.round)
        counts = [self.num_resumed[number] for number in mine]
        width = self._read_width()
        rows = self.shards * schedule.round_queue
        token_ids, prompt_of = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
        for number, count in zip(mine, counts, strict=True):
            request = self.asked.requests[number]
            shard = schedule.row_of[number] // schedule.queue
            row = shard * schedule.round_queue + schedule.round_place[number]
            prompt_of[row] = schedule.prompt_row[number]
            token_ids[row, 0] = request.prompt.token_ids[-1]
            if count:
                token_ids[row, 1:count] = request.prefix_ids[: count - 1]
        self.read_tokens += sum(counts)
        block = max(1, self.asked.settings.prefill_tokens // width)
        return prefill_responses(
            self.sampler.model, self.places, self.params, self.prefilled, prompt_of, token_ids, block
        )

    def go_on(self) -> None:
        """Send the device on its way: the next wave where it is wanted, a longer ring where one may be."""
        limits, steps = self.schedule.limits, min(self.asked.settings.steps_per_call, MOST_STEPS)
        if self.last is not None:
            if self.round + 1 < len(limits) and (self.last.next_request >= limits[self.round]).all():
                self._next_round()
            ring = self._ring_for(int(np.max(self.last.emitted, initial=0, where=self.last.request >= 0)) + steps)
            if ring > self.ring:
                self.state, self.ring = decode.resize(self.places, ring, self.state), ring
        turn = slots.Turn(
            num_steps=np.full(self.shards, steps, np.int32),
            limit=limits[self.round].astype(np.int32),
            total=self.schedule.totals.astype(np.int32),
            stopped=self.stopped,
        )
        self.state = decode.run(
            self.sampler.model, self.places, self.params, self.prefilled, self.resumed, self.device_requests,
            self.rules, turn, self.state,
        )  # fmt: skip

    def look(self) -> list[int]:
        """Numbers of the requests that ended, by themselves or by a stop string."""
        peers.at("decode")
        look = jax.device_get(_look(self.places, self.state))
        steps, begun = look.counts.steps, look.next_request
        if self.last is not None:
            steps, begun = steps - self.last.counts.steps, begun - self.last.next_request
        assert steps.any() or begun.any(), "the decode loop stands still"
        self.slot_steps += int(steps.max()) * self.plan.num_slots
        # A shard that has nothing left to begin waits for the slowest one.
        waits = (steps.max() - steps)[look.next_request >= self.schedule.totals]
        self.drain_slot_steps += int(waits.sum()) * self.plan.num_slots // self.shards
        self.last = look
        ended = look.finish != slots.RUNNING
        if self.reader.strings:
            self.stopped = self._find_stops(look)
            ended = ended | self.stopped
        return [int(number) for number in self.request_of[ended] if number >= 0]

    def _find_stops(self, look: "_Look") -> np.ndarray:
        """bool [rows]: completions in slots that hold a stop string."""
        slot = np.flatnonzero(look.request >= 0)
        shard = slot // (self.plan.num_slots // self.shards)
        rows = shard * self.schedule.queue + look.request[slot]
        wanted = np.resize(rows, len(look.request)) if len(rows) else np.zeros(len(look.request), np.int64)
        host = jax.device_get(_rows_of(self.places, self.state.outputs, wanted.astype(np.int32)))
        stopped = np.zeros(self.schedule.num_rows, bool)
        for place, row in enumerate(rows):
            request = self.asked.requests[self.request_of[row]]
            stopped[row] = self.reader.stops(host, place, len(request.prefix_ids))
        return stopped

    def copy(self, ended: Sequence[int]) -> Copies:
        blocks = [list(ended[start : start + BLOCK]) for start in range(0, len(ended), BLOCK)]
        rows = [np.resize(self.schedule.row_of[block], BLOCK).astype(np.int32) for block in blocks]
        return [
            (block, _rows_of(self.places, self.state.outputs, of_block))
            for block, of_block in zip(blocks, rows, strict=True)
        ]

    def read(self, copies: Copies) -> list[tuple[int, Drawn]]:
        found = []
        for block, copy in copies:
            host = jax.device_get(copy)
            for place, number in enumerate(block):
                request = self.asked.requests[number]
                drawn = self.reader.read(host, place, len(request.prefix_ids))
                inserted = (drawn.completion.segments == TRIGGER).sum()
                fed = len(request.prefix_ids) - self.num_resumed[number]
                self.fed_tokens += int(fed if len(request.prefix_ids) else inserted)
                found.append((number, drawn))
        return found

    def hand_over(self) -> None:
        """Fill `kept` with what the next call may start from."""
        kept = self.kept
        if kept is None or self.reusing:
            return
        if self.stopped.any():
            self.go_on()  # frees the slots that the last look stopped, and keeps their caches; nothing else is left
        kept.prompts, kept.waves, kept.layout = self.prompts, self.waves, (self.plan.shared, self.plan.wave_rows)
        kept.caches, kept.bytes_per_device = self.state.kept, self.plan.kept_bytes
        places = [divmod(int(row), self.schedule.queue) for row in self.schedule.row_of]
        kept.place_of = {one.name: place for one, place in zip(self.asked.requests, places, strict=True)}

    def counters(self) -> Counters:
        assert self.last is not None, "the loop has not run"
        counts = self.last.counts
        read = self._bytes_to_read() * self.schedule.round_queue if self.read_tokens else 0
        filled, size = sum(fill[0] for fill in self.fills), sum(fill[1] for fill in self.fills)
        return Counters(
            busy_steps=int(counts.busy.sum()),
            slot_steps=self.slot_steps,
            images=self.num_images,
            prompts=self.num_prefilled,
            prompt_fill=filled / size if size else 1.0,
            vision_fill=float(np.mean([fill[2] for fill in self.fills])) if self.fills else 1.0,
            waves=len(self.fills),
            drain_busy_steps=int(counts.drain_busy.sum()),
            drain_slot_steps=self.drain_slot_steps + int(counts.drain_steps.sum()) * self.plan.num_slots // self.shards,
            read_tokens=self.read_tokens,
            fed_tokens=self.fed_tokens,
            cache_bytes=self.plan.bytes_per_device + read,
        )

    def _resumed_from(self) -> np.ndarray:
        kept = self.kept
        if kept is None or not self.reusing or kept.caches is None:
            return self.schedule.round_place
        return np.array([kept.place_of.get(one.name, (0, 0))[1] for one in self.asked.requests], np.int64)


class _Look(NamedTuple):
    """What the host wants to know of the loop: [rows] finish codes, [slots] requests and lengths, [shards] the rest."""

    finish: Any
    request: Any
    emitted: Any
    next_request: Any
    counts: Any


@functools.partial(jax.jit, static_argnums=0)
def _look(places: slots.Places, state: slots.LoopState) -> _Look:
    look = _Look(state.outputs.finish, state.slots.request, state.slots.emitted, state.next_request, state.counts)
    return places.put_everywhere(look)


@functools.partial(jax.jit, static_argnums=0)
def _rows_of(places: slots.Places, outputs: slots.Outputs, rows: jax.Array) -> slots.Outputs:
    return places.put_everywhere(jax.tree.map(lambda array: array[rows], outputs))
