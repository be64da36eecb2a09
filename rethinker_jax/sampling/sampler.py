"""Requests in, completions out: the host's side of the decode loop.

Stop strings are sought in each response alone, in what was drawn: a trigger or a prefix that holds one stops nothing.
The host looks every `steps_per_call` steps, to free the slot; where a completion is cut does not depend on that.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rethinker_jax.config import SamplingConfig
from rethinker_jax.models.qwen25vl import Model, Params
from rethinker_jax.models.sharding import place_rows
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
        """Most tokens of a completion, inserted ones included."""
        forced = self.max_first + self.trigger_width + self.second if self.trigger_width else 0
        return self.prefix_width + max(self.first, self.second if self.prefix_width else 0, forced)


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
        places = decode.Places.on(self.mesh, num_slots, self.model.config.kv_heads)
        state = decode.start(self.model, places, prefilled, len(requests), num_slots, budgets.total)
        rules = self._rules(settings)
        done = False
        while not done:
            state = decode.run(
                self.model, places, params, prefilled, asked, rules, state, len(requests), settings.steps_per_call
            )
            if settings.stop_strings:
                state = self._free_stopped(state, requests, settings.stop_strings)
            done = bool((state.next_request >= len(requests)) & (state.slots.request < 0).all())
            if on_chunk is not None:
                on_chunk()
        host = jax.device_get(state.outputs)
        images = len({id(image) for prompt in prompts for image in prompt.images})
        counters = Counters(int(state.busy), int(state.step) * num_slots, images, len(prompts))
        strings = settings.stop_strings
        return [self._drawn(host, row, request, strings) for row, request in enumerate(requests)], counters

    def _prefill(self, params: Params, prompts: list[Prompt], num_prompts: int) -> decode.Prompts:
        images = max(1, num_prompts // 2)
        batch = pack_prompts(
            prompts, self.geometry, batch_size=num_prompts, seq_minimum=32, vision_minimum=(bucket(images, 4), 4)
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
            key=_keys(*(np.uint32(number & 0xFFFFFFFF) for number in name), hashes, samples),
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

    def _free_stopped(
        self, state: decode.LoopState, requests: Sequence[Request], strings: tuple[str, ...]
    ) -> decode.LoopState:
        """Free the slots whose completions hold a stop string; `_drawn` cuts them."""
        host, in_slots = jax.device_get((state.outputs, state.slots.request))
        stopped = np.zeros(len(requests), bool)
        for row in in_slots[in_slots >= 0]:
            length = host.lengths[row]
            tokens, segments = host.tokens[row, :length], host.segments[row, :length]
            stopped[row] = self._find_stop(tokens, segments, len(requests[row].prefix_ids), strings) is not None
        slots = dataclasses.replace(state.slots, request=_without(state.slots.request, stopped))
        return dataclasses.replace(state, slots=slots)

    def _find_stop(
        self, tokens: np.ndarray, segments: np.ndarray, inserted: int, strings: tuple[str, ...]
    ) -> "_Stop | None":
        """Where the first stop string ends that was drawn behind the `inserted` first tokens."""
        for segment in (FIRST, SECOND):
            places = np.flatnonzero(segments == segment)
            drawn = places[places >= inserted]

            def text(count: int, drawn: np.ndarray = drawn) -> str:
                return self.tokenizer.decode(tokens[drawn[:count]])

            def holds(count: int, text: Callable[[int], str] = text) -> bool:
                return any(string in text(count) for string in strings)

            if holds(len(drawn)):
                count = bisect.bisect_left(range(len(drawn) + 1), True, key=holds)
                whole = text(count)
                cut = min(whole.find(string) for string in strings if string in whole)
                before = self.tokenizer.decode(tokens[places[places < inserted]])
                return _Stop(int(drawn[count - 1]) + 1, before + whole[:cut])
        return None

    def _drawn(self, host: decode.Outputs, row: int, request: Request, strings: tuple[str, ...]) -> Drawn:
        length = host.lengths[row]
        tokens, segments = host.tokens[row, :length], host.segments[row, :length]
        stop = self._find_stop(tokens, segments, len(request.prefix_ids), strings) if strings else None
        reason = decode.FINISH_REASONS[host.finish[row]] if stop is None else "stop_string"
        completion = self._completion(tokens, host.log_probs[row, :length], segments, reason, stop)
        if host.first_end_token[row] < 0 or not completion.forced:
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
        self,
        token_ids: np.ndarray,
        log_probs: np.ndarray,
        segments: np.ndarray,
        reason: FinishReason,
        stop: "_Stop | None" = None,
    ) -> Completion:
        length = len(token_ids) if stop is None else stop.length
        token_ids, log_probs, segments = token_ids[:length], log_probs[:length], segments[:length]
        shown = length - (reason == "stop")  # without the end token
        ids = token_ids[:shown]
        parts = [(n, ids[segments[:shown] == n]) for n in (FIRST, TRIGGER, SECOND)]
        texts = [(number, self.tokenizer.decode(part)) for number, part in parts if len(part)]
        if stop is not None:
            texts[-1] = (texts[-1][0], stop.text)
            return Completion(token_ids, log_probs, segments, reason, "".join(text for _, text in texts), tuple(texts))
        text = texts[0][1] if len(texts) == 1 else self.tokenizer.decode(ids)
        return Completion(token_ids, log_probs, segments, reason, text, tuple(texts))


@dataclasses.dataclass(frozen=True)
class _Stop:
    """A stop string that was drawn: tokens up to it, it included, and the text of its response in front of it."""

    length: int
    text: str


_keys = jax.jit(request_keys)


@jax.jit
def _without(in_slots: jax.Array, stopped: jax.Array) -> jax.Array:
    """Requests in slots, -1 where the slot was idle or its request is `stopped`."""
    return jnp.where((in_slots >= 0) & stopped[jnp.maximum(in_slots, 0)], -1, in_slots)
