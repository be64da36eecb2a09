"""Out to Hugging Face: a run or checkpoint becomes a directory that transformers and vLLM load."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from rethinker_jax.config import MeshConfig
from rethinker_jax.config_file import load_config
from rethinker_jax.devices import start_jax
from rethinker_jax.errors import UserError
from rethinker_jax.evaluation.runs import find_run
from rethinker_jax.evaluation.trained import COMPANIONS, checkpoint_of, load_trained
from rethinker_jax.models.qwen25vl import Params
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.models.weights import checkpoint_bytes, save_params
from rethinker_jax.processes import first_says, is_first
from rethinker_jax.training.checkpoint import CheckpointStore
from rethinker_jax.validation import best_step


def export(source: Path, output: Path, checkpoint: str | None = None) -> Path:
    """The `export` command: `source` is a run directory or one of its checkpoints.

    `checkpoint` is which one of a run: last (as None), best (by validation reward) or the number of its step.
    Refuses an output directory that holds something. Raises UserError.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"export: {output} is there and not an empty directory. Name a new one.")
    found = find_run(source)
    if found is None:
        raise UserError(
            f"export: wanted a run directory with config.yaml and checkpoints/, or one of its checkpoints; "
            f"came {source}."
        )
    config = dataclasses.replace(load_config(found[0] / "config.yaml", []), mesh=MeshConfig())
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        raise UserError(f"export: --output {output}: cannot be written ({error.strerror}).") from error
    start_jax(config)
    found = found[0], first_says(_step_of(*found, checkpoint))
    system, params = load_trained(checkpoint_of(*found, config), "score")
    write_model_directory(system.directory, output, system.model.config, system.merged_params(params))
    if is_first():
        print(output)
    return output


def _step_of(run: Path, named: int | None, checkpoint: str | None) -> int | None:
    """The step that is asked for, None for the last; `named` is that of the path, if it is one of a checkpoint."""
    if named is not None and checkpoint is not None:
        raise UserError(
            f"export: {run / 'checkpoints' / str(named)} and --checkpoint {checkpoint} both say which checkpoint; "
            "leave one out."
        )
    if checkpoint is None or checkpoint == "last":
        return named
    if checkpoint == "best":
        return best_step(run)
    with contextlib.closing(CheckpointStore(run / "checkpoints", keep=0)) as store:
        there = {str(step): step for step in store.steps}
    if checkpoint not in there:
        raise UserError(
            f"export: --checkpoint {checkpoint}: wanted best, last or the number of a checkpoint of {run} "
            f"(there: {', '.join(there) or 'none'})."
        )
    return there[checkpoint]


def write_model_directory(source: Path, output: Path, config: QwenConfig, params: Params) -> None:
    """Write the weights and the companions of the model directory `source` to `output`, all or nothing.

    config.json is the source's in its flat form, with the tying that the weights have. What `output` held is replaced.
    With several processes all must call it; the first one writes. Raises UserError where there is no room.
    """
    if jax.process_index():
        save_params(output, config, params, config.dtype)
    else:
        _write(source, output, config, params)
    multihost_utils.sync_global_devices(f"written: {output}")


def _write(source: Path, output: Path, config: QwenConfig, params: Params) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    needed, free = checkpoint_bytes(config, config.dtype), shutil.disk_usage(output.parent).free
    if free < needed:
        raise UserError(
            f"{output}: the disk is full: the weights take {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free. "
            "Free some space and run the same command again."
        )
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        target = Path(scratch) / "model"
        target.mkdir()
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
        flat = flat_config(json.loads((source / "config.json").read_text()), config)
        (target / "config.json").write_text(json.dumps(flat, indent=2) + "\n")
        save_params(target, config, params, config.dtype)
        for file in target.glob("*.safetensors"):
            shutil.copymode(target / "config.json", file)  # the writer leaves them readable by the owner alone
        if output.exists():
            os.replace(output, Path(scratch) / "old")
        os.replace(target, output)


def flat_config(raw: Mapping[str, Any], config: QwenConfig) -> dict[str, Any]:
    """config.json as the hub has it: the one form that transformers 4 and 5 and vLLM all read.

    `raw` is the source's, in any form, and read as `config`. Its other keys are kept; what makes the model is written
    out, so that nothing depends on a reader's defaults.
    """
    other_forms = {"text_config", "dtype", "rope_parameters", "layer_types"}
    text = {key: value for key, value in (raw.get("text_config") or {}).items() if value is not None}
    kept = {**raw, **text, "model_type": raw["model_type"]}
    vision, shape = dict(raw.get("vision_config") or {}), config.vision
    if shape.rope_theta == 10000.0:  # the only one that transformers 4 knows
        vision.pop("rope_parameters", None)
    return {
        **{key: value for key, value in kept.items() if key not in other_forms},
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(config.mrope_section)},
        "use_sliding_window": False,
        "tie_word_embeddings": config.tied,
        "torch_dtype": config.dtype,
        "image_token_id": config.image_token,
        "video_token_id": config.video_token,
        "vision_start_token_id": config.vision_start_token,
        "vision_end_token_id": config.vision_end_token,
        "vision_config": {
            **{key: value for key, value in vision.items() if key not in ("dtype", "torch_dtype")},
            "model_type": "qwen2_5_vl",
            "depth": shape.depth,
            "hidden_act": "silu",
            "hidden_size": shape.d_model,
            "intermediate_size": shape.d_ff,
            "num_heads": shape.heads,
            "in_channels": shape.in_channels,
            "in_chans": shape.in_channels,
            "out_hidden_size": shape.out_dim,
            "patch_size": shape.patch_size,
            "spatial_merge_size": shape.merge_size,
            "temporal_patch_size": shape.temporal_patch_size,
            "tokens_per_second": shape.tokens_per_second,
            "window_size": shape.window_size,
            "fullatt_block_indexes": list(shape.full_attention_blocks),
        },
    }
