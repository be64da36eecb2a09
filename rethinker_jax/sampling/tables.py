"""Requests and rules as the device wants them: arrays, one row a request, so that nothing in them compiles anew."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rethinker_jax.config import SamplingConfig
from rethinker_jax.sampling.choose import request_keys
from rethinker_jax.sampling.requests import Asked
from rethinker_jax.sampling.schedule import Schedule
from rethinker_jax.sampling.slots import Requests, Rules

_keys = jax.jit(request_keys)


def request_table(asked: Asked, schedule: Schedule, num_resumed: Sequence[int], resumed_from: np.ndarray) -> Requests:
    """Every request in its row of `schedule`; rows without one are zeros, and no queue reaches them.

    num_resumed, resumed_from: of each request, how many tokens of its prefix have caches, and in which row.
    """
    requests, budgets, settings = asked.requests, asked.budgets, asked.settings
    seed, step = asked.name
    count, width = len(requests), budgets.prefix_width

    def column(values: Sequence[Any] | np.ndarray, dtype: Any = np.int32) -> np.ndarray:
        values = np.asarray(values, dtype)
        out = np.zeros((schedule.num_rows, *values.shape[1:]), dtype)
        out[schedule.row_of] = values
        return out

    def table(rows: Sequence[np.ndarray | None], width: int, dtype: Any = np.int32) -> np.ndarray:
        out = np.zeros((schedule.num_rows, max(width, 1)), dtype)
        for row, values in zip(schedule.row_of, rows, strict=True):
            if values is not None:
                out[row, : len(values)] = values[:width]
        return out

    responses = [request.resume for request in requests]
    seeds = [np.uint32((seed if one.seed is None else one.seed) & 0xFFFFFFFF) for one in requests]
    hashes = column([request.prompt.problem.stable_hash for request in requests])
    samples = column([request.sample for request in requests])
    budget = [budgets.first if one.budget is None else min(one.budget, budgets.first) for one in requests]
    return Requests(
        prompt=column(schedule.prompt_row),
        key=_keys(column(seeds, np.uint32), np.uint32(step & 0xFFFFFFFF), hashes, samples),
        budget=column(budget),
        prefix_ids=table([request.prefix_ids for request in requests], width),
        prefix_segments=table([request.prefix_segments for request in requests], width),
        prefix_length=column([len(request.prefix_ids) for request in requests]),
        resumed=column(num_resumed),
        resumed_from=column(resumed_from),
        # What lies behind the resumed tokens is written over before it is read.
        resumed_log_probs=table([None if one is None else one.log_probs for one in responses], width, np.float32),
        resumed_truncated=table(
            [None if one is None else one.truncated_log_probs for one in responses], width, np.float32
        ),
        trigger_ids=table([request.trigger_ids for request in requests], budgets.trigger_width),
        trigger_length=column([len(request.trigger_ids) for request in requests]),
        max_first=column(np.full(count, budgets.max_first)),
        second_budget=column(np.full(count, budgets.second)),
        temperature=column(np.full(count, settings.temperature), np.float32),
        second_temperature=column(np.full(count, asked.second_temperature), np.float32),
    )


def drawing_rules(vocab: int, never: np.ndarray, end_ids: Sequence[int], settings: SamplingConfig) -> Rules:
    """`never` lists the ids that are not drawn; where end tokens are ignored, they are not drawn either."""
    allowed, ends = np.ones(vocab, bool), np.zeros(vocab, bool)
    allowed[never] = False
    ends[list(end_ids)] = not settings.ignore_eos
    if settings.ignore_eos:
        allowed[list(end_ids)] = False
    top_k, top_p, min_p = np.int32(settings.top_k), np.float32(settings.top_p), np.float32(settings.min_p)
    return Rules(allowed, ends, top_k, top_p, min_p)
