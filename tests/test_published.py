"""The published sizes: their configs in every form, and the shapes that follow from them. Nothing is allocated."""

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import jax
import pytest
from published import COUNTS, FORMS, SIZES, TEXT_KEYS, published_config

from rethinker_jax.errors import UserError
from rethinker_jax.models.qwen25vl import param_shapes
from rethinker_jax.models.qwen_config import QwenConfig, VisionConfig, parse_config, read_config
from rethinker_jax.models.weight_table import weight_table


def read_by_transformers(raw: dict[str, Any], directory: Path) -> QwenConfig:
    """What transformers reads in `raw`, in our words."""
    transformers = pytest.importorskip("transformers")
    (directory / "config.json").write_text(json.dumps(raw))
    theirs = transformers.AutoConfig.from_pretrained(directory)
    text, vision = theirs.text_config, theirs.vision_config
    section = text.rope_parameters.get("mrope_section", [16, 24, 24])
    return QwenConfig(
        vocab=text.vocab_size,
        d_model=text.hidden_size,
        d_ff=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=text.hidden_size // text.num_attention_heads,
        norm_eps=text.rms_norm_eps,
        rope_theta=text.rope_parameters["rope_theta"],
        mrope_section=(section[0], section[1], section[2]),
        tied=theirs.tie_word_embeddings,
        dtype=str(theirs.dtype or text.dtype or "float32").removeprefix("torch."),
        image_token=theirs.image_token_id,
        video_token=theirs.video_token_id,
        vision_start_token=theirs.vision_start_token_id,
        vision_end_token=theirs.vision_end_token_id,
        vision=VisionConfig(
            depth=vision.depth,
            d_model=vision.hidden_size,
            heads=vision.num_heads,
            d_ff=vision.intermediate_size,
            out_dim=vision.out_hidden_size,
            in_channels=vision.in_channels,
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            window_size=vision.window_size,
            full_attention_blocks=tuple(vision.fullatt_block_indexes),
            tokens_per_second=vision.tokens_per_second,
            rope_theta=vision.rope_parameters["rope_theta"],
        ),
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_every_form_is_the_published_size(size: str, form: str, tmp_path: Path) -> None:
    """Catches a key that is looked for in one form only, and a default of the published sizes in the class's place."""
    raw = FORMS[form](published_config(size))
    theirs = read_by_transformers(raw, tmp_path)
    ours = read_config(tmp_path)
    assert ours == theirs
    assert ours == parse_config(published_config(size))
    found = ours.d_model, ours.d_ff, ours.layers, ours.heads, ours.kv_heads, ours.vocab, ours.tied, ours.vision.d_ff
    assert found == SIZES[size][:5] + SIZES[size][6:]
    assert (ours.head_dim, ours.vision.head_dim, ours.norm_eps, ours.dtype) == (128, 80, 1e-6, "bfloat16")


@pytest.mark.parametrize("size", SIZES)
def test_what_transformers_saves_again_is_read_the_same(size: str, tmp_path: Path) -> None:
    """The form of the installed version, whatever it is by then."""
    transformers = pytest.importorskip("transformers")
    # A copy: transformers writes into the dictionaries that it is given.
    transformers.Qwen2_5_VLConfig(**copy.deepcopy(published_config(size))).save_pretrained(tmp_path)
    assert read_config(tmp_path) == parse_config(published_config(size))


# Their defaults contradict the sizes: heads no longer divide the width, layer_types has another length.
BOUND = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")


@pytest.mark.filterwarnings("ignore:.rope_scaling. is deprecated")
@pytest.mark.parametrize("seed", range(40))
def test_keys_left_out_anywhere_mean_the_same_to_both(seed: int, tmp_path: Path) -> None:
    """Catches defaults that differ by form, say a key beside text_config that is read where transformers ignores it.

    Of a random size in a random form, random keys are taken out, inside and outside, or set to null where that means
    something.
    """
    draw = random.Random(seed)
    raw = copy.deepcopy(FORMS[draw.choice([*FORMS])](published_config(draw.choice([*SIZES]))))
    for section in (raw, raw.get("text_config") or {}, raw["vision_config"], raw.get("rope_scaling") or {}):
        for key in [key for key in section if key not in ("model_type", "vision_config", "text_config", "type")]:
            if draw.random() < 0.3 and key not in BOUND:
                del section[key]
    text = raw if raw.get("text_config") is None else raw["text_config"]
    if draw.random() < 0.2:
        text["num_key_value_heads"] = None
    assert parse_config(raw) == read_by_transformers(raw, tmp_path)


def test_keys_beside_text_config_mean_nothing(tmp_path: Path) -> None:
    """Catches a fallback from text_config to the top level."""
    raw = copy.deepcopy(FORMS["resaved by 4"](published_config("7B")))
    del raw["text_config"]["rms_norm_eps"], raw["text_config"]["vocab_size"]
    raw |= dict.fromkeys([key for key in TEXT_KEYS if key.startswith("num_")], 1)
    ours = parse_config(raw)
    assert ours == read_by_transformers(raw, tmp_path)
    assert (ours.norm_eps, ours.vocab, ours.layers) == (1e-5, 152064, 28)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"head_dim": 64}, "head_dim 64"),
        ({"num_attention_heads": 24}, "num_attention_heads 24"),
        ({"layer_types": ["sliding_attention"] * 28}, "sliding_attention"),
        ({"vocab_size": 1.5}, "vocab_size must be a whole number of at least 1, came 1.5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number above 0 that float32 holds, came 'small'"),
        ({"vision_config": {"hidden_size": 1280, "out_hidden_size": 2048}}, "out_hidden_size 2048"),
        ({"vision_config": {"hidden_size": 1312}}, "num_heads 16"),  # 82 a head
        ({"vision_config": {"window_size": 27}}, "window_size 27"),
    ],
)
def test_a_size_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    """Catches what would otherwise fail while the model is traced, without a word about the config."""
    (tmp_path / "config.json").write_text(json.dumps({**published_config("7B"), **change}))
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert named in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)


VISION = published_config("7B")["vision_config"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vision_config": {**VISION, "fullatt_block_indexes": "15"}}, "fullatt_block_indexes must be a list"),
        ({"vision_config": {**VISION, "fullatt_block_indexes": [1.7]}}, "fullatt_block_indexes must be a list"),
        ({"vision_config": {**VISION, "fullatt_block_indexes": None}}, "fullatt_block_indexes must be a list"),
        ({"vision_config": {**VISION, "fullatt_block_indexes": [True, -1]}}, "fullatt_block_indexes must be a list"),
        ({"vision_config": {**VISION, "hidden_size": None}}, "in vision_config, hidden_size must be"),
        ({"vision_config": {**VISION, "rope_parameters": {"rope_type": "linear"}}}, "in vision_config, rope_type"),
        ({"vision_config": "vit"}, "vision_config must be an object"),
        ({"text_config": [1]}, "text_config must be an object"),
        ({"rope_scaling": "mrope"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"mrope_section": [4.9, 4.9, 4.9]}}, "mrope_section must be a list"),
        ({"rope_scaling": {"mrope_section": None}}, "mrope_section must be a list"),
        ({"rope_scaling": {"mrope_section": [-16, 40, 40]}}, "mrope_section must be a list"),
        ({"rope_scaling": {"mrope_section": [16, 48]}}, "mrope_section [16, 48] must be three numbers"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, came 'false'"),
        ({"use_sliding_window": "false"}, "use_sliding_window must be true or false"),
        ({"layer_types": 5}, "layer_types must be a list"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a number"),
        ({"rope_theta": 1e-50}, "rope_theta must be a number"),  # 0 in float32
        ({"torch_dtype": 5}, "torch_dtype must be a word"),
        ({"image_token_id": 152064}, "image_token_id must be below vocab_size 152064"),
        ({"video_token_id": 152064}, "video_token_id must be below vocab_size 152064"),
        ({"image_token_id": None}, "image_token_id must be a whole number"),
        ({"image_token_id": 151656}, "video_token_id must be another token than image_token_id"),
    ],
)
def test_a_value_of_another_kind_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    """Catches a value that is made to fit: "15" read as blocks 1 and 5, 4.9 as 4, "false" as true."""
    (tmp_path / "config.json").write_text(json.dumps({**published_config("7B"), **change}))
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert named in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"type": "mrope", "rope_type": None, "mrope_section": [16, 24, 24]}},
        {"rope_scaling": {"type": None, "rope_type": "default", "mrope_section": [16, 24, 24]}},
        {"text_config": None},
        {"use_sliding_window": None},
        {"head_dim": None},
        {"dtype": None},
    ],
)
def test_a_null_that_means_nothing_is_read(change: dict[str, Any]) -> None:
    """Catches a reader so strict that it refuses what transformers 4 or 5 writes or reads."""
    assert parse_config({**published_config("7B"), **change}) == parse_config(published_config("7B"))


@pytest.mark.parametrize("size", SIZES)
def test_number_of_parameters(size: str) -> None:
    """Catches a bias, a norm or a head too many or too few, on both sides of the weight table."""
    config = parse_config(published_config(size))
    shapes = {name: entry.hf_shape for entry in weight_table(config) for name in entry.names}
    assert (sum(math.prod(shape) for shape in shapes.values()), len(shapes)) == COUNTS[size]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(config))) == COUNTS[size][0]


@pytest.mark.parametrize("size", SIZES)
def test_tensors_are_those_of_transformers(size: str, tmp_path: Path) -> None:
    """Catches a name or a shape that differs at a published size; the model is made on the meta device."""
    torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'rethinker_jax[parity]')")
    from reference_torch import hub_name
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    (tmp_path / "config.json").write_text(json.dumps(published_config(size)))
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(AutoConfig.from_pretrained(tmp_path))
    theirs = {hub_name(name): tuple(tensor.shape) for name, tensor in model.named_parameters()}
    ours = {name: entry.hf_shape for entry in weight_table(read_config(tmp_path)) for name in entry.names}
    assert ours == theirs
