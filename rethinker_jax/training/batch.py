"""From rows to the micro-batches of one optimizer step: one static shape, every image and every prompt run once.

`packing.py` says which tokens stand where, `layout.py` makes arrays of it; here are the sizes.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rethinker_jax.config import BucketsConfig
from rethinker_jax.models.sharding import WHOLE, Parts
from rethinker_jax.prompts.batch import unique_images
from rethinker_jax.prompts.windows import VisionBatch, VisionGeometry, choose_bucket, pack_images
from rethinker_jax.training.layout import Shape, TrainBatch, TrainRow, lay_out, prompts_of
from rethinker_jax.training.packing import Group, PackedRow, pack_cell, sequences_of, spread
from rethinker_jax.types import ImagePatches

SEQ_MINIMUM = 32
LONGEST_ROW = 512  # of packed rows, where the config names no lengths; what is longer is cut
COMPLETION_STEP = 64
BY_NEED = BucketsConfig()


@dataclasses.dataclass(frozen=True)
class Packed:
    """The micro-batches of an optimizer step, all of one shape, and the numbers of the rows in each, in its order.

    num_tokens: what is run, without padding; num_separate: what it would be if every row had a prompt of its own.
    num_pairs: pairs of tokens that see each other; num_targets: tokens that are predicted; grids: of the images, once
    for each batch that encodes them.
    """

    batches: tuple[TrainBatch, ...]
    rows: tuple[tuple[int, ...], ...]
    num_tokens: int
    num_pairs: int
    num_targets: int
    grids: tuple[tuple[int, int, int], ...]
    num_separate: int

    @property
    def num_places(self) -> int:
        """Places for tokens, padding included."""
        return sum(batch.text.token_ids.size for batch in self.batches)


def round_up(number: int, step: int) -> int:
    return -(-max(number, 1) // step) * step


def pack_rows(
    rows: Sequence[TrainRow],
    geometry: VisionGeometry,
    completion_length: int,
    num_rows: int,
    buckets: BucketsConfig = BY_NEED,
    parts: Parts = WHOLE,
) -> TrainBatch:
    """`rows`, in their order, as one batch of `num_rows`; see `pack_micro_batches`."""
    return pack_micro_batches(rows, geometry, completion_length, num_rows, 0, buckets, parts).batches[0]


def pack_micro_batches(
    rows: Sequence[TrainRow],
    geometry: VisionGeometry,
    completion_length: int,
    num_rows: int,
    micro_tokens: int = 0,
    buckets: BucketsConfig = BY_NEED,
    parts: Parts = WHOLE,
) -> Packed:
    """Lay out `rows` for the update, in as few micro-batches as have about `micro_tokens` tokens a shard; 0 = in one.

    `completion_length` bounds every completion. `num_rows`: what the rows of a single batch are padded to. `parts`:
    into which the mesh cuts a batch. Raises ValueError for more rows than `num_rows`.
    """
    shards = parts.text
    if len(rows) > num_rows:
        raise ValueError(f"pack_micro_batches wants at most {num_rows} rows, got {len(rows)}")
    groups = group_rows(rows)
    room = max([micro_tokens, *(len(row.prompt) + len(row.completion_ids) for row in rows)]) if micro_tokens else 0
    num_batches = _num_batches(groups, room * shards)
    cells = spread(groups, num_batches * shards)
    row_tokens = _row_tokens(groups, buckets)
    packed = [pack_cell(cell, row_tokens) for cell in cells]
    num_targets = max(sum(sum(group.completion_tokens) for group in cell) for cell in cells)
    members = [list(range(len(rows)))]  # of a single batch: rows without a completion keep their places
    if num_batches > 1:
        members = [
            sorted(row for cell in cells[start : start + shards] for group in cell for row in group.rows)
            for start in range(0, len(cells), shards)
        ]
        members[0] += [row for row, one in enumerate(rows) if not len(one.completion_ids)]
    shape = Shape(
        rows=_num_packed(max(map(len, packed), default=0) or 1, buckets.rows),
        row_tokens=row_tokens,
        prefix=_prefix_tokens(packed, buckets),
        targets=choose_bucket(max(num_targets, 1), buckets.targets),
        train_rows=num_rows if num_batches == 1 else 1 << (max(map(len, members)) - 1).bit_length(),
        length=round_up(completion_length, COMPLETION_STEP),
        two_samplers=any(row.sampler_log_probs is not None for row in rows),
    )
    images = [unique_images(prompts_of(rows, numbers))[0] for numbers in members]
    visions = _pack_visions(images, geometry, buckets.vision, parts)
    batches = tuple(
        lay_out(rows, numbers, cells[place * shards :][:shards], packed[place * shards :][:shards], vision, shape)
        for place, (numbers, vision) in enumerate(zip(members, visions, strict=True))
    )
    return Packed(
        batches,
        tuple(map(tuple, members)),
        num_tokens=sum(group.num_tokens for cell in cells for group in cell),
        num_pairs=sum(group.num_pairs for cell in cells for group in cell),
        num_targets=sum(len(row.completion_ids) for row in rows),
        grids=tuple(image.grid for some in images for image in some),
        num_separate=sum(len(row.prompt) + len(row.completion_ids) - 1 for row in rows if len(row.completion_ids)),
    )


def group_rows(rows: Sequence[TrainRow]) -> list[Group]:
    """The rows that have a completion, by their prompts, in the order in which these come first."""
    of_prompt: dict[int, list[int]] = {}  # by identity, as images
    for number, row in enumerate(rows):
        if len(row.completion_ids):
            of_prompt.setdefault(id(row.prompt), []).append(number)
    return [
        Group(tuple(numbers), len(rows[numbers[0]].prompt), tuple(len(rows[n].completion_ids) for n in numbers))
        for numbers in of_prompt.values()
    ]


def _row_tokens(groups: Sequence[Group], buckets: BucketsConfig) -> int:
    """The longest sequence, if it is no longer than the longest row that there may be."""
    longest = max((sequence.num_tokens for sequence in sequences_of(groups)), default=1)
    return choose_bucket(min(longest, max(buckets.row_tokens, default=LONGEST_ROW)), buckets.row_tokens, SEQ_MINIMUM)


def _num_batches(groups: Sequence[Group], room: int) -> int:
    """How many micro-batches of about `room` tokens hold the groups; 0 = one."""
    total = sum(group.num_tokens for group in groups)
    wanted = -(-total // room) if room else 1
    return max(1, min(wanted, sum(len(group.rows) for group in groups)))


def _num_packed(needed: int, sizes: Sequence[int]) -> int:
    """The smallest of `sizes` that is enough; where there is none, 16 steps a doubling: 6 % more at the most."""
    step = 1 << max(0, (needed - 1).bit_length() - 5)
    return min((size for size in sizes if size >= needed), default=round_up(needed, step))


def _prefix_tokens(packed: Sequence[Sequence[PackedRow]], buckets: BucketsConfig) -> int:
    most = max((row.prefix_tokens for cell in packed for row in cell), default=0)
    return choose_bucket(most, buckets.prefix_tokens, SEQ_MINIMUM) if most else 0


def _pack_visions(
    images: Sequence[Sequence[ImagePatches]],
    geometry: VisionGeometry,
    buckets: Sequence[tuple[int, int]],
    parts: Parts,
) -> Sequence[VisionBatch | None]:
    """The images of every batch, in one shape; None for all where there are none."""
    minimum = (1, 4)
    while True:
        visions = [
            pack_images(
                some, geometry, buckets, row_multiple=parts.images, minimum=minimum, shards_here=parts.images_here
            )
            if some
            else None
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
