"""Directories that are written: what travels, the one form of config.json, and that transformers takes them."""

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from published import FORMS, SIZES, published_config
from safetensors.numpy import save_file
from weight_cases import CONFIG, assert_same, make_tensors

from rethinker_jax.errors import UserError
from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.export import COMPANIONS, flat_config, write_model_directory
from rethinker_jax.models.qwen_config import parse_config, read_config
from rethinker_jax.models.weights import load_params


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model directory with every companion, config.json in the form of transformers 5."""
    directory = tmp_path / "source"
    build_model_directory(directory)
    for name in COMPANIONS:
        if not (directory / name).exists():
            (directory / name).write_text(f"the content of {name}")
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(FORMS["nested by 5"](raw)))
    (directory / "optimizer.bin").write_text("stays behind")
    save_file(make_tensors(parse_config(raw)), directory / "model.safetensors")
    return directory


def test_a_written_directory_is_the_one_that_was_read(source: Path, tmp_path: Path) -> None:
    """Catches a tokenizer, template or generation config that is left behind, and weights nobody else may read."""
    config, params = load_params(source, read_config(source), jnp.float32)
    output = tmp_path / "deep" / "output"
    write_model_directory(source, output, config, params)
    assert {path.name for path in output.iterdir()} == {*COMPANIONS, "model.safetensors"}
    for name in {*COMPANIONS} - {"config.json"}:
        assert (output / name).read_bytes() == (source / name).read_bytes(), name
    assert (output / "model.safetensors").read_bytes() != b""
    assert stat.S_IMODE((output / "model.safetensors").stat().st_mode) & 0o044 == 0o044 & ~os.umask(0o022)
    assert_same(load_params(output, read_config(output), jnp.float32)[1], params)
    assert read_config(output) == config
    assert [path.name for path in output.parent.iterdir()] == ["output"]


def test_writing_over_a_directory_replaces_all_of_it(source: Path, tmp_path: Path) -> None:
    """Catches shards of an earlier, larger model that stay beside the new file."""
    config, params = load_params(source, read_config(source), jnp.float32)
    output = tmp_path / "output"
    output.mkdir()
    (output / "model-00001-of-00002.safetensors").write_text("old")
    write_model_directory(source, output, config, params)
    assert [path.name for path in output.glob("*.safetensors")] == ["model.safetensors"]


def test_no_room_is_said_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback from the writer, after minutes of gathering."""
    config, params = load_params(source, read_config(source), jnp.float32)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"output: the disk is full: the weights take \d"):
        write_model_directory(source, tmp_path / "output", config, params)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_every_form_is_written_flat(size: str, form: str) -> None:
    """Catches a form that leaks into the export: transformers 4 dies of rope_parameters, and readers differ in which
    of two copies counts."""
    flat = published_config(size)
    config = parse_config(flat)
    written = flat_config(FORMS[form](flat), config)
    assert parse_config(written) == config
    assert not {"text_config", "rope_parameters", "dtype", "layer_types"} & written.keys()
    assert "rope_parameters" not in written["vision_config"]
    lost = {key: value for key, value in flat.items() if key != "vision_config" and written.get(key) != value}
    assert lost == {} or (form == "nested by 5" and lost == {"sliding_window": 32768})  # null there: it is not used
    lost = {key: value for key, value in flat["vision_config"].items() if written["vision_config"].get(key) != value}
    assert lost == {}


def test_class_defaults_are_written_out() -> None:
    """Catches a value that another reader's defaults would change."""
    written = flat_config({"model_type": "qwen2_5_vl"}, parse_config({"model_type": "qwen2_5_vl"}))
    assert (written["vocab_size"], written["rms_norm_eps"], written["vision_config"]["window_size"]) == (
        152064,
        1e-5,
        112,
    )


@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own
@pytest.mark.parametrize("form", FORMS)
def test_transformers_loads_what_is_written(form: str, tmp_path: Path) -> None:
    """Catches a tensor that transformers misses, does not expect or reads otherwise, and a lost dtype."""
    torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'rethinker_jax[parity]')")
    from reference_torch import hub_name
    from transformers import AutoModelForImageTextToText

    source = tmp_path / "source"
    source.mkdir()
    raw: dict[str, Any] = FORMS[form](CONFIG)
    tensors = make_tensors(parse_config(raw), jnp.bfloat16)
    (source / "config.json").write_text(json.dumps(raw))
    save_file(tensors, source / "model.safetensors")
    config, params = load_params(source, read_config(source), jnp.float32)
    write_model_directory(source, tmp_path / "output", config, params)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "output", dtype="auto", output_loading_info=True
    )
    model, info = loaded
    assert {key: found for key, found in info.items() if found} == {}
    theirs = {hub_name(name): tensor for name, tensor in model.state_dict().items()}
    assert theirs.keys() == tensors.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == torch.bfloat16
        np.testing.assert_array_equal(tensor.view(torch.int16).numpy(), tensors[name].view(np.int16), err_msg=name)
