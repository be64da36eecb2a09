"""Requests in, completions out: the host's side of the decode loop."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rethinker_jax.config import SamplingConfig
from rethinker_jax.models.qwen25vl import Model, Params
from rethinker_jax.models.sharding import ROWS, place_rows
from rethinker_jax.prompts.batch import bucket, pack_prompts
from rethinker_jax.prompts.template import ChatTokenizer
from rethinker_jax.prompts.windows import VisionGeometry
from rethinker_jax.sampling import decode
from rethinker_jax.sampling.choose import request_keys
from rethinker_jax.sampling.prefill import prefill
from rethinker_jax.types import FIRST, SECOND, TRIGGER, Completion, FinishReason, Prompt

EMPTY = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion to draw.

    prefix_ids, prefix_segments: tokens that stand before the first drawn one (another pass wrote or inserted them).
    trigger_ids: fed in place of the end token of the first response; empty = none.
    """

    prompt: Prompt
    sample: int
    trigger_ids: np.ndarray = dataclasses.field(default_factory=lambda: EMPTY)
    prefix_ids: np.ndarray = dataclasses.field(default_factory=lambda: EMPTY)
    prefix_segments: np.ndarray = dataclasses.field(default_factory=lambda: EMPTY)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A completion, and the first response as it would have stood alone (None unless a trigger was inserted here)."""

    completion: Completion
    first: Completion | None = None


@dataclasses.dataclass(frozen=True)
class Budgets:
    """Lengths in tokens. `first` and `second` bound the two responses; the widths bound what is inserted."""

    first: int
    second: int = 0
    max_first: int = 0  # a longer first response gets no trigger
    trigger_width: int = 0
    prefix_width: int = 0

    @property
    def total(self) -> int:
        if self.prefix_width:
            return self.prefix_width + max(self.first, self.second)
        return max(self.first, self.max_first + self.trigger_width + self.second if self.trigger_width else 0)


@dataclasses.dataclass(frozen=True)
class Counters:
    """What one call did: slot steps that wrote a token, all slot steps, images encoded, prompts prefilled."""

    busy_steps: int
    slot_steps: int
    images: int
    prompts: int


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What stays the same from call to call. `never` lists ids that are never drawn."""

    model: Model
    mesh: Mesh
    tokenizer: ChatTokenizer
    geometry: VisionGeometry
    end_ids: tuple[int, ...]
    never: np.ndarray

    def generate(
        self,
        params: Params,
        requests: Sequence[Request],
        settings: SamplingConfig,
        budgets: Budgets,
        *,
        seed: int,
        step: int,
        second_temperature: float = 1.0,
        num_prompts: int | None = None,
        on_chunk: Callable[[], None] | None = None,
    ) -> tuple[list[Drawn], Counters]:
        """Draw one completion a request, in the order of `requests`. `params` are in the sampling layout.

        Each distinct prompt is prefilled once. `num_prompts` pads their number, so that few shapes are compiled.
        `on_chunk` is called on the host every `settings.steps_per_call` decode steps.
        """
        prompts = list({id(request.prompt): request.prompt for request in requests}.values())
        place_of = {id(prompt): place for place, prompt in enumerate(prompts)}
        prefilled = self._prefill(params, prompts, num_prompts or len(prompts))
        num_slots = min(settings.num_slots or len(requests), len(requests))
        asked = self._requests(requests, place_of, settings, budgets, (seed, step), second_temperature)
        state = _start(self.model, self.mesh, prefilled, len(requests), num_slots, budgets.total)
        rules = self._rules(settings)
        done = False
        while not done:
            state = decode.run(
                self.model, params, prefilled, asked, rules, state, len(requests), settings.steps_per_call
            )
            outputs = state.outputs
            if settings.stop_strings:
                outputs, state = self._stop_on_strings(state, settings.stop_strings)
            done = bool((state.next_request >= len(requests)) & (state.slots.request < 0).all())
            if on_chunk is not None:
                on_chunk()
        host = jax.device_get(outputs)
        images = sum(len(prompt.images) for prompt in prompts)
        counters = Counters(int(state.busy), int(state.step) * num_slots, images, len(prompts))
        return [self._drawn(host, row) for row in range(len(requests))], counters

    def _prefill(self, params: Params, prompts: list[Prompt], num_prompts: int) -> decode.Prompts:
        images = max(1, num_prompts // 2)
        batch = pack_prompts(
            prompts, self.geometry, batch_size=num_prompts, seq_minimum=64, vision_minimum=(bucket(images, 4), 4)
        )
        if batch.vision is not None:
            batch = dataclasses.replace(batch, vision=dataclasses.replace(batch.vision, merged_index=()))
        placed = place_rows(batch, self.mesh, 0, {"positions": 1})
        lengths = batch.text.lengths
        last = batch.text.token_ids[np.arange(num_prompts), np.maximum(lengths - 1, 0)]
        return decode.Prompts(prefill(self.model, params, placed), lengths, batch.next_positions, last)

    def _requests(
        self,
        requests: Sequence[Request],
        place_of: dict[int, int],
        settings: SamplingConfig,
        budgets: Budgets,
        name: tuple[int, int],
        second_temperature: float,
    ) -> decode.Requests:
        count = len(requests)

        def table(rows: list[np.ndarray], width: int) -> np.ndarray:
            out = np.zeros((count, max(width, 1)), np.int32)
            for row, values in enumerate(rows):
                out[row, : len(values)] = values
            return out

        hashes = np.array([request.prompt.problem.stable_hash for request in requests], np.int32)
        samples = np.array([request.sample for request in requests], np.int32)
        return decode.Requests(
            prompt=np.array([place_of[id(request.prompt)] for request in requests], np.int32),
            key=_keys(*name, hashes, samples),
            budget=np.full(count, budgets.first, np.int32),
            prefix_ids=table([request.prefix_ids for request in requests], budgets.prefix_width),
            prefix_segments=table([request.prefix_segments for request in requests], budgets.prefix_width),
            prefix_length=np.array([len(request.prefix_ids) for request in requests], np.int32),
            trigger_ids=table([request.trigger_ids for request in requests], budgets.trigger_width),
            trigger_length=np.array([len(request.trigger_ids) for request in requests], np.int32),
            max_first=np.full(count, budgets.max_first, np.int32),
            second_budget=np.full(count, budgets.second, np.int32),
            temperature=np.full(count, settings.temperature, np.float32),
            second_temperature=np.full(count, second_temperature, np.float32),
        )

    def _rules(self, settings: SamplingConfig) -> decode.Rules:
        vocab = self.model.config.vocab
        allowed, ends = np.ones(vocab, bool), np.zeros(vocab, bool)
        allowed[self.never] = False
        ends[list(self.end_ids)] = not settings.ignore_eos
        if settings.ignore_eos:
            allowed[list(self.end_ids)] = False
        top_k, top_p, min_p = np.int32(settings.top_k), np.float32(settings.top_p), np.float32(settings.min_p)
        return decode.Rules(allowed, ends, top_k, top_p, min_p)

    def _stop_on_strings(self, state: decode.LoopState, strings: tuple[str, ...]) -> tuple[Any, decode.LoopState]:
        """Free the slots of completions that hold a stop string; `_drawn` cuts them."""
        host = jax.device_get(state.outputs)
        hit = np.zeros(len(host.lengths), bool)
        for row, length in enumerate(host.lengths):
            text = self.tokenizer.decode(host.tokens[row, :length])
            hit[row] = host.finish[row] == decode.RUNNING and any(string in text for string in strings)
        finish = np.where(hit, decode.STOP_STRING, host.finish)
        slots = state.slots
        freed = jnp.where((slots.request >= 0) & jnp.asarray(hit)[jnp.maximum(slots.request, 0)], -1, slots.request)
        outputs = dataclasses.replace(state.outputs, finish=jnp.asarray(finish))
        return outputs, dataclasses.replace(state, outputs=outputs, slots=dataclasses.replace(slots, request=freed))

    def _drawn(self, host: decode.Outputs, row: int) -> Drawn:
        length = int(host.lengths[row])
        reason: FinishReason = decode.FINISH_REASONS[int(host.finish[row])]
        completion = self._completion(host.tokens[row, :length], host.log_probs[row, :length], host.segments[row, :length], reason)
        if host.first_end_token[row] < 0:
            return Drawn(completion)
        count = int((completion.segments == FIRST).sum())
        first = self._completion(
            np.append(completion.token_ids[:count], host.first_end_token[row]).astype(np.int32),
            np.append(completion.log_probs[:count], host.first_end_log_prob[row]).astype(np.float32),
            np.full(count + 1, FIRST, np.int8),
            "stop",
        )
        return Drawn(completion, first)

    def _completion(
        self, token_ids: np.ndarray, log_probs: np.ndarray, segments: np.ndarray, reason: FinishReason
    ) -> Completion:
        shown = slice(None, -1 if reason == "stop" else None)  # without the end token
        present = [number for number in (FIRST, TRIGGER, SECOND) if (segments[shown] == number).any()]
        parts = tuple((number, self.tokenizer.decode(token_ids[shown][segments[shown] == number])) for number in present)
        return Completion(token_ids, log_probs, segments, reason, self.tokenizer.decode(token_ids[shown]), parts)


@functools.partial(jax.jit)
def _keys(seed: jax.Array, step: jax.Array, hashes: jax.Array, samples: jax.Array) -> jax.Array:
    return request_keys(seed, step, hashes, samples)


def _start(model: Model, mesh: Mesh, prompts: decode.Prompts, num_requests: int, num_slots: int, length: int) -> decode.LoopState:
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = ROWS if num_slots % shards == 0 else PartitionSpec()
    return _start_jitted(model, NamedSharding(mesh, rows), NamedSharding(mesh, PartitionSpec()), prompts, num_requests, num_slots, length)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 4, 5, 6))
def _start_jitted(
    model: Model,
    rows: NamedSharding,
    whole: NamedSharding,
    prompts: decode.Prompts,
    num_requests: int,
    num_slots: int,
    length: int,
) -> decode.LoopState:
    state = decode.start(model, prompts, num_requests, num_slots, length)
    place = jax.lax.with_sharding_constraint
    slots = jax.tree.map(lambda leaf: place(leaf, rows), state.slots)
    return dataclasses.replace(jax.tree.map(lambda leaf: place(leaf, whole), state), slots=slots)
