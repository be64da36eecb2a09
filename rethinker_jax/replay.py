"""Selective Sample Replay: keep the rows that teach something, and fill the batch with them. numpy only.

VL-Rethinker (arXiv 2504.08837) §3.2 and Algorithm 1. As training goes on, more and more groups have all samples right
or all wrong; their advantages are zero and their rows teach nothing. SSR trains on the others, and draws the rows that
are missing from a buffer, with probability proportional to |advantage|^alpha.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from rethinker_jax.config import ReplayConfig


@dataclasses.dataclass(frozen=True)
class Experience:
    """One row to learn from. `problem` is the number of its dataset row; pixels are made again from there.

    Arrays are [length]: tokens, masks of the policy gradient and of the supervised loss, behaviour log-probs.
    """

    problem: int
    completion_ids: np.ndarray
    loss_mask: np.ndarray
    nll_mask: np.ndarray
    old_log_probs: np.ndarray
    advantage: float
    update: int = 0  # optimizer step at which it was drawn


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rows of one optimizer step, the new buffer, and how many rows came from where."""

    fresh: tuple[Experience, ...]
    replayed: tuple[Experience, ...]
    buffer: tuple[Experience, ...]


def select(
    raw: Sequence[Experience],
    buffer: Sequence[Experience],
    config: ReplayConfig,
    epsilon: float,
    name: tuple[int, int],
) -> Selection:
    """Algorithm 1: all effective rows of `raw`, topped up to len(raw) from the buffer, which takes them in first.

    Rows are effective where |advantage| > epsilon. Rows without advantage but with a supervised loss ride along, out of
    the policy gradient: successful second looks, which the paper wants learned whatever their group did. Draws are
    without replacement; only when the buffer holds fewer rows than are missing does every row come again. `name` =
    (seed, optimizer step) names the randomness, and the step decides when the buffer is cleared. An empty buffer adds
    nothing: the selection may be smaller than `raw` then, or empty. Mode `filter` never tops up; `none` takes all rows.
    """
    if config.mode == "none":
        return Selection(tuple(raw), (), ())
    effective = tuple(row for row in raw if abs(row.advantage) > epsilon)
    riders = tuple(
        dataclasses.replace(row, loss_mask=np.zeros_like(row.loss_mask))
        for row in raw
        if abs(row.advantage) <= epsilon and row.nll_mask.any()
    )
    if config.mode == "filter":
        return Selection((*effective, *riders), (), ())
    kept = () if name[1] % config.clear_every == 0 else tuple(buffer)
    kept = (*kept, *effective)[-config.capacity :]
    missing = len(raw) - len(effective) - len(riders)
    sizes = np.array([abs(row.advantage) for row in kept], np.float64)
    weights = (sizes / sizes.max(initial=epsilon)) ** config.alpha  # by the largest, so that no power vanishes for all
    chosen = draw(weights, missing, np.random.default_rng([*name, 0x55B]))
    return Selection((*effective, *riders), tuple(kept[index] for index in chosen), kept)


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


def to_arrays(buffer: Sequence[Experience], length: int) -> dict[str, np.ndarray]:
    """The buffer as padded arrays [rows, length], for the checkpoint."""
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
    return arrays | scalars


def from_arrays(arrays: Mapping[str, np.ndarray]) -> tuple[Experience, ...]:
    """What `to_arrays` wrote."""
    return tuple(
        Experience(
            problem=int(arrays["problem"][place]),
            completion_ids=arrays["completion_ids"][place, :length],
            loss_mask=arrays["loss_mask"][place, :length],
            nll_mask=arrays["nll_mask"][place, :length],
            old_log_probs=arrays["old_log_probs"][place, :length],
            advantage=float(arrays["advantage"][place]),
            update=int(arrays["update"][place]),
        )
        for place, length in enumerate(arrays["length"])
        if length > 0
    )
