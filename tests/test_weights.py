"""Weights in and out: nothing changes on the way, whatever the layout, on one device or on many."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from weight_cases import CONFIG, EMBEDDING, HEAD, assert_same, in_memory, load, make_tensors

from rethinker_jax.errors import UserError
from rethinker_jax.models import weights
from rethinker_jax.models.qwen25vl import param_shapes
from rethinker_jax.models.qwen_config import QwenConfig, parse_config
from rethinker_jax.models.weight_table import canonical_name
from rethinker_jax.models.weights import load_params, save_params


@pytest.fixture
def config() -> QwenConfig:
    return parse_config(CONFIG)


@pytest.fixture
def tensors(config: QwenConfig) -> dict[str, np.ndarray]:
    return make_tensors(config)


# --- there and back ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_and_out_is_bit_identical(tmp_path: Path, config: QwenConfig, dtype: str) -> None:
    """Catches parts of the fused qkv, heads or axes that come back in another order, and a rounding on the way."""
    tensors = make_tensors(config, ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    # Zero's sign, subnormal numbers, and infinity.
    tensors[EMBEDDING][0, :4] = [-0.0, 1e-40, 1e-45, np.inf]
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


def test_a_tied_head_serves_for_a_missing_embedding(
    tmp_path: Path, config: QwenConfig, tensors: dict[str, np.ndarray]
) -> None:
    """Catches a refusal of what transformers loads."""
    embedding = tensors.pop(EMBEDDING)
    tensors[HEAD] = embedding
    tied = dataclasses.replace(config, tied=True)
    found, params = load(tmp_path, tensors, tied)
    assert found == tied and "head" not in params["text"]
    np.testing.assert_array_equal(params["text"]["embedding"], embedding)


# --- many devices ---


MESH = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from rethinker_jax.config import MeshConfig
from rethinker_jax.models.qwen_config import read_config
from rethinker_jax.models.sharding import make_mesh
from rethinker_jax.models.weights import load_params
from rethinker_jax.system import training_shardings

directory = Path(sys.argv[1])
config = read_config(directory)
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
assert len(mesh.devices.ravel()) == 8
_, params = load_params(directory, config, jnp.float32, training_shardings(config, mesh))
_, whole = load_params(directory, config, jnp.float32)
quarters = 0
for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(whole), strict=True):
    assert a.shape == b.shape and len(a.addressable_shards) == 8
    for shard in a.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.asarray(b)[shard.index], err_msg=jax.tree_util.keystr(path))
    quarters += a.addressable_shards[0].data.size * 4 == a.size
query = params["text"]["layers"]["attention"]["query"]["kernel"]
assert query.addressable_shards[0].data.shape == (2, 32, 4, 8), query.addressable_shards[0].data.shape
print("quarters", quarters)
"""
REPOSITORY = Path(__file__).parents[1]


def run(*command: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, *command],
        env=clean | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)} | environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_loading_onto_eight_devices(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Catches a slice of the wrong rows or columns, of the fused qkv above all, and replicas that are not filled."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, tmp_path / "model.safetensors")
    # q, k, v, o, gate, up, down, the head and the embedding; of the tower q, k, v, o, three of the MLP, merger's up.
    assert int(run("-c", MESH, str(tmp_path), JAX_NUM_CPU_DEVICES="8").split()[-1]) == 17


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """Runs `measure_loading.py load` on a checkpoint of 67 MB; a dictionary a process."""
    directory = tmp_path_factory.mktemp("measured") / "model"
    run("scripts/measure_loading.py", "make", str(directory), "--layers", "4", "--width", "512")

    def load(*options: str) -> list[dict[str, Any]]:
        found = run("scripts/measure_loading.py", "load", str(directory), *options)
        return [{**json.loads(line), "directory": directory} for line in found.splitlines()]

    return load


# For the compiled programs, and for what the allocator does not give back at once. Half of the parameters; with the
# files' pages, or with a second copy of the parameters anywhere, it is far too little.
SLACK = 64 * 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
@pytest.mark.parametrize("mesh", ["fsdp=8", "data=2,fsdp=2,tensor=2"])
def test_loading_takes_little_more_than_the_parameters(
    measured: Callable[..., list[dict[str, Any]]], mesh: str
) -> None:
    """Catches a copy of all parameters on the host, pages of a mapped file that stay, and a file read once a device."""
    (found,) = measured("--mesh", mesh)
    assert found["params"] > 2 * SLACK
    assert found["peak_anon"] < found["params"] + 2 * found["largest"] + SLACK
    assert found["peak_file"] < found["stored"] / 2  # the compiler's code is in it
    assert found["stored"] < found["read"] < 1.03 * found["stored"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_two_processes_read_half_each_and_save_the_whole(
    measured: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Catches a process that reads what other processes hold, a half that comes back at the wrong place, and a file
    with one process's half in it."""
    found = measured("--processes", "2", "--save", str(tmp_path / "out"))
    assert len(found) == 2
    for process in found:
        assert process["read"] < 0.55 * process["stored"]
        assert process["peak_anon"] < process["params"] + 2 * process["largest"] + SLACK
    assert 1 <= sum(process["read"] for process in found) / found[0]["stored"] < 1.1
    source = load_file(found[0]["directory"] / "model-00001.safetensors")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == source.keys()
    assert [name for name in source if saved[name].tobytes() != source[name].tobytes()] == []
