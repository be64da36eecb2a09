"""Weights in and out: nothing changes on the way, nothing wrong gets in, every form of config.json means the same."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from reference_cases import make_weight
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rethinker_jax.errors import UserError
from rethinker_jax.models import weights
from rethinker_jax.models.qwen25vl import param_shapes
from rethinker_jax.models.qwen_config import QwenConfig, parse_config, read_config
from rethinker_jax.models.weight_table import canonical_name, weight_table
from rethinker_jax.models.weights import load_params, save_params

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"

# Sizes that differ pairwise, so that a swapped axis changes a shape; every sharded dimension divides by 2.
CONFIG: Mapping[str, Any] = {
    "model_type": "qwen2_5_vl",
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "image_token_id": 30,
    "video_token_id": 31,
    "vision_start_token_id": 32,
    "vision_end_token_id": 33,
    "vision_config": {
        "depth": 3,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_heads": 2,
        "in_chans": 3,
        "out_hidden_size": 64,
        "patch_size": 2,
        "window_size": 8,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        "hidden_act": "silu",
    },
}


def make_tensors(config: QwenConfig, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint under the hub's name."""
    names = {name: entry.hf_shape for entry in weight_table(config) for name in entry.names}
    return {name: make_weight(name, shape).astype(dtype) for name, shape in names.items()}


@pytest.fixture
def config() -> QwenConfig:
    return parse_config(CONFIG)


@pytest.fixture
def tensors(config: QwenConfig) -> dict[str, np.ndarray]:
    return make_tensors(config)


def load(directory: Path, tensors: dict[str, np.ndarray], config: QwenConfig, dtype: Any = jnp.float32) -> Any:
    save_file(tensors, directory / "model.safetensors")
    return load_params(directory, config, dtype)


def leaves(params: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def assert_same(ours: Any, theirs: Any) -> None:
    a, b = leaves(ours), leaves(theirs)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# --- there and back ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_and_out_is_bit_identical(tmp_path: Path, config: QwenConfig, dtype: str) -> None:
    """Catches parts of the fused qkv, heads or axes that come back in another order, and a rounding on the way."""
    tensors = make_tensors(config, ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    _, params = load(tmp_path, tensors, config)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), param_shapes(config))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == shapes
    out = tmp_path / "out"
    out.mkdir()
    save_params(out, config, params, dtype)
    back = load_file(out / "model.safetensors")
    assert back.keys() == tensors.keys()
    for name in tensors:
        assert back[name].dtype == tensors[name].dtype
        assert back[name].tobytes() == tensors[name].tobytes(), name
    with safe_open(out / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without


def test_axes_by_hand(tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray]) -> None:
    """Catches what a round trip hides: an axis turned wrongly in both directions."""
    _, params = load(tmp_path, tensors, config)
    text, vision = params["text"]["layers"], params["vision"]
    # Head 5, its element 3, input 7 of layer 1: row 5 * head_dim + 3 of q_proj; head_dim = 64 / 8.
    assert text["attention"]["query"]["kernel"][1, 7, 5, 3] == tensors["model.layers.1.self_attn.q_proj.weight"][43, 7]
    assert text["attention"]["output"][1, 5, 3, 7] == tensors["model.layers.1.self_attn.o_proj.weight"][7, 43]
    assert text["attention"]["key"]["bias"][0, 2, 1] == tensors["model.layers.0.self_attn.k_proj.bias"][17]
    assert text["mlp"]["down"]["kernel"][0, 9, 4] == tensors["model.layers.0.mlp.down_proj.weight"][4, 9]
    assert params["text"]["head"]["kernel"][4, 9] == tensors[HEAD][9, 4]
    # Fused rows are all of q, all of k, all of v; 24 each, heads of 12.
    qkv = tensors["visual.blocks.2.attn.qkv.weight"]
    assert vision["blocks"]["value"]["kernel"][2, 6, 1, 5] == qkv[48 + 12 + 5, 6]
    # A patch row is [channel][time][2][2].
    assert (
        vision["patch_embedding"][2 * 8 + 1 * 4 + 1 * 2 + 0, 11]
        == tensors["visual.patch_embed.proj.weight"][11, 2, 1, 1, 0]
    )


def test_large_checkpoints_are_cut_into_files(
    tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a lost tensor at a border, and an index that names another file or size."""
    _, params = load(tmp_path, tensors, config)
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 20_000)
    out = tmp_path / "out"
    out.mkdir()
    save_params(out, config, params, "float32")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files == sorted(path.name for path in out.glob("*.safetensors"))
    held = {name: file for file in files for name in load_file(out / file)}
    assert held == index["weight_map"] and held.keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert_same(load_params(out, config, jnp.float32)[1], params)
    # Files that the index does not name are another model's: loading leaves them alone.
    save_file({"stray": np.zeros(1, np.float32)}, out / "stray.safetensors")
    assert_same(load_params(out, config, jnp.float32)[1], params)
    (out / files[1]).unlink()
    with pytest.raises(UserError, match=files[1]):
        load_params(out, config, jnp.float32)


# --- key layouts and the head ---


def in_memory(name: str) -> str:
    """transformers 5's names in memory, also on disk with save_original_format=False and from raw state-dict dumps."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


def base_model(name: str) -> str:
    return name if name.startswith("visual.") else name.replace("model.", "language_model.", 1)


def doubled(name: str) -> str:
    return name if name.startswith("visual.") else name.replace("model.", "language_model.model.", 1)


@pytest.mark.parametrize("rename", [in_memory, base_model, doubled])
def test_every_key_layout(
    tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray], rename: Callable[[str], str]
) -> None:
    """Catches a layout that is refused, or two names that fall together."""
    assert rename(HEAD) == HEAD and rename(EMBEDDING) != EMBEDDING
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    assert {canonical_name(name) for name in renamed} == set(tensors)
    (tmp_path / "hub").mkdir()
    _, wanted = load(tmp_path / "hub", tensors, config)
    assert_same(load(tmp_path, renamed, config)[1], wanted)


def test_tied_head_is_not_read(tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray]) -> None:
    """Catches a tied model that wants lm_head.weight, or that trains a second copy where the file has one."""
    tied = dataclasses.replace(config, tied=True)
    for number, head in enumerate(({}, {HEAD: tensors[EMBEDDING]})):
        (tmp_path / str(number)).mkdir()
        found, params = load(tmp_path / str(number), {k: v for k, v in tensors.items() if k != HEAD} | head, tied)
        assert found == tied
        assert "head" not in params["text"]


def test_tied_config_with_another_head_becomes_untied(
    tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray]
) -> None:
    """Catches a trained head that is dropped without a word."""
    found, params = load(tmp_path, tensors, dataclasses.replace(config, tied=True))
    assert found == config
    np.testing.assert_array_equal(params["text"]["head"]["kernel"], tensors[HEAD].T)


def test_untied_config_without_a_head_takes_the_embedding(
    tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray]
) -> None:
    """Catches a refusal of what transformers loads."""
    del tensors[HEAD]
    found, params = load(tmp_path, tensors, config)
    assert found == config
    np.testing.assert_array_equal(params["text"]["head"]["kernel"], tensors[EMBEDDING].T)


# --- strict four ways, and damaged files ---


def test_unknown_tensor_is_refused(tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray]) -> None:
    """Catches weights that are ignored, such as an adapter's; its raw name and its file are named."""
    tensors["model.language_model.layers.0.self_attn.q_proj.lora_A.weight"] = np.zeros((2, 2), np.float32)
    with pytest.raises(UserError) as caught:
        load(tmp_path, tensors, config)
    message = str(caught.value)
    assert "unknown" in message and "missing" not in message
    assert "model.language_model.layers.0.self_attn.q_proj.lora_A.weight in model.safetensors" in message


def test_missing_tensors_are_refused(tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray]) -> None:
    """Catches random values in the place of weights; many missing names are cut short."""
    for layer in range(3):
        del tensors[f"visual.blocks.{layer}.attn.qkv.bias"]
    del tensors[QUERY]
    with pytest.raises(UserError) as caught:
        load(tmp_path, tensors, config)
    assert f"missing: {QUERY}" in str(caught.value) and "visual.blocks.2.attn.qkv.bias" in str(caught.value)
    assert str(tmp_path) in str(caught.value) and "unknown" not in str(caught.value)
    with pytest.raises(UserError, match=r"and \d+ more"):
        load(tmp_path, {EMBEDDING: tensors[EMBEDDING]}, config)


@pytest.mark.parametrize("name", [QUERY, HEAD, "visual.patch_embed.proj.weight", "visual.merger.ln_q.weight"])
def test_wrong_shape_is_refused(tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray], name: str) -> None:
    """Catches a shape of the same size, which a reshape would take."""
    shape = tensors[name].shape
    tensors[name] = tensors[name].reshape(-1, 2)
    with pytest.raises(UserError) as caught:
        load(tmp_path, tensors, config)
    message = str(caught.value)
    for part in (name, "model.safetensors", str(list(shape)), str(list(tensors[name].shape))):
        assert part in message


@pytest.mark.parametrize("name", [QUERY, in_memory(QUERY)])
def test_tensor_that_comes_twice_is_refused(
    tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray], name: str
) -> None:
    """Catches the last one winning: in two files, or under the names of two layouts."""
    save_file({name: tensors[QUERY]}, tmp_path / "extra.safetensors")
    with pytest.raises(UserError) as caught:
        load(tmp_path, tensors, config)
    for part in ("twice", name, QUERY, "extra.safetensors", "model.safetensors"):
        assert part in str(caught.value)


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_cut_file_is_refused(tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray], size: int) -> None:
    """Catches a traceback, or zeros, from a download that broke off: in the length, the header, or the data."""
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError) as caught:
        load_params(tmp_path, config, jnp.float32)
    assert str(path) in str(caught.value) and "copy it again" in str(caught.value)


@pytest.mark.parametrize("index", ["{", "[]", '{"metadata": {}}', '{"weight_map": ["model.safetensors"]}'])
def test_damaged_index_is_refused(
    tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray], index: str
) -> None:
    """Catches a traceback from an index that was cut."""
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(index)
    with pytest.raises(UserError) as caught:
        load(tmp_path, tensors, config)
    assert str(path) in str(caught.value)


def test_directory_without_weights_is_refused(tmp_path: Path, config: QwenConfig) -> None:
    with pytest.raises(UserError, match="safetensors"):
        load_params(tmp_path, config, jnp.float32)


def test_integer_weights_are_refused(tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray]) -> None:
    """Catches a quantised checkpoint whose codes are taken for numbers."""
    tensors[QUERY] = tensors[QUERY].astype(np.int8)
    with pytest.raises(UserError, match=QUERY):
        load(tmp_path, tensors, config)


# --- eight devices ---

SHARDED = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from rethinker_jax.config import MeshConfig
from rethinker_jax.models import weights
from rethinker_jax.models.qwen25vl import param_dims, param_shapes
from rethinker_jax.models.qwen_config import read_config
from rethinker_jax.models.sharding import TRAINING_RULES, make_mesh, param_shardings

directory = Path(sys.argv[1])
config = read_config(directory)
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
assert len(mesh.devices.ravel()) == 8
shardings = param_shardings(param_dims(config), param_shapes(config), mesh, TRAINING_RULES)
_, params = weights.load_params(directory, config, jnp.float32, shardings)
_, whole = weights.load_params(directory, config, jnp.float32)
quarters = 0
for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(whole), strict=True):
    for shard in a.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.asarray(b)[shard.index], err_msg=jax.tree_util.keystr(path))
    quarters += a.addressable_shards[0].data.size * 4 == a.size
query = params["text"]["layers"]["attention"]["query"]["kernel"]
assert query.addressable_shards[0].data.shape == (2, 32, 4, 8), query.addressable_shards[0].data.shape

# A process reads no more than its devices hold: of a matrix that is cut both ways, a quarter.
with weights.open_checkpoint(directory) as checkpoint:
    sizes = []
    read = type(checkpoint).read
    def counted(self, *arguments):
        block = read(self, *arguments)
        sizes.append(block.size)
        return block
    type(checkpoint).read = counted
    for entry in weights.weight_table(config):
        if entry.name.endswith(("q_proj.weight", "o_proj.weight", "down_proj.weight", "attn.qkv.weight")):
            sizes.clear()
            sharding = shardings
            for key in entry.path:
                sharding = sharding[key]
            weights._load_entry(checkpoint, entry, jnp.float32, sharding)
            part = int(np.prod(entry.shape))
            assert set(sizes) == {part // 4}, (entry.name, sizes, part)
print("quarters", quarters)
"""


def test_loading_onto_eight_devices(tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray]) -> None:
    """Catches a slice of the wrong rows or columns, of the fused qkv above all, and slices that read whole tensors."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, tmp_path / "model.safetensors")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, str(tmp_path)],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # q, k, v, o, gate, up, down, the head and the embedding; of the tower q, k, v, o, three of the MLP, merger's up.
    assert int(done.stdout.split()[-1]) == 17


# --- config.json ---


def nested_v5(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config as transformers 5 writes it: text keys in text_config alone, rope in one dictionary, `dtype`."""
    outside = {"model_type", "tie_word_embeddings", "vision_config", "torch_dtype"}
    outside |= {key for key in raw if key.endswith("_token_id")}
    text = {key: value for key, value in raw.items() if key not in outside | {"rope_scaling", "rope_theta"}}
    text |= {
        "model_type": "qwen2_5_vl_text",
        "dtype": raw["torch_dtype"],
        "rope_parameters": {
            "mrope_section": raw["rope_scaling"]["mrope_section"],
            "rope_theta": raw["rope_theta"],
            "rope_type": "default",
            "type": "mrope",
        },
        "layer_types": ["full_attention"] * raw["num_hidden_layers"],
        "sliding_window": None,
    }
    vision = {key: value for key, value in raw["vision_config"].items() if key != "in_chans"}
    vision |= {"in_channels": 3, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"}}
    kept = {key: raw[key] for key in outside if key != "torch_dtype"}
    return kept | {"dtype": raw["torch_dtype"], "text_config": text, "vision_config": vision}


def test_all_forms_of_the_config_mean_the_same(config: QwenConfig) -> None:
    """Catches a form whose rope, head or dtype is read from where another form keeps it."""
    assert (config.mrope_section, config.rope_theta, config.dtype, config.head_dim) == ((2, 1, 1), 1e6, "bfloat16", 8)
    nested = nested_v5(CONFIG)
    assert parse_config(nested) == config
    assert parse_config({**CONFIG, "text_config": nested["text_config"]}) == config  # transformers 4.52+
    inside = {key: value for key, value in nested.items() if key != "tie_word_embeddings"}
    tied = inside | {"text_config": {**nested["text_config"], "tie_word_embeddings": True}}
    assert parse_config(tied) == dataclasses.replace(config, tied=True)


def test_missing_keys_take_the_defaults_of_transformers() -> None:
    """Catches the published values in the place of the class's: re-saved configs leave the latter out."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2_5_VLConfig()
    ours = parse_config({"model_type": "qwen2_5_vl"})
    text, vision = theirs.text_config, theirs.vision_config
    assert (ours.vocab, ours.d_model, ours.d_ff, ours.layers) == (
        text.vocab_size,
        text.hidden_size,
        text.intermediate_size,
        text.num_hidden_layers,
    )
    assert (ours.heads, ours.kv_heads, ours.norm_eps) == (
        text.num_attention_heads,
        text.num_key_value_heads,
        text.rms_norm_eps,
    )
    assert ours.rope_theta == text.rope_parameters["rope_theta"] == 1e6
    assert ours.tied == bool(theirs.tie_word_embeddings)
    assert (ours.image_token, ours.video_token) == (theirs.image_token_id, theirs.video_token_id)
    assert (ours.vision_start_token, ours.vision_end_token) == (
        theirs.vision_start_token_id,
        theirs.vision_end_token_id,
    )
    mine = ours.vision
    assert (mine.depth, mine.d_model, mine.heads, mine.d_ff, mine.out_dim) == (
        vision.depth,
        vision.hidden_size,
        vision.num_heads,
        vision.intermediate_size,
        vision.out_hidden_size,
    )
    assert (mine.patch_size, mine.merge_size, mine.temporal_patch_size, mine.window_size, mine.in_channels) == (
        vision.patch_size,
        vision.spatial_merge_size,
        vision.temporal_patch_size,
        vision.window_size,
        vision.in_channels,
    )
    assert mine.full_attention_blocks == tuple(vision.fullatt_block_indexes)
    assert mine.tokens_per_second == vision.tokens_per_second


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "qwen2_vl"}, "qwen2_vl"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 2]}}, "mrope_section"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": "wide"}, "wide"),
        ({"vision_config": {"hidden_act": "quick_gelu"}}, "quick_gelu"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ],
)
def test_unusable_config_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    """Catches a model that would be computed as another one."""
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert named in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_absent_or_damaged_config_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config"):
        read_config(tmp_path)
