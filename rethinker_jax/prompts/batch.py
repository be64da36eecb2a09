"""Prompts of one call, padded to a shape that few others differ from."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, no_type_check

import numpy as np

from rethinker_jax.prompts.windows import VisionBatch, VisionGeometry, choose_bucket, pack_images
from rethinker_jax.types import ImagePatches, Prompt


@no_type_check
@dataclasses.dataclass(frozen=True)
class TextBatch:
    """Token sequences, padded on the right.

    token_ids    int32 [batch, seq], 0 behind the end.
    positions    int32 [3, batch, seq], m-RoPE (time, height, width), 0 behind the end.
    image_index  int32 [batch, seq], row of the merged table that replaces the token's embedding, -1 = keep that.
    lengths      int32 [batch]; 0 for rows that only fill the batch.
    """

    token_ids: Any  # numpy here, jax arrays inside jitted functions
    positions: Any
    image_index: Any
    lengths: Any

    @property
    def mask(self) -> np.ndarray:
        """bool [batch, seq]: is there a token."""
        return np.arange(self.token_ids.shape[1]) < self.lengths[:, None]


@no_type_check
@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """What prefill needs of a list of prompts.

    next_positions  int32 [batch], the m-RoPE position of each row's first completion token, on all three axes.
    vision          None where no prompt has an image; every image_index is -1 then.
    """

    text: TextBatch
    vision: VisionBatch | None
    next_positions: Any


def unique_images(prompts: Sequence[Prompt]) -> tuple[list[ImagePatches], list[list[int]]]:
    """(images, places): each image object once, and per prompt the places of its images in that list."""
    images: list[ImagePatches] = []
    place_of: dict[int, int] = {}  # by identity: comparing pixels would cost more than it finds
    places = []
    for prompt in prompts:
        for image in prompt.images:
            if id(image) not in place_of:
                place_of[id(image)] = len(images)
                images.append(image)
        places.append([place_of[id(image)] for image in prompt.images])
    return images, places


def pack_prompts(
    prompts: Sequence[Prompt],
    geometry: VisionGeometry,
    *,
    seq_minimum: int = 64,
    seq_buckets: Sequence[int] = (),
    batch_size: int | None = None,
    rows: Sequence[int] | np.ndarray | None = None,
    vision_buckets: Sequence[tuple[int, int]] | None = None,
    row_multiple: int = 1,
    vision_minimum: tuple[int, int] = (1, 4),
    shards_here: Collection[int] | None = None,
) -> PromptBatch:
    """Pads prompts to one length, of `seq_buckets` where one is enough, and lays out each distinct image once.

    Prompts stand in the first rows in their order, or in `rows`; the others up to `batch_size` are empty. See
    `windows.pack_images` for the vision arguments.
    Raises ValueError for no prompts, for more of them than `batch_size`, and for image tokens that no image fills.
    """
    num_rows = len(prompts) if batch_size is None else batch_size
    if not prompts or len(prompts) > num_rows:
        raise ValueError(f"pack_prompts wants 1 to {num_rows} prompts, got {len(prompts)}")
    images, places = unique_images(prompts)
    vision = None
    if images:
        vision = pack_images(
            images, geometry, vision_buckets, row_multiple=row_multiple, minimum=vision_minimum, shards_here=shards_here
        )

    seq = choose_bucket(max(len(prompt) for prompt in prompts), seq_buckets, seq_minimum)
    token_ids = np.zeros((num_rows, seq), np.int32)
    positions = np.zeros((3, num_rows, seq), np.int32)
    image_index = np.full((num_rows, seq), -1, np.int32)
    lengths = np.zeros(num_rows, np.int32)
    next_positions = np.zeros(num_rows, np.int32)
    for place, (row, prompt) in enumerate(zip(range(len(prompts)) if rows is None else rows, prompts, strict=True)):
        n = len(prompt)
        token_ids[row, :n] = prompt.token_ids
        positions[:, row, :n] = prompt.positions
        lengths[row] = n
        next_positions[row] = prompt.next_position
        image_index[row, :n] = table_rows(prompt, vision, places[place])
    return PromptBatch(TextBatch(token_ids, positions, image_index, lengths), vision, next_positions)


def table_rows(prompt: Prompt, vision: VisionBatch | None, places: Sequence[int]) -> np.ndarray:
    """int32 [seq]: the prompt's image_index, which counts its own merged tokens, as rows of the batch's table."""
    is_image = prompt.image_index >= 0
    tables = [vision.merged_index[place] for place in places] if vision is not None else []
    table = np.concatenate([np.zeros(0, np.int32), *tables])
    wanted = int(prompt.image_index.max(initial=-1)) + 1
    if wanted != len(table) or int(is_image.sum()) != len(table):
        raise ValueError(
            f"problem {prompt.problem.id!r}: {int(is_image.sum())} image tokens, but its {len(prompt.images)} images "
            f"have {len(table)} merged tokens"
        )
    rows = np.full(len(prompt), -1, np.int32)
    rows[is_image] = table[prompt.image_index[is_image]]
    return rows
