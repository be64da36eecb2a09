"""The shape of the example's model, and a model directory that lacks only the weights."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

from rethinker_jax.example.render import CELL
from rethinker_jax.example.tokenizer import END_TOKEN, PAD_TOKEN, build_tokenizer, write_json

MAX_POSITIONS = 4096
PATCH = 14
MERGE = 2


def tiny_config(tokenizer_size: int, token_id: Callable[[str], int]) -> dict[str, Any]:
    """config.json of a Qwen2.5-VL of about half a million parameters, in the flat layout of the published checkpoints.

    tokenizer_size  number of ids the tokenizer knows; the embedding is rounded up beyond it, because published models
                    have ids without a token too, and those must never be drawn.
    token_id        id of a special token by its name.

    The heads are 24 wide, so m-RoPE has 12 frequencies for its three axes; with the published base of 1e6 the width
    section would turn by less than a thousandth of a radian per cell, hence rope_theta 10.
    Windows of 56 px cut a picture of 84x84 px into four, three of them ragged.
    """
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": token_id(PAD_TOKEN),
        "eos_token_id": token_id(END_TOKEN),
        "pad_token_id": token_id(PAD_TOKEN),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
        "vision_token_id": token_id("<|vision_pad|>"),
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "hidden_act": "silu",
        "hidden_size": 96,
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "max_position_embeddings": MAX_POSITIONS,
        "max_window_layers": 3,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 5, 5]},
        "rope_theta": 10.0,
        "sliding_window": MAX_POSITIONS,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": (tokenizer_size // 64 + 1) * 64,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 2,
            "hidden_act": "silu",
            "hidden_size": 48,
            "intermediate_size": 128,
            "num_heads": 2,
            "in_channels": 3,
            "in_chans": 3,
            "out_hidden_size": 96,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "spatial_patch_size": PATCH,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
    }


def _preprocessor_config() -> dict[str, Any]:
    """CLIP's normalisation; from one cell up to 64, so that no picture of the example is ever resized."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": CELL * CELL,
        "max_pixels": CELL * CELL * 64,
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def build_model_directory(directory: str | os.PathLike[str]) -> None:
    """Writes all of the example's model directory but the weights.

    Tokenizer and chat template, config.json, preprocessor_config.json and generation_config.json.
    """
    directory = pathlib.Path(directory)
    tokenizer = build_tokenizer(directory)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    config = tiny_config(len(ids), ids.__getitem__)
    write_json(directory / "config.json", config)
    write_json(directory / "preprocessor_config.json", _preprocessor_config())
    generation = {
        "bos_token_id": config["bos_token_id"],
        "do_sample": True,
        "eos_token_id": [config["eos_token_id"], config["pad_token_id"]],
        "pad_token_id": config["pad_token_id"],
        "temperature": 1.0,
    }
    write_json(directory / "generation_config.json", generation)
