"""The vision layout against the published window order, and packing that keeps images apart."""

import numpy as np
import pytest

from rethinker_jax.prompts.windows import (
    VisionGeometry,
    bucket,
    frame_layout,
    num_windows,
    pack_images,
)
from rethinker_jax.types import ImagePatches

QWEN = VisionGeometry(14, 2, 112)
TINY = VisionGeometry(14, 2, 56)
# 10x14 is ragged both ways, 36x52 too; 16x16 divides; 2x4 is smaller than a window.
GRIDS = [(10, 14), (36, 52), (16, 16), (6, 6), (2, 4), (2, 2)]


def make_image(h, w, t=1, start=0):
    """Patches of 3 numbers that name themselves: (start + index, h id, w id)."""
    units = np.arange(t * h * w)
    return ImagePatches(np.stack([units + start, units % 7, units % 5], -1).astype(np.float32), (t, h, w))


def published_order(h, w, geometry):
    """(window_index, window ends in patches) as the published model computes them: pad an index map of merge units with
    -100 to whole windows (a whole extra window where it divides), cut it into windows, drop the padding."""
    side = geometry.window_size // geometry.merge_size // geometry.patch_size
    rows, columns = h // geometry.merge_size, w // geometry.merge_size
    index = np.arange(rows * columns).reshape(rows, columns)
    index = np.pad(index, ((0, side - rows % side), (0, side - columns % side)), constant_values=-100)
    across = index.shape[1] // side
    cut = [
        index[i * side : (i + 1) * side, j * side : (j + 1) * side].ravel()
        for i in range(index.shape[0] // side)
        for j in range(across)
    ]
    kept = [window[window != -100] for window in cut]
    ends = np.unique(np.cumsum([len(window) for window in kept]) * geometry.merge_size**2)
    return np.concatenate(kept), ends


@pytest.mark.parametrize("geometry", [QWEN, TINY, VisionGeometry(2, 3, 12)])
@pytest.mark.parametrize("grid", GRIDS)
def test_window_order_is_the_published_one(grid, geometry):
    """Catches column-major windows, and ragged windows whose units keep the stride of a full window."""
    h, w = (side // 2 * geometry.merge_size for side in grid)
    layout = frame_layout(h, w, geometry)
    order, ends = published_order(h, w, geometry)
    assert np.argsort(layout.token_slots).tolist() == order.tolist()
    in_window = np.bincount(layout.slots // geometry.window_patches, minlength=layout.num_windows)
    assert np.cumsum(in_window).tolist() == ends.tolist()
    assert layout.num_windows == num_windows((1, h, w), geometry) == len(ends)


@pytest.mark.parametrize("geometry", [QWEN, TINY])
@pytest.mark.parametrize("grid", GRIDS)
def test_padding_is_at_the_end_of_each_window(grid, geometry):
    """Catches holes inside a ragged window: valid must be True…True False…False."""
    valid = pack_images([make_image(*grid)], geometry).valid
    assert (np.diff(valid.astype(int), axis=-1) <= 0).all()
    assert valid.sum() == grid[0] * grid[1]


def test_196_by_140_has_the_window_sizes_of_the_published_model():
    """Image 196 high, 140 wide, or 140 x 196 as here: 10 x 14 patches, windows of 8 x 8: 8·8, 8·6, 2·8, 2·6."""
    valid = pack_images([make_image(10, 14)], QWEN).valid
    assert valid.sum(-1)[0].tolist() == [64, 48, 16, 12]


@pytest.mark.parametrize("grid", GRIDS)
def test_rotary_ids_follow_the_patches(grid):
    """The processor's order is merge blocks row-major, (0,0) (0,1) (1,0) (1,1) inside. Catches row-major patch ids."""
    h, w = grid
    wanted = [(2 * r + i, 2 * c + j) for r in range(h // 2) for c in range(w // 2) for i in (0, 1) for j in (0, 1)]
    image = make_image(h, w)
    batch = pack_images([image], TINY)
    where = np.argsort(batch.patches[batch.valid][:, 0])
    assert batch.hw[batch.valid][where].tolist() == [list(pair) for pair in wanted]


def merge(batch, geometry):
    """A stand-in for the merger: one number per merged token, its first patch's name / 4."""
    units = batch.patches[..., 0].reshape(-1, geometry.unit_patches)
    return units[:, 0] / geometry.unit_patches


@pytest.mark.parametrize("geometry", [QWEN, TINY])
def test_merged_index_restores_row_major_order_of_every_image(geometry):
    """Catches an index into the image's own table instead of the batch's, and windows left in window order."""
    grids = [(10, 14), (2, 4), (36, 52), (10, 14), (6, 6), (2, 2)]
    starts = [1000 * 4 * i for i in range(len(grids))]
    images = [make_image(h, w, start=start) for (h, w), start in zip(grids, starts, strict=True)]
    batch = pack_images(images, geometry)
    table = merge(batch, geometry)
    for (h, w), start, index in zip(grids, starts, batch.merged_index, strict=True):
        assert index.dtype == np.int32
        assert table[index].tolist() == [start / 4 + i for i in range(h * w // 4)]


def test_images_of_a_row_never_share_a_segment():
    """Catches segments counted over the batch with a reset at the wrong place, and overlapping windows."""
    images = [
        make_image(h, w, start=10_000 * i) for i, (h, w) in enumerate([(8, 8), (6, 6), (4, 4), (4, 8), (10, 6)] * 3)
    ]
    batch = pack_images(images, TINY)
    assert batch.valid.sum() == sum(len(image.patches) for image in images)
    for row in range(batch.shape[0]):
        owners = {}
        for window in range(batch.shape[1]):
            names = batch.patches[row, window][batch.valid[row, window]][:, 0] // 10_000
            segment = int(batch.segment[row, window])
            assert (segment == 0) == (len(names) == 0)
            if segment:
                assert len(set(names)) == 1
                assert owners.setdefault(segment, names[0]) == names[0]
        assert len(set(owners.values())) == len(owners)
        assert sorted(owners) == list(range(1, len(owners) + 1))


def test_a_video_slot_is_its_own_segment():
    """Full layers attend inside one temporal slot. Catches one segment for the whole video."""
    batch = pack_images([make_image(4, 4, t=3)], TINY)
    assert batch.segment[0, :3].tolist() == [1, 2, 3]
    assert merge(batch, TINY)[batch.merged_index[0]].tolist() == list(range(12))


def test_padding_is_zero():
    batch = pack_images([make_image(10, 14, start=5)], QWEN)
    assert not batch.patches[~batch.valid].any()
    assert not batch.hw[~batch.valid].any()


def test_buckets_given_are_used_and_left_when_too_small():
    """Six one-window images. 2x2 cannot hold them; of 3x2 and 1x8 the cheaper full attention (12 < 64) wins."""
    images = [make_image(4, 4) for _ in range(6)]
    assert pack_images(images, TINY, [(2, 2), (1, 8), (3, 2)]).shape == (3, 2)
    assert pack_images(images, TINY, [(2, 2)]).shape[0] * pack_images(images, TINY, [(2, 2)]).shape[1] >= 6
    # 36x52 patches are 9 x 13 tiny windows: wider than every row listed.
    assert pack_images([make_image(36, 52)], TINY, [(2, 2)]).shape == (1, 128)


def test_rows_are_a_multiple_for_meshes():
    assert pack_images([make_image(4, 4)], TINY, row_multiple=4).shape[0] == 4
    assert pack_images([make_image(4, 4)], TINY, [(1, 4), (8, 4)], row_multiple=4).shape == (8, 4)


@pytest.mark.parametrize("minimum", [1, 4, 64])
def test_bucket_rounds_up_by_at_most_its_documented_waste(minimum):
    values = [bucket(n, minimum) for n in range(1, 70 * minimum)]
    assert values == sorted(values)
    assert all(value % minimum == 0 for value in values)
    for n, value in enumerate(values, start=1):
        assert n <= value
        assert value < n + minimum if n <= 4 * minimum else value <= 1.25 * n + minimum
    # 1..8 and four steps to each of the doublings 16, 32, 64, 128
    assert len({bucket(n) for n in range(1, 65)}) == 8 + 3 * 4


@pytest.mark.parametrize(
    "call",
    [
        lambda: pack_images([], QWEN),
        lambda: pack_images([ImagePatches(np.zeros((9, 3), np.float32), (1, 3, 3))], QWEN),
        lambda: pack_images([ImagePatches(np.zeros((7, 3), np.float32), (1, 2, 4))], QWEN),
        lambda: VisionGeometry(14, 2, 20),
        lambda: bucket(-1),
    ],
)
def test_what_cannot_be_laid_out_is_refused(call):
    with pytest.raises(ValueError):
        call()
