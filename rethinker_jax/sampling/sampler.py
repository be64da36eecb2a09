"""Requests in, completions out: the host's side of the decode loop.

The host looks every `steps_per_call` steps: it fetches the completions that ended, sends the device on its way, and
hands them over, so that they are judged while others are drawn.

Stop strings are sought in each response alone, in what was drawn: a trigger or a prefix that holds one stops nothing.
The look frees their slots; where a completion is cut does not depend on when the host looks.
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rethinker_jax.config import BucketsConfig, SamplingConfig
from rethinker_jax.models.qwen25vl import Model, Params
from rethinker_jax.models.sharding import place_rows, row_shards
from rethinker_jax.prompts.batch import PromptBatch, pack_prompts
from rethinker_jax.prompts.template import ChatTokenizer
from rethinker_jax.prompts.windows import VisionGeometry, bucket
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
    """What one call did: slot steps that wrote a token, all slot steps, images encoded, prompts prefilled.

    `prompt_fill` and `vision_fill` are the shares of the padded arrays that held a token or a patch.
    """

    busy_steps: int
    slot_steps: int
    images: int
    prompts: int
    prompt_fill: float
    vision_fill: float


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What stays the same from call to call. `never` lists ids that are never drawn."""

    model: Model
    mesh: Mesh
    tokenizer: ChatTokenizer
    geometry: VisionGeometry
    end_ids: tuple[int, ...]
    never: np.ndarray
    buckets: BucketsConfig

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
        on_finished: Callable[[Sequence[tuple[int, Drawn]]], None] | None = None,
    ) -> tuple[list[Drawn], Counters]:
        """Draw one completion a request, in the order of `requests`. `params` are in the sampling layout.

        Each distinct prompt is prefilled once. `num_prompts` pads their number, so that few shapes are compiled.
        `on_finished` is given the completions that ended since the last look, each with the number of its request,
        while the device draws the others; a look that finds none gives an empty list. Raises ValueError for a prompt
        that ends in an image: its last token is fed again, as text.
        """
        prompts = list({id(request.prompt): request.prompt for request in requests}.values())
        batch = self._pack(prompts, num_prompts or len(prompts))
        prefilled = self._prefill(params, batch)
        num_slots = min(settings.num_slots or len(requests), len(requests))
        asked = self._requests(requests, prompts, settings, budgets, (seed, step), second_temperature)
        places = decode.Places.on(self.mesh, num_slots, self.model.config.kv_heads)
        state = decode.start(self.model, places, prefilled, len(requests), num_slots, budgets.total)
        rules = self._rules(settings)

        def go_on(state: decode.LoopState) -> decode.LoopState:
            return decode.run(
                self.model, places, params, prefilled, asked, rules, state, len(requests), settings.steps_per_call
            )

        drawn: dict[int, Drawn] = {}
        state, done = go_on(state), False
        while not done:
            if settings.stop_strings:
                state = self._free_stopped(state, requests, settings.stop_strings)
            look = jax.device_get(_look(state))
            ended = [row for row in np.flatnonzero(look.ended).tolist() if row not in drawn]
            blocks = [ended[start : start + BLOCK] for start in range(0, len(ended), BLOCK)]
            # Copied before the loop goes on, because it takes the arrays over.
            copies = [_rows_of(state.outputs, np.resize(np.array(rows, np.int32), BLOCK)) for rows in blocks]
            done = bool(look.done)
            if not done:
                state = go_on(state)
            new = []
            for rows, copy in zip(blocks, copies, strict=True):
                host = jax.device_get(copy)
                strings = settings.stop_strings
                new += [(row, self._drawn(host, place, requests[row], strings)) for place, row in enumerate(rows)]
            drawn |= new
            if on_finished is not None:
                on_finished(new)
        counters = Counters(
            int(look.busy), int(look.step) * num_slots,
            len({id(image) for prompt in prompts for image in prompt.images}), len(prompts),
            prompt_fill=float(batch.text.lengths.sum() / batch.text.token_ids.size),
            vision_fill=batch.vision.fill if batch.vision is not None else 1.0,
        )  # fmt: skip
        return [drawn[row] for row in range(len(requests))], counters

    def _pack(self, prompts: list[Prompt], num_prompts: int) -> PromptBatch:
        for prompt in prompts:
            if prompt.image_index[-1] >= 0:
                raise ValueError(f"problem {prompt.problem.id!r}: the prompt ends in an image, and no text follows it")
        images = max(1, num_prompts // 2)
        return pack_prompts(
            prompts, self.geometry, batch_size=num_prompts, seq_minimum=32, seq_buckets=self.buckets.prompt_tokens,
            vision_buckets=self.buckets.vision, vision_minimum=(bucket(images, 4), 4),
            row_multiple=row_shards(self.mesh),
        )  # fmt: skip

    def _prefill(self, params: Params, batch: PromptBatch) -> decode.Prompts:
        if batch.vision is not None:
            batch = dataclasses.replace(batch, vision=dataclasses.replace(batch.vision, merged_index=()))
        placed = place_rows(batch, self.mesh, 0, {"positions": 1})
        lengths = batch.text.lengths
        last = batch.text.token_ids[np.arange(len(lengths)), np.maximum(lengths - 1, 0)]
        return decode.Prompts(prefill(self.model, params, placed), lengths, batch.next_positions, last)

    def _requests(
        self,
        requests: Sequence[Request],
        prompts: Sequence[Prompt],
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

        place_of = {id(prompt): place for place, prompt in enumerate(prompts)}
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
        """End the completions in slots that hold a stop string; `_drawn` cuts them."""
        in_slots = np.asarray(jax.device_get(state.slots.request))
        host = jax.device_get(_rows_of(state.outputs, np.maximum(in_slots, 0)))
        stopped = np.zeros(len(requests), bool)
        for slot in np.flatnonzero(in_slots >= 0):
            row, length = in_slots[slot], host.lengths[slot]
            tokens, segments = host.tokens[slot, :length], host.segments[slot, :length]
            stopped[row] = self._find_stop(tokens, segments, len(requests[row].prefix_ids), strings) is not None
        return _stop_rows(state, stopped)

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


BLOCK = 16  # completions that are fetched together: one compiled copy serves any number of them

_keys = jax.jit(request_keys)


class _Look(NamedTuple):
    """What the host wants to know of the loop; `ended` is bool [requests]."""

    ended: Any
    done: Any
    busy: Any
    step: Any


@jax.jit
def _look(state: decode.LoopState) -> _Look:
    ended = state.outputs.finish != decode.RUNNING
    return _Look(ended, ended.all() & (state.slots.request < 0).all(), state.busy, state.step)


@jax.jit
def _rows_of(outputs: decode.Outputs, rows: jax.Array) -> decode.Outputs:
    return jax.tree.map(lambda array: array[rows], outputs)


@functools.partial(jax.jit, donate_argnums=0)
def _stop_rows(state: decode.LoopState, stopped: jax.Array) -> decode.LoopState:
    """Ends the requests of `stopped`, bool [requests], that are in slots, and frees these."""
    in_slots = state.slots.request
    freed = (in_slots >= 0) & stopped[jnp.maximum(in_slots, 0)]
    slots = dataclasses.replace(state.slots, request=jnp.where(freed, -1, in_slots))
    finish = jnp.where(stopped, decode.STOP_STRING, state.outputs.finish)
    return dataclasses.replace(state, slots=slots, outputs=dataclasses.replace(state.outputs, finish=finish))
