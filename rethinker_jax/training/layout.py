"""Packed rows as arrays: what the forward pass is fed, and the rows as the loss sees them."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, no_type_check

import jax
import numpy as np

from rethinker_jax.prompts.batch import table_rows, unique_images
from rethinker_jax.prompts.windows import VisionBatch
from rethinker_jax.training.packing import Group, PackedRow, Piece
from rethinker_jax.types import Prompt


@dataclasses.dataclass(frozen=True)
class TrainRow:
    """A prompt, a completion, and what is learned from it. Arrays are [length], as long as the completion.

    Rows with the same `Prompt` object are run as one group. loss_mask: tokens of the policy gradient; nll_mask: tokens
    of the supervised loss. `fresh` rows were drawn by the current policy (not replayed), so their old log-probs can be
    checked against ours. `sampler_log_probs`: where `old_log_probs` are the trainer's, those of the sampler that drew
    the tokens.
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
class PackedText:
    """Packed rows of tokens; each shard of the mesh has its own, and what a piece goes on from is in its shard.

    token_ids, image_index  int32 [shards, rows, length]; image_index ≥ 0 is a row of the table of merged image tokens.
    positions               int32 [3, shards, rows, length], m-RoPE.
    segments                int32 [shards, rows, length]: the pieces of a row, from 1; 0 = padding.
    query_segments          int32 [shards, rows, length]: which keys of the prefix a token sees; 0 = none.
    prefix_index            int32 [shards, rows, prefix]: keys before a row, as places in the shard's flattened rows.
    prefix_segments         int32 [shards, rows, prefix]: who sees them; 0 = padding.
    """

    token_ids: Any
    positions: Any
    image_index: Any
    segments: Any
    query_segments: Any
    prefix_index: Any
    prefix_segments: Any


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """Arrays of one forward and backward pass: tokens as they are run, and rows as the loss sees them.

    target_index, target_ids  int32 [shards, targets]: the place of each completion token's prediction in the shard's
                              flattened packed rows, and the token.
    token_index               int32 [rows, length]: the place of each row's tokens in the flattened targets.
    The other arrays are [rows, length] or [rows]. `sampler_log_probs` is None where no row of the optimizer step has
    any; a row without them counts as drawn by its old log-probs.
    """

    text: PackedText
    vision: VisionBatch | None
    target_index: Any
    target_ids: Any
    token_index: Any
    completion_mask: Any
    loss_mask: Any
    nll_mask: Any
    old_log_probs: Any
    advantages: Any
    fresh: Any
    sampler_log_probs: Any = None


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes that the micro-batches of an optimizer step share: packed rows, and rows of the loss."""

    rows: int
    row_tokens: int
    prefix: int
    targets: int
    train_rows: int
    length: int
    two_samplers: bool


def prompts_of(rows: Sequence[TrainRow], numbers: Sequence[int]) -> list[Prompt]:
    """The prompts of the rows of these `numbers`, each object once, in the order in which they come first."""
    return list({id(rows[number].prompt): rows[number].prompt for number in numbers}.values())


def lay_out(
    rows: Sequence[TrainRow],
    numbers: Sequence[int],
    cells: Sequence[Sequence[Group]],
    packed: Sequence[Sequence[PackedRow]],
    vision: VisionBatch | None,
    shape: Shape,
) -> TrainBatch:
    """One micro-batch: the rows of these `numbers`, which lie in these cells, one a shard."""
    prompts = prompts_of(rows, numbers)
    images = unique_images(prompts)[1]
    table_of = {id(prompt): table_rows(prompt, vision, places) for prompt, places in zip(prompts, images, strict=True)}
    size = len(cells), shape.rows, shape.row_tokens
    text = PackedText(
        token_ids=np.zeros(size, np.int32),
        positions=np.zeros((3, *size), np.int32),
        image_index=np.full(size, -1, np.int32),
        segments=np.zeros(size, np.int32),
        query_segments=np.zeros(size, np.int32),
        prefix_index=np.zeros((*size[:2], shape.prefix), np.int32),
        prefix_segments=np.zeros((*size[:2], shape.prefix), np.int32),
    )
    target_index = np.zeros((len(cells), shape.targets), np.int32)
    target_ids = np.zeros((len(cells), shape.targets), np.int32)
    token_places: dict[int, np.ndarray] = {}  # of each row, in the flattened targets
    for shard, (cell, packed_rows) in enumerate(zip(cells, packed, strict=True)):
        places = _write_pieces(text, shard, rows, cell, packed_rows, table_of)
        _write_prefixes(text, shard, cell, packed_rows, places)
        start = 0
        for number in itertools.chain.from_iterable(group.rows for group in cell):
            count = len(rows[number].completion_ids)
            target_index[shard, start : start + count] = places[number][-count:]
            target_ids[shard, start : start + count] = rows[number].completion_ids
            token_places[number] = shard * shape.targets + start + np.arange(count)
            start += count
    if vision is not None:
        vision = dataclasses.replace(vision, merged_index=())  # host only: its shapes vary
    return TrainBatch(text, vision, target_index, target_ids, **_loss_arrays(rows, numbers, token_places, shape))


def _write_pieces(
    text: PackedText,
    shard: int,
    rows: Sequence[TrainRow],
    cell: Sequence[Group],
    packed: Sequence[PackedRow],
    table_of: dict[int, np.ndarray],
) -> dict[Any, np.ndarray]:
    """Writes tokens. Returns where each sequence lies in the shard's flattened rows; a prompt's name is (group,)."""
    places: dict[Any, np.ndarray] = {}
    length = text.token_ids.shape[-1]
    for r, row in enumerate(packed):
        start = 0
        for number, piece in enumerate(row.pieces, 1):
            ids, positions, image_index = _sequence(rows, cell[piece.group], piece, table_of)
            part = slice(piece.first, piece.first + piece.num_tokens)
            here = (shard, r, slice(start, start + piece.num_tokens))
            text.token_ids[here] = ids[part]
            text.positions[(slice(None), *here)] = positions[:, part]
            text.image_index[here] = image_index[part]
            text.segments[here] = number
            name = _name(piece)
            if name not in places:
                places[name] = np.zeros(len(ids), np.int64)
            places[name][part] = r * length + start + np.arange(piece.num_tokens)
            start += piece.num_tokens
    return places


def _name(piece: Piece) -> Any:
    return (piece.group,) if piece.row is None else piece.row


def _sequence(
    rows: Sequence[TrainRow], group: Group, piece: Piece, table_of: dict[int, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token ids, positions [3, n], image_index) of the whole sequence that the piece is cut from."""
    prompt = rows[group.rows[0]].prompt
    table = table_of[id(prompt)]
    if piece.row is None:
        return prompt.token_ids[:-1], prompt.positions[:, :-1], table[:-1]
    fed = rows[piece.row].completion_ids[:-1]
    first = len(prompt) - 1 if group.shared_tokens else 0
    behind = np.broadcast_to(prompt.next_position + np.arange(len(fed)), (3, len(fed)))
    return (
        np.concatenate([prompt.token_ids[first:], fed]),
        np.concatenate([prompt.positions[:, first:], behind], axis=1),
        np.concatenate([table[first:], np.full(len(fed), -1, np.int32)]),
    )


def _write_prefixes(
    text: PackedText, shard: int, cell: Sequence[Group], packed: Sequence[PackedRow], places: dict[Any, np.ndarray]
) -> None:
    """What each piece goes on from: a prompt that all first pieces of its group in a row see, or keys of its own."""
    for r, row in enumerate(packed):
        segment_of: dict[int, int] = {}
        used, start, count = 0, 0, 0
        for piece in row.pieces:
            shared = piece.row is not None and cell[piece.group].shared_tokens > 0
            keys = places[(piece.group,)] if shared else np.zeros(0, np.int64)
            if piece.first:
                keys = np.concatenate([keys, places[_name(piece)][: piece.first]])
            segment = segment_of.get(piece.group, 0) if not piece.first and shared else 0
            if len(keys) and not segment:
                count += 1
                segment = count
                if not piece.first:
                    segment_of[piece.group] = segment
                text.prefix_index[shard, r, used : used + len(keys)] = keys
                text.prefix_segments[shard, r, used : used + len(keys)] = segment
                used += len(keys)
            text.query_segments[shard, r, start : start + piece.num_tokens] = segment
            start += piece.num_tokens


def _loss_arrays(
    rows: Sequence[TrainRow], numbers: Sequence[int], token_places: dict[int, np.ndarray], shape: Shape
) -> dict[str, np.ndarray]:
    """The rows as the loss sees them, in the order of `numbers`."""
    size = shape.train_rows, shape.length
    arrays = {
        "token_index": np.zeros(size, np.int32),
        "completion_mask": np.zeros(size, bool),
        "loss_mask": np.zeros(size, bool),
        "nll_mask": np.zeros(size, bool),
        "old_log_probs": np.zeros(size, np.float32),
        "advantages": np.zeros(size[0], np.float32),
        "fresh": np.zeros(size[0], bool),
    }
    if shape.two_samplers:
        arrays["sampler_log_probs"] = np.zeros(size, np.float32)
    for place, row in enumerate(rows[number] for number in numbers):
        count = len(row.completion_ids)
        arrays["token_index"][place, :count] = token_places.get(numbers[place], 0)
        arrays["completion_mask"][place, :count] = True
        arrays["loss_mask"][place, :count] = row.loss_mask
        arrays["nll_mask"][place, :count] = row.nll_mask
        arrays["old_log_probs"][place, :count] = row.old_log_probs
        arrays["advantages"][place] = row.advantage
        arrays["fresh"][place] = row.fresh
        if shape.two_samplers:
            known = row.old_log_probs if row.sampler_log_probs is None else row.sampler_log_probs
            arrays["sampler_log_probs"][place, :count] = known
    return arrays
