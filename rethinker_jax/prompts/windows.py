"""The layout in which images meet the vision tower: windows as a dense array dimension.

Qwen2.5-VL's vision tower attends inside windows of `window_size` pixels in most layers and over one whole image in
the others. Its published implementation reorders patches by window and remembers where every window ends. Here windows
are a dimension of the array instead: each is padded at its end to `window_patches` patches, so window layers are one
batched dense attention; and images share *vision rows*, told apart by `segment`, so full layers are one attention per
row.

Order is the published one: windows row-major over the image, merge units row-major inside the window, the
`merge_size`² patches of a unit next to each other, as the image processor leaves them.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, no_type_check

import numpy as np

from rethinker_jax.types import ImagePatches


@dataclasses.dataclass(frozen=True)
class VisionGeometry:
    """Sizes of the vision tower, in pixels (`patch_size`, `window_size`) and patches (`merge_size`)."""

    patch_size: int = 14
    merge_size: int = 2
    window_size: int = 112

    def __post_init__(self) -> None:
        if min(self.patch_size, self.merge_size) < 1 or self.window_units < 1:
            raise ValueError(
                f"a window must hold at least one merge unit: window_size {self.window_size} is smaller than "
                f"patch_size {self.patch_size} x merge_size {self.merge_size}"
            )

    @property
    def window_units(self) -> int:
        """Merge units along one side of a window."""
        return self.window_size // self.merge_size // self.patch_size

    @property
    def unit_patches(self) -> int:
        """Patches that become one merged token."""
        return self.merge_size**2

    @property
    def window_tokens(self) -> int:
        """Merged tokens of a full window."""
        return self.window_units**2

    @property
    def window_patches(self) -> int:
        """Patches of a full window; ragged windows are padded to it."""
        return self.window_tokens * self.unit_patches


@no_type_check
@dataclasses.dataclass(frozen=True)
class VisionBatch:
    """Images laid out in vision rows.

    patches       float32 [rows, windows, window_patches, patch_dim], zero where not `valid`.
    hw            int32 [rows, windows, window_patches, 2], (height, width) ids of the rotary embedding.
    segment       int32 [rows, windows], 1.. = which image of the row the window belongs to, 0 = padding window.
    valid         bool [rows, windows, window_patches].
    merged_index  per image, in the order given: int32 [num_tokens], for each merged token in row-major order of the
                  image its row in the merged table: the merger's output as [rows * windows * window_tokens, d_model].

    A full-attention layer may look from patch a to patch b iff their segments are equal and b is valid. A video of t
    temporal slots takes t segments, because the published tower attends inside one slot at a time.
    """

    patches: Any  # numpy here, jax arrays inside jitted functions
    hw: Any
    segment: Any
    valid: Any
    merged_index: tuple[np.ndarray, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, windows per row): with the geometry, all that decides which compiled function serves the batch."""
        return self.segment.shape[0], self.segment.shape[1]

    @property
    def fill(self) -> float:
        """Share of patch slots that hold a patch."""
        return float(self.valid.mean())


@dataclasses.dataclass(frozen=True)
class FrameLayout:
    """Where the patches of one h x w frame go.

    num_windows   windows of the frame.
    slots         int32 [h * w], for each patch in the processor's order its place in [num_windows * window_patches].
    hw            int32 [h * w, 2], its (row, column) in patches.
    token_slots   int32 [tokens], for each merged token in row-major order its place in [num_windows * window_tokens].
    """

    num_windows: int
    slots: np.ndarray
    hw: Any
    token_slots: np.ndarray


def bucket(n: int, minimum: int = 1) -> int:
    """Rounds n up to minimum x (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...): four steps to each doubling.

    Above 4 x minimum at most 1/4 is added (n = 8m + 1 → 10m), on average about 1/10; below it at most `minimum` - 1.
    Four shapes per doubling keep the number of compiled functions small: 64 to 4096 by 64 gives 20.
    """
    if n < 0 or minimum < 1:
        raise ValueError(f"bucket wants n ≥ 0 and minimum ≥ 1, got n={n}, minimum={minimum}")
    units = max(1, -(-n // minimum))
    step = 1 << max(0, (units - 1).bit_length() - 3)  # keeps the three leading bits
    return -(-units // step) * step * minimum


def choose_bucket(n: int, sizes: Sequence[int], minimum: int = 1) -> int:
    """The smallest of `sizes` that holds n, else n rounded up by `bucket`."""
    return min((size for size in sizes if size >= n), default=bucket(n, minimum))


def frame_layout(h: int, w: int, geometry: VisionGeometry) -> FrameLayout:
    """Layout of one frame of h x w patches. Raises ValueError unless both are multiples of `merge_size`."""
    merge, side = geometry.merge_size, geometry.window_units
    if h < 1 or w < 1 or h % merge or w % merge:
        raise ValueError(f"a grid of {h} x {w} patches cannot be merged by {merge} x {merge}: both must be multiples")
    unit_row, unit_column = (axis.ravel() for axis in np.indices((h // merge, w // merge)))
    windows_across = -(-(w // merge) // side)
    window = unit_row // side * windows_across + unit_column // side
    # A ragged window is narrower, and its units close ranks: the place of a unit inside counts the window's own width.
    window_width = np.minimum(side, w // merge - unit_column // side * side)
    token_slots = window * geometry.window_tokens + unit_row % side * window_width + unit_column % side
    inside = np.arange(geometry.unit_patches)
    slots = token_slots[:, None] * geometry.unit_patches + inside
    rows = unit_row[:, None] * merge + inside // merge
    columns = unit_column[:, None] * merge + inside % merge
    return FrameLayout(
        num_windows=int(window[-1]) + 1,
        slots=slots.reshape(-1).astype(np.int32),
        hw=np.stack([rows.reshape(-1), columns.reshape(-1)], axis=-1).astype(np.int32),
        token_slots=token_slots.astype(np.int32),
    )


def num_windows(grid: tuple[int, int, int], geometry: VisionGeometry) -> int:
    """Windows that an image of this (t, h, w) grid takes."""
    t, h, w = grid
    side = geometry.window_units * geometry.merge_size
    return t * -(-h // side) * -(-w // side)


@dataclasses.dataclass(frozen=True)
class _Place:
    row: int
    first_window: int
    segment: int


def _first_fit(sizes: Sequence[int], capacity: int) -> tuple[list[_Place], int]:
    """Places of the frames and number of rows: largest first into the first row with room, ties in the order given."""
    used: list[int] = []
    count: list[int] = []
    places: list[_Place | None] = [None] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((r for r, n in enumerate(used) if n + sizes[index] <= capacity), len(used))
        if row == len(used):
            used.append(0)
            count.append(0)
        count[row] += 1
        places[index] = _Place(row, used[row], count[row])
        used[row] += sizes[index]
    return [place for place in places if place is not None], len(used)


def _choose_rows(
    sizes: Sequence[int], buckets: Sequence[tuple[int, int]] | None, row_multiple: int, minimum: tuple[int, int]
) -> tuple[list[_Place], int, int]:
    """(places, rows, windows per row): the cheapest bucket that holds all frames, else sizes rounded up."""
    cost = {(rows, windows): rows * windows * windows for rows, windows in buckets or ()}
    for rows, windows in sorted(cost, key=lambda shape: (cost[shape], shape)):
        if windows < max(sizes) or rows % row_multiple:
            continue
        places, used = _first_fit(sizes, windows)
        if used <= rows:
            return places, rows, windows
    windows = bucket(max(sizes), minimum[1])
    places, used = _first_fit(sizes, windows)
    rows = bucket(used, minimum[0])
    return places, -(-rows // row_multiple) * row_multiple, windows


def pack_images(
    images: Sequence[ImagePatches],
    geometry: VisionGeometry,
    buckets: Sequence[tuple[int, int]] | None = None,
    *,
    row_multiple: int = 1,
    minimum: tuple[int, int] = (1, 4),
    shards_here: Collection[int] | None = None,
) -> VisionBatch:
    """Lays images out in vision rows.

    `buckets` lists the (rows, windows per row) shapes to choose from; where none of them holds the images, or none is
    given, a row is as wide as the widest frame and both sizes are rounded up by `bucket` from `minimum` = (rows,
    windows). `row_multiple` is for meshes that shard rows: into so many parts, of which only `shards_here` get pixels
    (None = all). Raises ValueError for no images and for patches that do not
    fit the grid.
    """
    if not images:
        raise ValueError("pack_images wants at least one image; a text-only batch has no vision batch")
    layouts: dict[tuple[int, int], FrameLayout] = {}
    for index, image in enumerate(images):
        t, h, w = image.grid
        if image.patches.ndim != 2 or image.patches.shape[0] != t * h * w:
            raise ValueError(f"image {index}: {image.patches.shape} patches for a grid of {t} x {h} x {w}")
        layouts.setdefault((h, w), frame_layout(h, w, geometry))
    frames = [(image, slot) for image in images for slot in range(image.grid[0])]
    sizes = [layouts[image.grid[1:]].num_windows for image, _ in frames]
    places, rows, windows = _choose_rows(sizes, buckets, row_multiple, minimum)

    width, patch_dim = geometry.window_patches, images[0].patches.shape[1]
    patches = np.zeros((rows * windows * width, patch_dim), np.float32)
    hw = np.zeros((rows * windows * width, 2), np.int32)
    valid = np.zeros(rows * windows * width, bool)
    segment = np.zeros(rows * windows, np.int32)
    frame_tokens = []
    for (image, slot), place in zip(frames, places, strict=True):
        layout = layouts[image.grid[1:]]
        start = place.row * windows + place.first_window
        where = layout.slots + start * width
        if shards_here is None or place.row // (rows // row_multiple) in shards_here:
            patches[where] = image.patches[slot * len(where) : (slot + 1) * len(where)]
        hw[where] = layout.hw
        valid[where] = True
        segment[start : start + layout.num_windows] = place.segment
        frame_tokens.append((layout.token_slots + start * geometry.window_tokens).astype(np.int32))
    tokens = iter(frame_tokens)
    return VisionBatch(
        patches=patches.reshape(rows, windows, width, patch_dim),
        hw=hw.reshape(rows, windows, width, 2),
        segment=segment.reshape(rows, windows),
        valid=valid.reshape(rows, windows, width),
        merged_index=tuple(np.concatenate([next(tokens) for _ in range(image.grid[0])]) for image in images),
    )
