"""Weights and configs that are not what they should be: each is refused with the file and the key in the message."""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from weight_cases import CONFIG, EMBEDDING, HEAD, QUERY, in_memory, load, make_tensors

from rethinker_jax.errors import UserError
from rethinker_jax.models.qwen_config import QwenConfig, parse_config, read_config
from rethinker_jax.models.safetensors_files import INDEX, open_safetensors
from rethinker_jax.models.weights import load_params


@pytest.fixture
def config() -> QwenConfig:
    return parse_config(CONFIG)


@pytest.fixture
def tensors(config: QwenConfig) -> dict[str, np.ndarray]:
    return make_tensors(config)


def refusal(
    directory: Path, tensors: dict[str, np.ndarray], config: QwenConfig, layout: Callable[[str], str] = str
) -> str:
    with pytest.raises(UserError) as caught:
        load(directory, {layout(name): tensor for name, tensor in tensors.items()}, config)
    return str(caught.value)


# --- strict four ways, and damaged files ---


Layout = Callable[[str], str]
LAYOUTS = pytest.mark.parametrize("layout", [str, in_memory])


@LAYOUTS
def test_unknown_tensor_is_refused(
    tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray], layout: Layout
) -> None:
    """Catches weights that are ignored, such as an adapter's; its raw name and its file are named."""
    name = layout("model.layers.0.self_attn.q_proj.lora_A.weight")
    tensors[name] = np.zeros((2, 2), np.float32)
    message = refusal(tmp_path, tensors, config, layout)
    assert "unknown" in message and "missing" not in message
    assert f"{name} in model.safetensors" in message


@LAYOUTS
def test_missing_tensors_are_refused(
    tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray], layout: Layout
) -> None:
    """Catches random values in the place of weights; many missing names are cut short."""
    for layer in range(3):
        del tensors[f"visual.blocks.{layer}.attn.qkv.bias"]
    del tensors[QUERY]
    message = refusal(tmp_path, tensors, config, layout)
    assert f"missing: {QUERY}" in message and "visual.blocks.2.attn.qkv.bias" in message
    assert str(tmp_path) in message and "unknown" not in message
    assert re.search(r"and \d+ more", refusal(tmp_path, {EMBEDDING: tensors[EMBEDDING]}, config, layout))


@LAYOUTS
def test_a_checkpoint_without_embedding_or_head_is_refused(
    tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray], layout: Layout
) -> None:
    """Catches an untied head that is made up from the embedding: transformers draws it at random, and says so."""
    whole = dict(tensors)
    for missing in (EMBEDDING, HEAD):
        tensors = {name: tensor for name, tensor in whole.items() if name != missing}
        assert f"missing: {missing}" in refusal(tmp_path, tensors, dataclasses.replace(config, tied=False), layout)
    tensors = {name: tensor for name, tensor in whole.items() if name not in (EMBEDDING, HEAD)}
    assert f"missing: {EMBEDDING}" in refusal(tmp_path, tensors, dataclasses.replace(config, tied=True), layout)


@LAYOUTS
@pytest.mark.parametrize("name", [QUERY, HEAD, "visual.patch_embed.proj.weight", "visual.merger.ln_q.weight"])
def test_wrong_shape_is_refused(
    tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray], name: str, layout: Layout
) -> None:
    """Catches a shape of the same size, which a reshape would take."""
    shape = tensors[name].shape
    tensors[name] = tensors[name].reshape(-1, 2)
    message = refusal(tmp_path, tensors, config, layout)
    for part in (layout(name), "model.safetensors", str(list(shape)), str(list(tensors[name].shape))):
        assert part in message


def test_wrong_shape_of_a_tied_head_is_refused(
    tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray]
) -> None:
    """Catches a comparison with the embedding row by row, to the shorter one's end."""
    tensors[HEAD] = tensors[EMBEDDING][:-1]
    assert HEAD in refusal(tmp_path, tensors, dataclasses.replace(config, tied=True))


@LAYOUTS
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, ml_dtypes.float8_e4m3fn, np.bool_])
def test_weights_that_are_no_floats_are_refused(
    tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray], dtype: Any, layout: Layout
) -> None:
    """Catches a quantised checkpoint whose codes are taken for numbers."""
    tensors[QUERY] = tensors[QUERY].astype(dtype)
    message = refusal(tmp_path, tensors, config, layout)
    assert layout(QUERY) in message and str(tmp_path / "model.safetensors") in message and "F32" in message


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


def with_header(header: bytes, size: int, data: bytes = b"") -> bytes:
    return size.to_bytes(8, "little") + header + data


def one_tensor(**change: Any) -> bytes:
    header = {EMBEDDING: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | change}
    text = json.dumps(header).encode()
    return with_header(text, len(text), bytes(16))


@pytest.mark.parametrize(
    "content",
    [
        with_header(b"{}", 2**63),  # a header of absurd size
        with_header(b"{}", 10**7),
        with_header(b"[1, 2]", 6),
        with_header(b"\xff\xfe", 2),
        one_tensor(data_offsets=[0, 64], shape=[4, 4]),  # past the end of the file
        one_tensor(data_offsets=[8, 24]),  # a gap before it
        one_tensor(data_offsets=[16, 0]),
        one_tensor(data_offsets=[0, 8]),  # fewer bytes than the shape has
        one_tensor(shape=[2**62, 2**62]),
        one_tensor(shape=[-2, -2]),
        one_tensor(dtype="F31"),
    ],
)
def test_damaged_header_is_refused(tmp_path: Path, config: QwenConfig, content: bytes) -> None:
    """Catches a traceback, a reservation of exabytes, and bytes of another tensor taken for this one's."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_params(tmp_path, config, jnp.float32)
    assert str(path) in str(caught.value) and "copy it again" in str(caught.value)


def test_file_that_is_cut_while_it_is_read_is_refused(
    tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray]
) -> None:
    """Catches memory that was never filled, taken for weights."""
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    with open_safetensors(tmp_path) as files:
        os.truncate(path, files.where[EMBEDDING].offset + 100)
        with pytest.raises(UserError, match="shorter") as caught:
            files.read(EMBEDDING, range(40))
    assert str(path) in str(caught.value) and EMBEDDING in str(caught.value)


# --- the index ---


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"metadata": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}', "[" * 10**5, "\udce4"]
)
def test_damaged_index_is_refused(
    tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray], index: str
) -> None:
    """Catches a traceback from an index that was cut."""
    path = tmp_path / INDEX
    path.write_bytes(index.encode(errors="surrogateescape"))
    assert str(path) in refusal(tmp_path, tensors, config)


def write_two_files(directory: Path, tensors: dict[str, np.ndarray], **change: str | None) -> None:
    """The query alone in b, the rest in a; `change` edits the index, None takes the line out."""
    directory.mkdir(exist_ok=True)
    save_file({name: tensor for name, tensor in tensors.items() if name != QUERY}, directory / "a.safetensors")
    save_file({QUERY: tensors[QUERY]}, directory / "b.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {QUERY: "b.safetensors"} | change
    weight_map = {name: file for name, file in weight_map.items() if file is not None}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({QUERY: "a.safetensors", HEAD: "b.safetensors"}, (HEAD, "in b.safetensors", "in a.safetensors")),
        ({HEAD: None}, (HEAD, "in no file", "in a.safetensors")),
        ({"model.norm.bias": "a.safetensors"}, ("model.norm.bias", "in a.safetensors", "none of the files")),
    ],
)
def test_index_of_other_files_is_refused(
    tmp_path: Path,
    config: QwenConfig,
    tensors: dict[str, np.ndarray],
    change: dict[str, str | None],
    parts: tuple[str, ...],
) -> None:
    """Catches shards of two checkpoints, or of two attempts at one, put together."""
    write_two_files(tmp_path / "good", tensors)
    load_params(tmp_path / "good", config, jnp.float32)
    write_two_files(tmp_path, tensors, **change)
    with pytest.raises(UserError) as caught:
        load_params(tmp_path, config, jnp.float32)
    for part in (str(tmp_path / INDEX), *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize("absolute", [False, True])
def test_index_that_leaves_the_directory_is_refused(
    tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray], absolute: bool
) -> None:
    """Catches a downloaded index that makes files from elsewhere be read."""
    write_two_files(tmp_path / "model", tensors)
    (tmp_path / "model" / "b.safetensors").rename(tmp_path / "b.safetensors")
    file = str(tmp_path / "b.safetensors") if absolute else "../b.safetensors"
    index = tmp_path / "model" / INDEX
    index.write_text(index.read_text().replace('"b.safetensors"', json.dumps(file)))
    with pytest.raises(UserError) as caught:
        load_params(tmp_path / "model", config, jnp.float32)
    assert str(index) in str(caught.value) and repr(file) in str(caught.value)


def test_links_are_followed(tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray]) -> None:
    """The hub's cache is made of links that leave the directory: those are the user's own."""
    write_two_files(tmp_path / "blobs", tensors)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    load_params(tmp_path / "snapshot", config, jnp.float32)


def test_two_checkpoints_in_one_directory_are_refused(
    tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray]
) -> None:
    """transformers would take model.safetensors, others the index: catches a choice nobody made."""
    write_two_files(tmp_path, tensors)
    message = refusal(tmp_path, tensors, config)
    assert "model.safetensors" in message and INDEX in message and "Remove one" in message


def test_directory_without_weights_is_refused(tmp_path: Path, config: QwenConfig) -> None:
    with pytest.raises(UserError, match="safetensors"):
        load_params(tmp_path, config, jnp.float32)


# --- config.json ---


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
