"""Out to Hugging Face: a run or checkpoint becomes a directory that transformers and vLLM load."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax

from rethinker_jax.config import MeshConfig
from rethinker_jax.config_file import load_config
from rethinker_jax.devices import start_jax
from rethinker_jax.errors import UserError
from rethinker_jax.models.qwen25vl import Params
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.models.weights import save_params
from rethinker_jax.system import load_system, make_updater
from rethinker_jax.training.checkpoint import CheckpointStore

# What is not a weight and travels with it.
COMPANIONS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "processor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja",
)  # fmt: skip


def export(source: Path, output: Path) -> Path:
    """The `export` command: `source` is a run directory (its newest checkpoint counts) or one of its checkpoints.

    Refuses an output directory that holds something. Raises UserError.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"export: {output} is there and not an empty directory. Name a new one.")
    step = int(source.name) if source.parent.name == "checkpoints" and source.name.isdigit() else None
    run = source.parent.parent if step is not None else source
    if not (run / "config.yaml").is_file() or not (run / "checkpoints").is_dir():
        raise UserError(
            f"export: wanted a run directory with config.yaml and checkpoints/, or one of its checkpoints; "
            f"came {source}."
        )
    config = dataclasses.replace(load_config(run / "config.yaml", []), mesh=MeshConfig())
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        raise UserError(f"export: --output {output}: cannot be written ({error.strerror}).") from error
    start_jax(config)
    system = load_system(config)
    updater = make_updater(config, system, 1, config.loss)
    with contextlib.closing(CheckpointStore(run / "checkpoints", keep=0)) as store:
        if store.latest_step is None:
            raise UserError(f"export: {store.directory} holds no complete checkpoint. Let the run reach its first one.")
        saved = store.restore(updater.init(system.params), system.mesh, step)
    write_model_directory(system.directory, output, system.model.config, saved.state.params)
    print(output)
    return output


def write_model_directory(source: Path, output: Path, config: QwenConfig, params: Params) -> None:
    """Write the weights and the companions of the model directory `source` to `output`, all or nothing.

    config.json is the source's, with the tying that the weights have. What `output` held is replaced.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        target = Path(scratch) / "model"
        target.mkdir()
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
        raw: dict[str, Any] = json.loads((source / "config.json").read_text())
        raw["tie_word_embeddings"] = config.tied
        (target / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        save_params(target, config, jax.device_get(params), config.dtype)
        for file in target.glob("*.safetensors"):
            shutil.copymode(target / "config.json", file)  # the writer leaves them readable by the owner alone
        if output.exists():
            os.replace(output, Path(scratch) / "old")
        os.replace(target, output)
