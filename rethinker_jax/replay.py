"""Selective Sample Replay: keep the rows that teach something, and fill the batch with them. numpy only.

VL-Rethinker (arXiv 2504.08837) §3.2 and Algorithm 1. As training goes on, more and more groups have all samples right
or all wrong; their advantages are zero and their rows teach nothing. SSR trains on the others, in one of three forms,
between which paper and released code (commits of April 2025) went to and fro; `replay.form` names one:

top_up      Algorithm 1: all effective rows, and what is missing from a buffer that is cleared every
            `replay.clear_every` optimizer steps. With a `clear_every` that no run reaches it is the code of 20 April,
            but for that code's buffer of half a rollout and its draws with replacement.
bootstrap   The code of 17 April: rows drawn from the effective ones of the current rollout, with replacement; no
            buffer. The code made half as many rows as were rolled out, and where fewer than half were effective took
            each once before it drew; ours are as many as the batch holds, all drawn. The histogram of advantages in
            Fig. 6 looks like this form at alpha 1.
deque       The code of 22 April: a bootstrap as large as the effective rows of the batch, and what is missing from a
            buffer that is never cleared. The code made the first part and the buffer at most half a rollout, drew with
            replacement from both, and held no row to an age; here `replay.capacity`, `.replacement` and `.max_age`.
            The head (24 April) fills up to half a rollout only, behind a flag that never reaches it.

Beside `ssr` there are modes without a buffer to draw from: `none`, `filter`, and `dynamic`, dynamic sampling in the
manner of DAPO (arXiv 2503.14476, §3.2): prompts are drawn until enough groups have an advantage, and groups that are
too many are trained on in the next step (DAPO's code drops them).

In `ssr` P(j) ∝ |advantage|^alpha (the code's |advantage| + 1e-4 has no alpha), and there is one buffer for the run,
not one a process as in the code: all rows come in, in the same order in each process, and draws are named by the seed
and the optimizer step. Replayed rows keep the advantage and the log-probs that they were drawn with, so the ratio of
the loss sees how far the policy has moved since, and clips.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rethinker_jax.config import ReplayConfig


@dataclasses.dataclass(frozen=True)
class Experience:
    """One row to learn from. `problem` is the number of its dataset row; pixels are made again from there.

    Arrays are [length]: tokens, masks of the policy gradient and of the supervised loss, behaviour log-probs. Where
    `old_log_probs` are the trainer's, `sampler_log_probs` may be those that drew it (`loss.importance_cap`).
    `added`: a kept second look beside its first response, which is the row before it (`rethink.kept_as: addition`).
    """

    problem: int
    completion_ids: np.ndarray
    loss_mask: np.ndarray
    nll_mask: np.ndarray
    old_log_probs: np.ndarray
    advantage: float
    update: int = 0  # optimizer step at which it was drawn
    sampler_log_probs: np.ndarray | None = None
    added: bool = False


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rows of one optimizer step, the new buffer, and how many rows came from where.

    `fresh` rows are of the current rollout (a bootstrap may hold one several times), `replayed` ones from the buffer.
    `weights` of the policy gradient, of `fresh` and then `replayed` rows; empty = all 1.
    """

    fresh: tuple[Experience, ...]
    replayed: tuple[Experience, ...]
    buffer: tuple[Experience, ...]
    weights: tuple[float, ...] = ()


def select(
    raw: Sequence[Experience],
    buffer: Sequence[Experience],
    config: ReplayConfig,
    epsilon: float,
    name: tuple[int, int],
    rollout: Sequence[Experience] | None = None,
    drawn_at: int = 0,
) -> Selection:
    """The rows of one optimizer step from its share `raw` of the `rollout` (None: all of it) and from the buffer.

    Rows that were added to their samples are rows like others: they count in `raw`, teach, ride along and are kept.

    Rows are effective where |advantage| > epsilon; no other is ever drawn or kept. Rows without advantage but with a
    supervised loss ride along, out of the policy gradient: successful second looks, which the paper wants learned
    whatever their group did. Mode `ssr` fills up to len(raw) rows; an empty buffer, or for a bootstrap a rollout
    without an effective row, adds nothing: the selection may be smaller than `raw` then, or empty. `name` = (seed,
    optimizer step) names the randomness, and the step decides when the buffer is cleared and how old its rows are.

    Mode `filter` takes the effective rows and never fills up (the released code repeats them until the batch is full).
    `dynamic` takes the same ones of a step that `share_out` filled; rows from before `drawn_at`, the optimizer step at
    which the step's own rows were drawn, count as replayed, and the buffer stays. `none` takes all, as plain GRPO.
    """
    if config.mode == "none":
        return Selection(tuple(raw), (), ())
    effective = effective_rows(raw, epsilon)
    riders = tuple(
        dataclasses.replace(row, loss_mask=np.zeros_like(row.loss_mask))
        for row in raw
        if abs(row.advantage) <= epsilon and row.nll_mask.any()
    )
    if config.mode == "filter":
        return Selection((*effective, *riders), (), ())
    if config.mode == "dynamic":
        fresh = tuple(row for row in (*effective, *riders) if row.update >= drawn_at)
        return Selection(fresh, tuple(row for row in (*effective, *riders) if row.update < drawn_at), tuple(buffer))
    ones, places = (1.0,) * len(riders), len(raw) - len(riders)
    if config.form == "bootstrap":
        pool = effective if rollout is None else effective_rows(rollout, epsilon)
        rows, weights = _bootstrap(pool, places, config, name)
        return Selection((*rows, *riders), (), (), (*weights, *ones))
    current, current_weights = effective, (1.0,) * len(effective)
    if config.form == "deque":
        current, current_weights = _bootstrap(effective, len(effective), config, name)
    kept = _refilled(buffer, effective, config, name[1])
    found = _draw_rows(kept, places - len(current), config, np.random.default_rng([*name, 0x55B]), config.replacement)
    return Selection((*current, *riders), found[0], kept, (*current_weights, *ones, *found[1]))


@dataclasses.dataclass(frozen=True)
class Share:
    """The rows of a step under mode `dynamic`: `carried` from the steps before and `fresh` ones; `surplus` waits."""

    carried: tuple[Experience, ...]
    fresh: tuple[Experience, ...]
    surplus: tuple[Experience, ...]


def young_enough(
    buffer: Sequence[Experience], config: ReplayConfig, group_size: int, update: int
) -> tuple[Experience, ...]:
    """Of the groups that wait in `buffer`, rows of a group one behind the other, those within `max_age` at `update`."""
    samples, limit = by_sample(buffer), config.max_age
    groups = [joined(samples[start : start + group_size]) for start in range(0, len(samples), group_size)]
    return joined([group for group in groups if not limit or update - group[0].update <= limit])


def share_out(
    groups: Sequence[Sequence[Experience]], carried: Sequence[Experience], num_samples: int, epsilon: float
) -> Share:
    """`num_samples` samples for a step: the carried groups, then those of `groups` with an advantage, in their order.

    Where these are too few, the other groups follow, as far as there are places, those with a supervised row first:
    `select` will leave their rows out, but for the supervised ones. Of too many, the last wait for the next step.
    """
    teaching = [group for group in groups if effective_rows(group, epsilon)]
    others = [group for group in groups if not effective_rows(group, epsilon)]
    others.sort(key=lambda group: not any(row.nll_mask.any() for row in group))
    samples = by_sample(joined(teaching))
    places = num_samples - len(by_sample(carried))
    fillers = by_sample(joined(others))[: max(places - len(samples), 0)]
    return Share(tuple(carried), joined([*samples[:places], *fillers]), joined(samples[places:]))


def by_sample(rows: Iterable[Experience]) -> list[tuple[Experience, ...]]:
    """The rows by their samples: one each, and a second one where it was added to the first."""
    samples: list[tuple[Experience, ...]] = []
    for row in rows:
        if row.added:
            samples[-1] = (*samples[-1], row)
        else:
            samples.append((row,))
    return samples


def joined(parts: Iterable[Sequence[Experience]]) -> tuple[Experience, ...]:
    return tuple(itertools.chain.from_iterable(parts))


def effective_rows(rows: Sequence[Experience], epsilon: float) -> tuple[Experience, ...]:
    return tuple(row for row in rows if abs(row.advantage) > epsilon)


def _refilled(
    buffer: Sequence[Experience], effective: Sequence[Experience], config: ReplayConfig, update: int
) -> tuple[Experience, ...]:
    """The buffer with the effective rows, less those that are too many or, counted from their rollout, too old."""
    cleared = config.form == "top_up" and update % config.clear_every == 0
    kept = (*(() if cleared else buffer), *effective)
    if config.max_age:
        kept = tuple(row for row in kept if update - row.update <= config.max_age)
    return kept[-config.capacity :]


def _bootstrap(
    rows: Sequence[Experience], count: int, config: ReplayConfig, name: tuple[int, int]
) -> tuple[tuple[Experience, ...], tuple[float, ...]]:
    return _draw_rows(rows, count, config, np.random.default_rng([*name, 0xB007]), True)


def _draw_rows(
    rows: Sequence[Experience], count: int, config: ReplayConfig, rng: np.random.Generator, replacement: bool
) -> tuple[tuple[Experience, ...], tuple[float, ...]]:
    """`count` of `rows` with P(j) ∝ |advantage|^alpha, and their weights; none of no rows.

    Weights are (1 / (n·P(j)))^importance, n = len(rows), as in prioritized replay (Schaul et al. 2016, arXiv
    1511.05952) but not divided by their largest. At 1 the expected sum of weighted losses is that of uniform draws; a
    row of twice the advantage comes twice as often at half the weight. They hold for draws with replacement and say
    nothing of how far the policy has moved: that is the ratio's part.
    """
    sizes = np.array([abs(row.advantage) for row in rows], np.float64)
    # By the largest, so that no power vanishes for all.
    weights = (sizes / sizes.max(initial=np.finfo(np.float64).tiny)) ** config.alpha
    chosen = draw_again(weights, count, rng) if replacement else draw(weights, count, rng)
    importance = (weights[chosen] * len(rows) / weights.sum()) ** -config.importance
    return tuple(rows[index] for index in chosen), tuple(importance.tolist())


def draw_again(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` indices with probability ∝ weights, each drawn from all of them; none of no weights."""
    if not weights.size:
        return np.zeros(0, np.int64)
    return rng.choice(weights.size, max(count, 0), p=weights / weights.sum())


def draw(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` indices with probability ∝ weights, without replacement as far as they reach, then all over again.

    By exponential races (Efraimidis and Spirakis 2006): the first of -log(u) / w to arrive is drawn first.
    """
    rounds = []
    left = count if weights.size and weights.max() > 0 else 0
    while left > 0:
        arrival = rng.exponential(size=weights.size) / np.maximum(weights, 1e-300)
        rounds.append(np.argsort(arrival, kind="stable")[: min(left, weights.size)])
        left -= len(rounds[-1])
    return np.concatenate(rounds) if rounds else np.zeros(0, np.int64)


def to_arrays(buffer: Sequence[Experience]) -> dict[str, np.ndarray]:
    """The buffer as padded arrays [rows, longest], for the checkpoint.

    The sampler's log-probs, and which rows were added, are there if a row has them and if a row was.
    """
    length = max([len(one.completion_ids) for one in buffer], default=1)
    rows = max(len(buffer), 1)  # array stores refuse empty arrays; `length` 0 marks the filler
    arrays = {
        "completion_ids": np.zeros((rows, length), np.int32),
        "loss_mask": np.zeros((rows, length), bool),
        "nll_mask": np.zeros((rows, length), bool),
        "old_log_probs": np.zeros((rows, length), np.float32),
    }
    scalars = {
        "problem": np.zeros(rows, np.int64),
        "length": np.zeros(rows, np.int64),
        "update": np.zeros(rows, np.int64),
        "advantage": np.zeros(rows, np.float64),
    }
    for place, row in enumerate(buffer):
        for name, array in arrays.items():
            array[place, : len(row.completion_ids)] = getattr(row, name)
        scalars["problem"][place] = row.problem
        scalars["length"][place] = len(row.completion_ids)
        scalars["update"][place] = row.update
        scalars["advantage"][place] = row.advantage
    if any(row.sampler_log_probs is not None for row in buffer):
        drawn_by = arrays["old_log_probs"].copy()  # a row without counts as drawn by its old log-probs
        for place, row in enumerate(buffer):
            if row.sampler_log_probs is not None:
                drawn_by[place, : len(row.sampler_log_probs)] = row.sampler_log_probs
        arrays["sampler_log_probs"] = drawn_by
    if any(row.added for row in buffer):
        scalars["added"] = np.array([row.added for row in buffer])
    return arrays | scalars


def from_arrays(arrays: Mapping[str, np.ndarray]) -> tuple[Experience, ...]:
    """What `to_arrays` wrote."""
    drawn_by, added = arrays.get("sampler_log_probs"), arrays.get("added")
    return tuple(
        Experience(
            problem=int(arrays["problem"][place]),
            completion_ids=arrays["completion_ids"][place, :length],
            loss_mask=arrays["loss_mask"][place, :length],
            nll_mask=arrays["nll_mask"][place, :length],
            old_log_probs=arrays["old_log_probs"][place, :length],
            advantage=float(arrays["advantage"][place]),
            update=int(arrays["update"][place]),
            sampler_log_probs=None if drawn_by is None else drawn_by[place, :length],
            added=added is not None and bool(added[place]),
        )
        for place, length in enumerate(arrays["length"])
        if length > 0
    )
