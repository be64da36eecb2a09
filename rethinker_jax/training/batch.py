"""From rows to the arrays of one optimizer step: static shapes, right-padded, every image encoded once."""

import dataclasses
from collections.abc import Sequence
from typing import Any, no_type_check

import jax
import numpy as np

from rethinker_jax.config import BucketsConfig
from rethinker_jax.prompts.batch import TextBatch, table_rows, unique_images
from rethinker_jax.prompts.windows import VisionBatch, VisionGeometry, choose_bucket, pack_images
from rethinker_jax.types import Prompt

SEQ_MINIMUM = 32
COMPLETION_STEP = 64
BY_NEED = BucketsConfig()


@dataclasses.dataclass(frozen=True)
class TrainRow:
    """A prompt, a completion, and what is learned from it. Arrays are [length], as long as the completion.

    loss_mask: tokens of the policy gradient; nll_mask: tokens of the supervised loss.
    `fresh` rows were drawn by the current policy (not replayed), so their old log-probs can be checked against ours.
    `sampler_log_probs`: where `old_log_probs` are the trainer's, those of the sampler that drew the tokens.
    """

    prompt: Prompt
    completion_ids: np.ndarray
    loss_mask: np.ndarray
    nll_mask: np.ndarray
    old_log_probs: np.ndarray
    advantage: float = 0.0
    fresh: bool = True
    sampler_log_probs: np.ndarray | None = None


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """Arrays of one optimizer step. `text` rows are prompt + completion; completion arrays are [rows, length].

    state_index[r, t] is the position in row r whose hidden state predicts completion token t. `sampler_log_probs` is
    None where no row of the optimizer step has any; a row without them counts as drawn by its old log-probs.
    """

    text: TextBatch
    vision: VisionBatch | None
    state_index: Any
    completion_ids: Any
    completion_mask: Any
    loss_mask: Any
    nll_mask: Any
    old_log_probs: Any
    advantages: Any
    fresh: Any
    sampler_log_probs: Any = None

    @property
    def num_tokens(self) -> int:
        """Tokens in the rows, without padding; of a batch on the host."""
        return int(self.text.lengths.sum())


def round_up(number: int, step: int) -> int:
    return -(-max(number, 1) // step) * step


def pack_rows(
    rows: Sequence[TrainRow],
    geometry: VisionGeometry,
    completion_length: int,
    num_rows: int,
    buckets: BucketsConfig = BY_NEED,
    row_multiple: int = 1,
) -> TrainBatch:
    """Lay out `rows` for the update, padded with empty rows to `num_rows`.

    `completion_length` bounds every completion; it is rounded up to a bucket. Rows that share an image share its
    encoding. `row_multiple`: what the vision rows must divide by, so that a mesh can share them out.
    """
    return pack_micro_batches(rows, geometry, completion_length, num_rows, num_rows, buckets, row_multiple)[0]


def pack_micro_batches(
    rows: Sequence[TrainRow],
    geometry: VisionGeometry,
    completion_length: int,
    num_rows: int,
    micro_rows: int,
    buckets: BucketsConfig = BY_NEED,
    row_multiple: int = 1,
) -> list[TrainBatch]:
    """`rows`, padded with empty ones to `num_rows`, as batches of `micro_rows` rows, all of one shape.

    The update stacks them, so a batch of short rows is as long as the longest, and one without images, or without rows
    at all, has room for images if another has some. Raises ValueError for more rows than `num_rows`.
    """
    if len(rows) > num_rows:
        raise ValueError(f"pack_micro_batches wants at most {num_rows} rows, got {len(rows)}")
    chunks = [rows[start : start + micro_rows] for start in range(0, num_rows, micro_rows)]
    longest = max((len(row.prompt) + len(row.completion_ids) for row in rows), default=1)
    seq = choose_bucket(longest, buckets.row_tokens, SEQ_MINIMUM)
    length = round_up(completion_length, COMPLETION_STEP)
    visions = _pack_visions(chunks, geometry, micro_rows, buckets.vision, row_multiple)
    two_samplers = any(row.sampler_log_probs is not None for row in rows)
    return [
        _lay_out(chunk, vision, micro_rows, seq, length, two_samplers)
        for chunk, vision in zip(chunks, visions, strict=True)
    ]


def _pack_visions(
    chunks: Sequence[Sequence[TrainRow]],
    geometry: VisionGeometry,
    micro_rows: int,
    buckets: Sequence[tuple[int, int]],
    row_multiple: int,
) -> Sequence[VisionBatch | None]:
    """The images of every chunk, in one shape; None for all where there are none."""
    # Half a row an image is the usual need; a common minimum keeps the number of compiled shapes small.
    minimum = (max(1, micro_rows // 2), 4)
    images = [unique_images([row.prompt for row in chunk])[0] for chunk in chunks]
    while True:
        visions = [
            pack_images(some, geometry, buckets, row_multiple=row_multiple, minimum=minimum) if some else None
            for some in images
        ]
        found = [vision for vision in visions if vision is not None]
        if len({vision.shape for vision in found}) <= 1:
            break
        minimum = (max(vision.shape[0] for vision in found), max(vision.shape[1] for vision in found))
        buckets = [shape for shape in buckets if shape[0] >= minimum[0] and shape[1] >= minimum[1]]
    if not found:
        return visions
    like = found[0]
    empty = VisionBatch(*(np.zeros_like(array) for array in (like.patches, like.hw, like.segment, like.valid)), ())
    return [empty if vision is None else vision for vision in visions]


def _lay_out(
    rows: Sequence[TrainRow], vision: VisionBatch | None, num_rows: int, seq: int, length: int, two_samplers: bool
) -> TrainBatch:
    places = unique_images([row.prompt for row in rows])[1]
    text = TextBatch(
        token_ids=np.zeros((num_rows, seq), np.int32),
        positions=np.zeros((3, num_rows, seq), np.int32),
        image_index=np.full((num_rows, seq), -1, np.int32),
        lengths=np.zeros(num_rows, np.int32),
    )
    arrays = {
        "state_index": np.zeros((num_rows, length), np.int32),
        "completion_ids": np.zeros((num_rows, length), np.int32),
        "completion_mask": np.zeros((num_rows, length), bool),
        "loss_mask": np.zeros((num_rows, length), bool),
        "nll_mask": np.zeros((num_rows, length), bool),
        "old_log_probs": np.zeros((num_rows, length), np.float32),
        "advantages": np.zeros(num_rows, np.float32),
        "fresh": np.zeros(num_rows, bool),
    }
    if two_samplers:
        arrays["sampler_log_probs"] = np.zeros((num_rows, length), np.float32)
    for r, row in enumerate(rows):
        start, count = len(row.prompt), len(row.completion_ids)
        text.token_ids[r, :start] = row.prompt.token_ids
        text.token_ids[r, start : start + count] = row.completion_ids
        text.positions[:, r, :start] = row.prompt.positions
        text.positions[:, r, start : start + count] = row.prompt.next_position + np.arange(count)
        text.lengths[r] = start + count
        text.image_index[r, :start] = table_rows(row.prompt, vision, places[r])
        arrays["state_index"][r, :count] = np.arange(start - 1, start + count - 1)
        arrays["completion_ids"][r, :count] = row.completion_ids
        arrays["completion_mask"][r, :count] = True
        arrays["loss_mask"][r, :count] = row.loss_mask
        arrays["nll_mask"][r, :count] = row.nll_mask
        arrays["old_log_probs"][r, :count] = row.old_log_probs
        arrays["advantages"][r] = row.advantage
        arrays["fresh"][r] = row.fresh
        if two_samplers:
            known = row.old_log_probs if row.sampler_log_probs is None else row.sampler_log_probs
            arrays["sampler_log_probs"][r, :count] = known
    if vision is not None:
        vision = dataclasses.replace(vision, merged_index=())  # host only: its shapes vary
    return TrainBatch(text=text, vision=vision, **arrays)
