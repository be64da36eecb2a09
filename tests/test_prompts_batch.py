"""Prompts built from problems, and batches of them."""

import dataclasses
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from rethinker_jax.errors import UserError
from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.prompts.batch import pack_prompts
from rethinker_jax.prompts.build import BadPrompt, PromptBuilder
from rethinker_jax.prompts.images import ImageSettings
from rethinker_jax.prompts.template import ChatTokenizer
from rethinker_jax.prompts.windows import VisionGeometry, bucket
from rethinker_jax.types import Problem

GEOMETRY = VisionGeometry(14, 2, 56)


def png(width, height, grey):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (grey, grey, grey)).save(buffer, "PNG")
    return buffer.getvalue()


def problem(name, *images, question="Q"):
    return Problem(id=name, question=question, answer="1", images=images)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build_model_directory(path)
    return ChatTokenizer(path), ImageSettings.from_directory(path)


def make_builder(parts, **options):
    return PromptBuilder(*parts, GEOMETRY, "none", **options)


PROBLEMS = [
    problem("one", png(84, 84, 10)),
    problem("none", question="a longer question without any picture"),
    problem("two", png(28, 56, 20), png(140, 84, 30), question="add <image> and <image>?"),
    problem("other", png(84, 84, 40)),
]


def test_a_prompt_fits_together(parts):
    """Two images of 1 x 2 and 3 x 5 tokens: 17 image tokens counted through, each image in one piece."""
    prompt = make_builder(parts).build(PROBLEMS[2])
    assert [image.grid for image in prompt.images] == [(1, 4, 2), (1, 6, 10)]
    places = np.flatnonzero(prompt.token_ids == parts[0].image_token_id)
    assert prompt.image_index[places].tolist() == list(range(17))
    assert (np.delete(prompt.image_index, places) == -1).all()
    assert prompt.token_ids.dtype == prompt.image_index.dtype == prompt.positions.dtype == np.int32
    assert prompt.positions.shape == (3, len(prompt))
    assert prompt.next_position == prompt.positions.max() + 1
    # 17 tokens advance max(2, 1) + max(3, 5) = 7
    assert prompt.next_position == len(prompt) - 17 + 7


def test_the_length_is_known_before_pixels_are_decoded(parts):
    builder = make_builder(parts)
    for one in PROBLEMS:
        assert builder.check(one) == len(builder.build(one))


def test_a_prompt_too_long_is_refused_whole(parts):
    """The limit counts image tokens. Catches a limit on text alone, and one that is off by one."""
    length = len(make_builder(parts).build(PROBLEMS[2]))
    assert len(make_builder(parts, max_prompt_tokens=length).build(PROBLEMS[2])) == length
    with pytest.raises(BadPrompt, match=f"{length} tokens, 17 of them of images") as caught:
        make_builder(parts, max_prompt_tokens=length - 1).build(PROBLEMS[2])
    assert caught.value.kind == "too_long"


@pytest.mark.parametrize(
    "bad, kind",
    [
        (problem("x", b"no image"), "bad_image"),
        (problem("x", png(84, 84, 1)[:60]), "bad_image"),
        (problem("x", "/nowhere.png"), "bad_image"),
        (problem("x", png(28, 28, 1), question="<image><image>"), "image_count"),
    ],
)
def test_problems_that_cannot_become_prompts_say_why(parts, bad, kind):
    with pytest.raises(BadPrompt, match="problem 'x'") as caught:
        make_builder(parts).build(bad)
    assert caught.value.kind == kind


def test_sizes_of_processor_and_tower_must_agree(parts):
    with pytest.raises(ValueError, match="merges 2"):
        PromptBuilder(*parts, VisionGeometry(14, 4, 112), "none")
    with pytest.raises(UserError, match="unknown prompt template"):
        PromptBuilder(*parts, GEOMETRY, "nothing")


def test_the_cache_keeps_the_last_used_and_never_another_problem(parts):
    """Two problems of one id (two data sets) must not be served each other's prompt."""
    builder = make_builder(parts, cache_size=2)
    first = builder.build(PROBLEMS[0])
    builder.build(PROBLEMS[1])
    assert builder.build(PROBLEMS[0]) is first
    builder.build(PROBLEMS[2])  # pushes out "none", which was used longer ago than "one"
    assert builder.build(PROBLEMS[0]) is first
    namesake = dataclasses.replace(PROBLEMS[0], question="another question")
    assert builder.build(namesake).problem is namesake
    assert make_builder(parts).build(PROBLEMS[0]) is not first


def test_the_cache_is_bounded_by_bytes(parts):
    """84 x 84 pixels are 36 patches of 1176 floats. Room for one and a half: the second pushes the first out, a
    prompt without images costs nothing. Catches bytes that are added on replacing and never given back."""
    builder = make_builder(parts, cache_size=9, cache_bytes=36 * 1176 * 4 * 3 // 2)
    for _ in range(3):
        first = builder.build(PROBLEMS[0])
        text = builder.build(PROBLEMS[1])
        assert builder.build(PROBLEMS[0]) is first
        assert builder.build(dataclasses.replace(PROBLEMS[0], answer="2")) is not first
        assert builder.build(PROBLEMS[1]) is text
        builder.build(PROBLEMS[3])
        assert builder.build(PROBLEMS[1]) is text
        assert builder.build(PROBLEMS[0]) is not first


def patches_of_token(batch, table_row):
    """The first patch of a row of the merged table."""
    flat = batch.vision.patches.reshape(-1, GEOMETRY.unit_patches, batch.vision.patches.shape[-1])
    return flat[table_row, 0]


def test_rows_of_a_batch_hold_their_prompts_and_nothing_else(parts):
    prompts = [make_builder(parts).build(one) for one in PROBLEMS]
    batch = pack_prompts(prompts, GEOMETRY, seq_minimum=16, batch_size=6)
    text = batch.text
    assert text.token_ids.shape == (6, bucket(max(map(len, prompts)), 16)) == text.mask.shape
    assert text.lengths.tolist() == [*map(len, prompts), 0, 0]
    assert batch.next_positions.tolist() == [*(prompt.next_position for prompt in prompts), 0, 0]
    assert not text.token_ids[~text.mask].any()
    assert (text.image_index[~text.mask] == -1).all()
    assert not text.positions[:, ~text.mask].any()
    for row, prompt in enumerate(prompts):
        assert text.token_ids[row, : len(prompt)].tolist() == prompt.token_ids.tolist()
        assert text.positions[:, row, : len(prompt)].tolist() == prompt.positions.tolist()


def test_image_tokens_point_at_their_own_image_in_order(parts):
    """Each token's table row must hold that prompt's pixels. Catches offsets of the wrong prompt or image."""
    prompts = [make_builder(parts).build(one) for one in PROBLEMS]
    batch = pack_prompts(prompts, GEOMETRY)
    seen = []
    for row, prompt in enumerate(prompts):
        index = batch.text.image_index[row]
        tokens = np.concatenate(
            [image.patches[:: GEOMETRY.unit_patches] for image in prompt.images] or [np.zeros((0, 1))]
        )
        assert (index >= 0).sum() == len(tokens)
        for table_row, wanted in zip(index[index >= 0], tokens, strict=True):
            assert np.array_equal(patches_of_token(batch, table_row), wanted)
        seen += index[index >= 0].tolist()
    assert len(set(seen)) == len(seen)


def test_equal_image_objects_are_encoded_once(parts):
    """A group's rows share one prompt: 8 rows, 15 + 2 merged tokens. Catches encoding the image per row."""
    prompt = make_builder(parts).build(PROBLEMS[2])
    batch = pack_prompts([prompt] * 8, GEOMETRY)
    assert batch.vision is not None
    assert len(batch.vision.merged_index) == 2
    assert batch.vision.valid.sum() == 17 * 4
    assert (batch.text.image_index == batch.text.image_index[0]).all()


def test_a_batch_without_images_has_no_vision_part(parts):
    batch = pack_prompts([make_builder(parts).build(PROBLEMS[1])], GEOMETRY)
    assert batch.vision is None
    assert (batch.text.image_index == -1).all()


def test_batches_that_do_not_fit_are_refused(parts):
    prompt = make_builder(parts).build(PROBLEMS[0])
    with pytest.raises(ValueError, match="1 to 1 prompts, got 2"):
        pack_prompts([prompt, prompt], GEOMETRY, batch_size=1)
    with pytest.raises(ValueError, match="1 to 0 prompts"):
        pack_prompts([], GEOMETRY)
    with pytest.raises(ValueError, match="9 image tokens, but its 0 images"):
        pack_prompts([dataclasses.replace(prompt, images=())], GEOMETRY)


def test_prompts_import_neither_jax_nor_torch():
    """A verifier worker or a data process that imports jax may seize the accelerator."""
    modules = ["batch", "build", "dataset", "images", "positions", "rows", "template", "windows"]
    code = "".join(f"import rethinker_jax.prompts.{name}\n" for name in modules)
    code += "import sys; print(sorted({'jax', 'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
