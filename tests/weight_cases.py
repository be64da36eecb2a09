"""A checkpoint small enough to be written in every test, and what the tests of weights do with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from reference_cases import make_weight
from safetensors.numpy import save_file

from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.models.weight_table import weight_table
from rethinker_jax.models.weights import load_params

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


def in_memory(name: str) -> str:
    """transformers 5's names in memory, also on disk with save_original_format=False and from raw state-dict dumps."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)
