"""m-RoPE positions, as transformers ≥ 5 assigns them. Three axes: time, height, width.

Text advances all three by one per token. An image starts at the position p that the next text token would have had; its
merged token (row, column) sits at (p, p + row, p + column), and text goes on at p + max(rows, columns).
"""

from collections.abc import Sequence

import numpy as np


def mrope_positions(
    token_ids: np.ndarray, image_token_id: int, grids: Sequence[tuple[int, int, int]], merge_size: int
) -> tuple[np.ndarray, int]:
    """(positions int32 [3, seq], next_position): the latter is the first completion token's, on all three axes.

    `token_ids` [seq] has every image expanded; `grids` are (t, h, w) in patches, in order. Images may touch. Raises
    ValueError when the image tokens are not exactly those that the grids ask for, or one image's are not in one piece.
    """
    token_ids = np.asarray(token_ids)
    positions = np.zeros((3, len(token_ids)), np.int32)
    image_places = np.flatnonzero(token_ids == image_token_id)
    wanted = sum(t * (h // merge_size) * (w // merge_size) for t, h, w in grids)
    if len(image_places) != wanted:
        raise ValueError(f"{len(image_places)} image tokens, but grids {list(grids)} merge to {wanted}")
    cursor, current, used = 0, 0, 0
    for grid in grids:
        start = int(image_places[used])
        block, resume = vision_positions(current + start - cursor, grid, merge_size)
        stop = start + block.shape[1]
        if int(image_places[used + block.shape[1] - 1]) != stop - 1:
            raise ValueError(f"the tokens of the image with grid {grid} are not in one piece: text lies between them")
        positions[:, cursor:start] = np.arange(start - cursor) + current
        positions[:, start:stop] = block
        cursor, current, used = stop, resume, used + block.shape[1]
    positions[:, cursor:] = np.arange(len(token_ids) - cursor) + current
    return positions, int(positions.max(initial=-1)) + 1


def vision_positions(
    start: int, grid: tuple[int, int, int], merge_size: int, time_interval: float = 1.0
) -> tuple[np.ndarray, int]:
    """(positions int32 [3, t * rows * columns], resume) of one image or video that starts at position `start`.

    Slot k of a video lies at time start + floor(k * time_interval); images pass 1. `resume` is where text goes on:
    start + max(rows, columns), which ignores time.
    """
    t, rows, columns = grid[0], grid[1] // merge_size, grid[2] // merge_size
    if min(t, rows, columns) < 1:
        raise ValueError(f"grid {grid} has nothing left when merged by {merge_size}")
    slot, row, column = np.indices((t, rows, columns)).reshape(3, -1)
    # In float32, as there: 0.7 s x 10 rounds to 7, where float64 would be cut to 6.
    time = np.floor(slot.astype(np.float32) * np.float32(time_interval)).astype(np.int32)
    positions = np.stack([time, row, column]).astype(np.int32) + np.int32(start)
    return positions, start + max(grid[1], grid[2]) // merge_size


def video_positions(
    start: int, grid: tuple[int, int, int], merge_size: int, tokens_per_second: float, second_per_grid: float
) -> tuple[np.ndarray, int]:
    """(positions, resume) of one video; `second_per_grid` is temporal_patch_size / frames per second.

    The two major versions of transformers disagree here, and this is version 5: `second_per_grid` stays a fraction
    (version 4 cuts it to an integer), and text resumes at start + max(rows, columns) even where time has gone further
    (version 4: behind the largest). The first completion token still lies behind the largest position of the prompt, so
    decoding jumps ahead. Nothing else in this package takes videos yet.
    """
    return vision_positions(start, grid, merge_size, float(np.float32(tokens_per_second) * np.float32(second_per_grid)))
