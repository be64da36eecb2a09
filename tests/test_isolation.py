"""Images, rows and padding do not see each other, bit for bit; and no token sees what comes after it.

By changing one thing and comparing bits, and by gradients: where they are zero there is no influence at all.
"""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from reference_cases import make_prompt, make_rows, noise
from reference_ours import encode, for_device, forward, geometry_of, load, on_device

from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.models.qwen25vl import Model, Params, define_model
from rethinker_jax.prompts.batch import PromptBatch, TextBatch, pack_prompts
from rethinker_jax.prompts.windows import VisionBatch, VisionGeometry, pack_images
from rethinker_jax.types import ImagePatches, Prompt


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The example's model with the generated weights, and its config.json."""

    raw: dict[str, Any]
    model: Model
    params: Params

    @property
    def geometry(self) -> VisionGeometry:
        return geometry_of(self.model.config)

    def prompts(self, case: str) -> list[Prompt]:
        return [make_prompt(row, self.raw) for row in make_rows(case, self.raw)]

    def pack(self, prompts: list[Prompt]) -> PromptBatch:
        """In one shape for all tests, to compile once."""
        return pack_prompts(prompts, self.geometry, batch_size=3, vision_buckets=[(2, 12)])

    def logits(self, batch: PromptBatch) -> np.ndarray:
        return np.asarray(forward(self.model, self.params, for_device(batch)))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    directory = tmp_path_factory.mktemp("example")
    build_model_directory(directory)
    raw = json.loads((directory / "config.json").read_text())
    return Loaded(raw, *load(raw, directory))


def make_image(name: str, h: int, w: int, loaded: Loaded) -> ImagePatches:
    return ImagePatches(noise(5, name, (h * w, loaded.model.config.vision.patch_dim)), (1, h, w))


def test_images_of_one_row_do_not_see_each_other(loaded: Loaded) -> None:
    """Catches full attention that runs over the whole vision row."""
    first, second, other = (make_image(name, h, 6, loaded) for name, h in [("a", 10), ("b", 6), ("c", 6)])
    before, after = (pack_images([first, image], loaded.geometry, [(1, 16)]) for image in (second, other))
    assert set(before.segment[0].tolist()) == {0, 1, 2}  # both images, and padding windows, share the only row
    tables = [np.asarray(encode(loaded.model, loaded.params, on_device(vision))) for vision in (before, after)]
    mine, theirs = before.merged_index
    np.testing.assert_array_equal(tables[0][mine], tables[1][mine])
    assert np.abs(tables[0][theirs] - tables[1][theirs]).max(axis=1).min() > 1e-3


def test_windows_see_each_other_in_full_layers_only(loaded: Loaded) -> None:
    """Catches layers that all are windowed, and windowed ones that look out of their window."""
    near = make_image("a", 16, 16, loaded)
    changed = near.patches.copy()
    changed[-1] += 1.0  # of the last window
    far = ImagePatches(changed, near.grid)
    windowed = dataclasses.replace(loaded.model.config.vision, full_attention_blocks=())
    models = loaded.model, define_model(dataclasses.replace(loaded.model.config, vision=windowed))
    moved = []
    for model in models:
        visions = [pack_images([image], loaded.geometry) for image in (near, far)]
        a, b = (np.asarray(encode(model, loaded.params, on_device(vision))) for vision in visions)
        moved.append(np.abs(a - b)[visions[0].merged_index[0]].max(axis=1).reshape(8, 8) > 0)
    units = loaded.geometry.window_units
    assert moved[0].all()
    assert moved[1][-units:, -units:].all()
    assert not moved[1][:-units].any() and not moved[1][:, :-units].any()


def test_padding_patches_change_nothing(loaded: Loaded) -> None:
    """Catches a softmax over the padding of ragged windows, and of padding windows."""
    vision = pack_images([make_image("a", 10, 6, loaded), make_image("b", 2, 4, loaded)], loaded.geometry, [(2, 4)])
    assert (vision.valid.any(axis=2) & ~vision.valid.all(axis=2)).any() and not vision.valid.any(axis=2).all()
    filled = np.where(vision.valid[..., None], vision.patches, np.float32(50.0))
    tables = [
        np.asarray(encode(loaded.model, loaded.params, on_device(dataclasses.replace(vision, patches=patches))))
        for patches in (vision.patches, filled)
    ]
    for index in vision.merged_index:
        np.testing.assert_array_equal(tables[0][index], tables[1][index])


def test_padding_tokens_and_other_rows_change_nothing(loaded: Loaded) -> None:
    """Catches a causal mask without lengths that is read from behind, and rows that leak into each other."""
    batch = loaded.pack(loaded.prompts("padded_batch"))
    text = batch.text
    ids = np.where(text.mask, text.token_ids, 99)  # padding has other tokens,
    ids[0] = 77  # the first row too,
    changed = dataclasses.replace(
        text,
        token_ids=ids.astype(np.int32),
        positions=np.where(text.mask, text.positions, 1234).astype(np.int32),  # other positions,
        image_index=np.where(text.mask, text.image_index, 1).astype(np.int32),  # and an image's embeddings
    )
    before, after = loaded.logits(batch), loaded.logits(dataclasses.replace(batch, text=changed))
    for row in (1, 2):
        np.testing.assert_array_equal(before[row, : text.lengths[row]], after[row, : text.lengths[row]])
    assert np.abs(before[0] - after[0])[: text.lengths[0]].max() > 1e-3
    assert np.isfinite(loaded.logits(loaded.pack(loaded.prompts("one_image")))).all()  # rows of length 0 included


@pytest.mark.parametrize("row, image", [(1, 0), (2, 0), (2, 1), (2, 2)])
def test_one_image_changes_its_row_from_there_on(loaded: Loaded, row: int, image: int) -> None:
    """Catches an image that reaches another row or an earlier token, through the tower they share or the table."""
    prompts = loaded.prompts("mixed batch")
    images = list(prompts[row].images)
    images[image] = ImagePatches(images[image].patches[::-1].copy(), images[image].grid)
    changed = [*prompts]
    changed[row] = dataclasses.replace(prompts[row], images=tuple(images))
    before, after = (loaded.logits(loaded.pack(which)) for which in (prompts, changed))
    first = int(np.flatnonzero(prompts[row].image_index >= _first_token(prompts[row], image, loaded))[0])
    for other, prompt in enumerate(prompts):
        same = first if other == row else len(prompt)
        np.testing.assert_array_equal(before[other, :same], after[other, :same])
    assert np.abs(before[row] - after[row])[first : len(prompts[row])].max(axis=1).min() > 1e-4


def _first_token(prompt: Prompt, image: int, loaded: Loaded) -> int:
    """Place of an image's first token among the prompt's image tokens."""
    return sum(len(one.patches) for one in prompt.images[:image]) // loaded.geometry.unit_patches


def test_no_token_sees_a_later_one(loaded: Loaded) -> None:
    """Catches a mask off by one, either way: the gradient of state t by embedding s is zero exactly where s > t."""
    seq, real = 8, 6
    ids, index = np.arange(20, 20 + seq, dtype=np.int32)[None], np.arange(seq, dtype=np.int32)[None]
    # Every token is read from the table, so the table's gradient is the embeddings'.
    text = TextBatch(ids, np.stack([index] * 3), index, np.array([real], np.int32))
    table = loaded.params["text"]["embedding"][ids[0]]

    def states(table: jax.Array, text: TextBatch) -> jax.Array:
        return loaded.model.hidden(loaded.params, text, table)[0].sum(axis=-1)

    seen = np.abs(np.asarray(jax.jit(jax.jacrev(states))(table, text))).max(axis=-1) > 0
    assert seen[:real, :real].tolist() == np.tri(real, dtype=bool).tolist()
    assert not seen[:real, real:].any()


def test_an_image_is_seen_from_its_first_token_on(loaded: Loaded) -> None:
    """The derivative of every token's state along a random change of each image, and of the padding. Catches image
    tokens that see a later image, and a tower or a table that leads into other rows."""
    prompts = loaded.prompts("padded_batch")
    batch = pack_prompts(prompts, loaded.geometry, vision_buckets=[(1, 8)], seq_minimum=4)
    vision = batch.vision
    assert vision is not None and vision.shape == (1, 8)
    direction = noise(7, "direction", vision.patches.shape)

    @jax.jit
    def derivative(along: jax.Array, vision: VisionBatch, text: TextBatch) -> jax.Array:
        def states(patches: jax.Array) -> jax.Array:
            table = loaded.model.encode_images(loaded.params, dataclasses.replace(vision, patches=patches))
            return loaded.model.hidden(loaded.params, text, table)

        return jax.jvp(states, (vision.patches,), (along,))[1]

    def moved(changed: np.ndarray) -> np.ndarray:
        """bool [batch, seq]: tokens that change with the patches where `changed` is."""
        along = np.where(changed[..., None], direction, 0).astype(np.float32)
        return np.asarray(derivative(along, on_device(vision), batch.text) != 0).any(axis=-1) & batch.text.mask

    assert not moved(~vision.valid).any()
    merged = iter(vision.merged_index)
    for row, prompt in enumerate(prompts):
        for image in range(len(prompt.images)):
            windows = np.isin(np.arange(8), next(merged) // loaded.geometry.window_tokens)
            wanted = np.zeros_like(batch.text.mask)
            first = np.flatnonzero(prompt.image_index == _first_token(prompt, image, loaded))[0]
            wanted[row, first : len(prompt)] = True
            np.testing.assert_array_equal(moved(vision.valid & windows[:, None]), wanted)
