"""m-RoPE positions against values worked out by hand from the published rule (transformers ≥ 5)."""

import numpy as np
import pytest

from rethinker_jax.prompts.positions import mrope_positions, video_positions, vision_positions

IMAGE = 99


def tokens(*parts):
    """Text tokens for an int, image tokens for a grid in patches, merged by 2."""
    ids = [[7] * part if isinstance(part, int) else [IMAGE] * (part[0] * part[1] * part[2] // 4) for part in parts]
    return np.concatenate([np.array(one, np.int32) for one in ids])


def test_text_alone_counts_on_all_three_axes():
    positions, after = mrope_positions(tokens(5), IMAGE, [], 2)
    assert positions.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert after == 5


def test_one_image_between_text():
    """3 text, a 2 x 3 image (4 x 6 patches) at 3, text resumes at 3 + max(2, 3) = 6. Catches resuming at 3 + 6 tokens,
    at 3 + 2, and rows exchanged with columns."""
    positions, after = mrope_positions(tokens(3, (1, 4, 6), 2), IMAGE, [(1, 4, 6)], 2)
    assert positions.tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7],
    ]
    assert after == 8


def test_published_delta_of_a_224_image():
    """98 tokens with one 224 x 224 image: 64 tokens advance 8, so decoding goes on at 98 - 56."""
    _, after = mrope_positions(tokens(20, (1, 16, 16), 14), IMAGE, [(1, 16, 16)], 2)
    assert after == 98 - 56


def test_images_that_touch_are_told_apart_by_their_grids():
    """1 text, images of 1 x 2 and 2 x 1 tokens in a row: starts 1, 3; text at 5. Catches one block for one run."""
    grids = [(1, 2, 4), (1, 4, 2)]
    positions, after = mrope_positions(tokens(1, *grids, 1), IMAGE, grids, 2)
    assert positions.tolist() == [[0, 1, 1, 3, 3, 5], [0, 1, 1, 3, 4, 5], [0, 1, 2, 3, 3, 5]]
    assert after == 6


def test_an_image_at_the_very_end_is_followed_by_its_longer_side():
    positions, after = mrope_positions(tokens(2, (1, 4, 8)), IMAGE, [(1, 4, 8)], 2)
    assert after == 2 + 4 == int(positions.max()) + 1


@pytest.mark.parametrize(
    "ids, grids",
    [
        (tokens(2, (1, 4, 4), 1), []),
        (tokens(2), [(1, 4, 4)]),
        (tokens(2, (1, 4, 4), 1), [(1, 4, 6)]),
        (np.array([IMAGE, IMAGE, 7, IMAGE, IMAGE], np.int32), [(1, 4, 4)]),
    ],
    ids=["no grid", "no tokens", "another size", "torn"],
)
def test_tokens_and_grids_that_disagree_are_refused(ids, grids):
    with pytest.raises(ValueError):
        mrope_positions(ids, IMAGE, grids, 2)


def test_video_example_of_version_5():
    """4 slots, 2 tokens per second, 2.0 seconds per slot, 4 x 4 patches at position 2: t = 2, 6, 10, 14; text resumes
    at 2 + 2 = 4 (version 4: 15), and with two text tokens 4, 5 the first completion token is at max + 1 = 15."""
    positions, resume = video_positions(2, (4, 4, 4), 2, 2, 2.0)
    assert positions[0, ::4].tolist() == [2, 6, 10, 14]
    assert positions[1, :4].tolist() == [2, 2, 3, 3]
    assert positions[2, :4].tolist() == [2, 3, 2, 3]
    assert resume == 4
    assert max(positions.max(), resume + 1) + 1 == 15


def test_video_time_is_floored_not_cut_before_multiplying():
    """0.75 seconds per slot at 2 tokens per second: floor(k * 1.5) = 0, 1, 3. Version 4 cut 0.75 to 0."""
    assert video_positions(0, (3, 2, 2), 2, 2, 0.75)[0][0].tolist() == [0, 1, 3]


def test_video_time_is_multiplied_in_float32():
    """0.35 s at 2 tokens per second: slot 10 is at 7 in float32, and 0.35 * 2 * 10 = 6.9999999 in mixed precision."""
    assert video_positions(0, (11, 2, 2), 2, 2, 0.35)[0][0, 10] == 7


def test_an_image_has_no_time_scale():
    """A still image of two slots advances by 1 per slot, whatever a video's seconds are."""
    assert vision_positions(5, (2, 2, 2), 2)[0][0].tolist() == [5, 6]
    with pytest.raises(ValueError):
        vision_positions(0, (1, 1, 2), 2)
