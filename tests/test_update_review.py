"""What a packed batch lets every prediction see, read off its arrays without a model; and corners of the update."""

import random
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rethinker_jax.config import BucketsConfig
from rethinker_jax.models.qwen25vl import Model
from rethinker_jax.models.sharding import Parts
from rethinker_jax.prompts.windows import VisionGeometry
from rethinker_jax.training.batch import BY_NEED, Packed, pack_micro_batches
from rethinker_jax.training.layout import TrainBatch, TrainRow
from rethinker_jax.training.packing import Group, pack_cell, spread
from rethinker_jax.types import ImagePatches, Problem, Prompt

GEOMETRY = VisionGeometry()
UNIT = GEOMETRY.unit_patches


def make_image(name: int, units: int) -> ImagePatches:
    """`units` merge units side by side; the pixels of each say which image and unit it is."""
    patches = np.repeat(name * 100 + np.arange(units), UNIT).astype(np.float32)[:, None]
    return ImagePatches(patches, (1, 2, 2 * units))


def make_prompt(name: int, words: int, images: tuple[ImagePatches, ...]) -> Prompt:
    """Words, then the images: such a prompt ends with an image token."""
    image_index = np.r_[[-1] * words, np.arange(sum(len(image.patches) // UNIT for image in images))].astype(np.int32)
    length = len(image_index)
    ids = (1000 * name + np.arange(length)).astype(np.int32)
    positions = np.stack([np.arange(length) + axis for axis in (0, 7, 14)]).astype(np.int32)
    return Prompt(Problem(str(name), "", ""), ids, positions, image_index, length + 3, images)


def make_row(prompt: Prompt, number: int, length: int) -> TrainRow:
    learned = np.ones(length, bool)
    ids = (100_000 + 1000 * number + np.arange(length)).astype(np.int32)
    return TrainRow(prompt, ids, learned, ~learned, np.zeros(length, np.float32), 1.0)


def random_rows(rng: random.Random) -> list[TrainRow]:
    images = [make_image(name, rng.randint(1, 6)) for name in (1, 2)]
    some = [(), (images[0],), (images[1], images[0])]
    words = [0, 1, 2, rng.randint(3, 90)]
    prompts = [
        make_prompt(name, max(rng.choice(words), not shown), shown)
        for name, shown in enumerate(rng.choices(some, k=3), 1)
    ]
    rows = [
        make_row(rng.choice(prompts), number, rng.choice([0, 1, 2, rng.randint(3, 120)]))
        for number in range(rng.randint(1, 9))
    ]
    return rows + rows[: rng.randint(0, 2)]  # as a replay with replacement: the same row again


def tokens_of(row: TrainRow) -> list[tuple[float, ...]]:
    """(is image, token or pixel, three positions) of prompt and completion."""
    prompt, pixels = (
        row.prompt,
        np.concatenate([np.zeros(0), *(image.patches[::UNIT, 0] for image in row.prompt.images)]),
    )
    shown = [
        (float(place >= 0), float(pixels[place] if place >= 0 else token), *axes)
        for token, place, axes in zip(prompt.token_ids, prompt.image_index, prompt.positions.T.tolist(), strict=True)
    ]
    behind = [(0.0, float(token), *[prompt.next_position + n] * 3) for n, token in enumerate(row.completion_ids)]
    return [*map(tuple, shown), *map(tuple, behind)]


def seen_by(batch: TrainBatch, shard: int, place: int) -> Counter[tuple[float, ...]]:
    """What a place of a shard sees, itself included."""
    text = batch.text
    length = text.token_ids.shape[-1]
    row, column = divmod(place, length)
    own = text.segments[shard, row]
    places = [row * length + n for n in range(column + 1) if own[n] == own[column] > 0]
    if text.query_segments[shard, row, column]:
        of_prefix = text.prefix_segments[shard, row] == text.query_segments[shard, row, column]
        places += text.prefix_index[shard, row][of_prefix].tolist()
    units = np.zeros(1) if batch.vision is None else batch.vision.patches.reshape(-1, UNIT, 1)[:, 0, 0]

    def token(place: int) -> tuple[float, ...]:
        here = (shard, *divmod(place, length))
        image = int(text.image_index[here])
        value = units[image] if image >= 0 else text.token_ids[here]
        return float(image >= 0), float(value), *(float(axis[here]) for axis in text.positions)

    return Counter(map(token, places))


def check_views(packed: Packed, rows: list[TrainRow]) -> None:
    for batch, numbers in zip(packed.batches, packed.rows, strict=True):
        targets = batch.target_ids.shape[1]
        for place, number in enumerate(numbers):
            row, everything = rows[number], tokens_of(rows[number])
            assert batch.completion_mask[place].sum() == len(row.completion_ids)
            for n, token in enumerate(row.completion_ids):
                shard, target = divmod(int(batch.token_index[place, n]), targets)
                assert batch.target_ids[shard, target] == token
                found = seen_by(batch, shard, int(batch.target_index[shard, target]))
                assert found == Counter(everything[: len(row.prompt) + n])


@pytest.mark.parametrize("row_tokens", [(), (1,), (16,), (512,)])
def test_a_prediction_sees_its_prompt_and_what_came_before_it(row_tokens: tuple[int, ...]) -> None:
    """Prompts of one token, prompts that end in an image, empty completions, rows that come twice, rows cut to pieces,
    shards and micro-batches. Catches a key too many, one too few, and an image or position of another prompt."""
    for seed in range(12):
        rng = random.Random(seed)
        rows = random_rows(rng)
        shards, micro_tokens = rng.choice([1, 2]), rng.choice([0, 1, 60])
        buckets = BucketsConfig(row_tokens=row_tokens, targets=rng.choice([(), (64,)]))
        packed = pack_micro_batches(rows, GEOMETRY, 128, len(rows), micro_tokens, buckets, Parts(shards, shards))
        check_views(packed, rows)


def test_a_row_without_a_completion_keeps_its_place_in_micro_batches() -> None:
    """Catches a row that no micro-batch names: whoever asks for its log-probs would not find it."""
    prompts = [make_prompt(name, 9, ()) for name in (1, 2, 3)]
    rows = [
        make_row(prompt, number, length) for number, (prompt, length) in enumerate(zip(prompts, (5, 0, 9), strict=True))
    ]
    packed = pack_micro_batches(rows, GEOMETRY, 64, 3, 5, BY_NEED)
    assert sorted(number for numbers in packed.rows for number in numbers) == [0, 1, 2]


def groups(count: int, samples: int, prompt: int, low: int, high: int) -> list[Group]:
    rng = np.random.default_rng(0)
    return [
        Group(tuple(range(n * samples, (n + 1) * samples)), prompt, tuple(rng.integers(low, high, samples).tolist()))
        for n in range(count)
    ]


@pytest.mark.parametrize(("samples", "prompt", "low", "high"), [(8, 600, 500, 700), (2, 300, 2, 20), (8, 1250, 2, 20)])
def test_packed_rows_are_full_whatever_the_lengths(samples: int, prompt: int, low: int, high: int) -> None:
    """Catches rows that stay half empty because the keys before them are bounded too tightly."""
    cell = groups(24, samples, prompt, low, high)
    assert sum(group.num_tokens for group in cell) > 0.88 * 512 * len(pack_cell(cell, 512))


def test_cells_are_even_where_there_are_many() -> None:
    """64 groups of 8 in 512 cells: a row each, so 448 halvings. Catches a search that ends before they are made."""
    loads = [sum(group.num_tokens for group in cell) for cell in spread(groups(64, 8, 10, 400, 401), 512)]
    assert max(loads) == min(loads) == 409


def test_a_frequent_token_has_an_exact_gradient_in_bfloat16() -> None:
    """4,096 gradients of 1 in one row of the embedding are 4,096. Catches a sum in bfloat16, which ends at 256."""
    ids = jnp.zeros((1, 4096), jnp.int32)

    def total(embedding: jax.Array, ids: jax.Array) -> jax.Array:
        params: dict[str, Any] = {"text": {"embedding": embedding.astype(jnp.bfloat16)}}
        # `embed` reads no field of the model: its parameters are all it needs.
        return Model.embed(None, params, ids).astype(jnp.float32).sum()  # ty: ignore[invalid-argument-type]

    found = jax.jit(jax.grad(total))(jnp.ones((3, 4)), ids)
    np.testing.assert_allclose(found, [[4096.0] * 4, [0.0] * 4, [0.0] * 4])
