"""Against transformers on torch: whole models in the shapes of the published sizes, on every kind of prompt; video."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from reference_cases import LIVE_CASES, SHAPES, make_config, noise
from reference_ours import encode, geometry_of, load, on_device

from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.prompts.positions import video_positions
from rethinker_jax.prompts.windows import pack_images
from rethinker_jax.types import ImagePatches

torch: Any = pytest.importorskip("torch", reason="torch is not installed (pip install 'rethinker_jax[parity]')")

TOLERANCE = 1e-4


@pytest.mark.parametrize("name", SHAPES)
def test_shape(name: str, tmp_path: Path) -> None:
    """Catches what holds for one shape only: a group of heads, a window of another size, full attention at the
    published indexes instead of the config's, positions that padding moves, a gradient that stops at the image."""
    from parity import compare

    compared = list(compare(name, tmp_path))
    assert [one.case for one in compared] == list(LIVE_CASES)
    for one in compared:
        assert max(one.logits, one.left_padded, one.loss, one.gradients) <= TOLERANCE, one
        # A greedy token is only a fact if it leads by far more than rounding moves logits.
        assert one.gap > 5 * one.logits and one.greedy_equal, one


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any, Path]:
    """(config, transformers' model, directory)."""
    import reference_torch

    directory = tmp_path_factory.mktemp("example")
    build_model_directory(directory)
    raw = make_config("tied", json.loads((directory / "config.json").read_text()))
    return raw, reference_torch.make_model(raw), directory


@pytest.mark.parametrize("grid", [(3, 6, 10), (2, 4, 4), (1, 14, 6)])
def test_tower_of_a_video(example: tuple[dict[str, Any], Any, Path], grid: tuple[int, int, int]) -> None:
    """Catches frames that see each other, and tokens that come out in another order than slot, row, column."""
    raw, theirs, directory = example
    model, params = load(raw, directory)
    patches = noise(8, f"video {grid}", (grid[0] * grid[1] * grid[2], model.config.vision.patch_dim))
    with torch.no_grad():
        wanted = theirs.model.visual(torch.from_numpy(patches), grid_thw=torch.tensor([grid])).pooler_output.numpy()
    vision = pack_images([ImagePatches(patches, grid)], geometry_of(model.config), [(2, 16)])
    ours = np.asarray(encode(model, params, on_device(vision)))[vision.merged_index[0]]
    assert np.abs(ours - wanted).max() <= TOLERANCE * wanted.std()
    assert ours.dtype == jnp.float32


# 0.35 s at 2 a second: 10 slots are 6.9999998 in float64 and 7 in float32. 1/12 comes from 24 frames a second.
@pytest.mark.parametrize("second_per_grid", [0.35, 1 / 12, 0.5, 1.0, 1.3, 2.0])
def test_positions_of_a_video(example: tuple[dict[str, Any], Any, Path], second_per_grid: float) -> None:
    """A video between text. Catches time cut before it is multiplied (version 4), text that resumes behind time, and
    products in another precision."""
    raw, theirs, _ = example
    vision = raw["vision_config"]
    grid = (30, 6, 10)
    kinds = np.array([0] * 3 + [2] * (30 * 3 * 5) + [0] * 4)
    positions, deltas = theirs.model.get_rope_index(
        torch.from_numpy(kinds[None] + 20),
        mm_token_type_ids=torch.from_numpy(kinds[None]),
        video_grid_thw=torch.tensor([grid]),
        second_per_grid_ts=torch.tensor([second_per_grid]),
    )
    merge = vision["spatial_merge_size"]
    block, resume = video_positions(3, grid, merge, vision["tokens_per_second"], second_per_grid)
    text = [np.broadcast_to(np.arange(start, start + count), (3, count)) for start, count in ((0, 3), (resume, 4))]
    ours = np.concatenate([text[0], block, text[1]], axis=1)
    np.testing.assert_array_equal(ours, positions[:, 0].numpy())
    assert int(ours.max()) + 1 == len(kinds) + int(deltas)
