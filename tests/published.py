"""The four published sizes of Qwen2.5-VL, and the forms in which their config.json stands in the world.

Values as in the config.json of the instruct models. The decoder's width of 72B (29568) is the class default; the AWQ
copy pads it to 29696.
"""

from collections.abc import Callable, Mapping
from typing import Any

COMMON: Mapping[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "sliding_window": 32768,
    "use_sliding_window": False,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
}
VISION: Mapping[str, Any] = {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
# (hidden, intermediate, layers, heads, kv_heads, max_window_layers, vocab, tied, vision intermediate)
SIZES: Mapping[str, tuple[Any, ...]] = {
    "3B": (2048, 11008, 36, 16, 2, 70, 151936, True, 3420),
    "7B": (3584, 18944, 28, 28, 4, 28, 152064, False, 3420),
    "32B": (5120, 27648, 64, 40, 8, 64, 152064, False, 3456),
    "72B": (8192, 29568, 80, 64, 8, 80, 152064, False, 3456),
}
# (parameters, tensors in the checkpoint); those of transformers' own models, made on torch's meta device.
COUNTS: Mapping[str, tuple[int, int]] = {
    "3B": (3_754_622_976, 824),
    "7B": (8_292_166_656, 729),
    "32B": (33_452_718_336, 1161),
    "72B": (73_410_777_344, 1353),
}
# The text decoder's keys; they move into text_config where there is one.
TEXT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "use_sliding_window",
    "sliding_window", "max_window_layers", "attention_dropout", "rope_theta", "rope_scaling",
)  # fmt: skip
VISION_DEFAULTS: Mapping[str, Any] = {
    "depth": 32, "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
    "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 4, "window_size": 112,
    "out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
TEXT_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 1e6, "use_sliding_window": False, "tie_word_embeddings": False,
}  # fmt: skip


def published_config(size: str) -> dict[str, Any]:
    """config.json of one size, flat, as on the hub."""
    hidden, intermediate, layers, heads, kv_heads, window_layers, vocab, tied, vision_intermediate = SIZES[size]
    begin = {"pad_token_id": 151643} if size == "32B" else {"bos_token_id": 151643}
    return {
        **COMMON,
        **begin,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_window_layers": window_layers,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "vision_config": {**VISION, "intermediate_size": vision_intermediate, "out_hidden_size": hidden},
    }


def resaved_by_4(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Flat, with a copy of the decoder's keys in text_config; rope has both its old and its new name of a type."""
    rope = {**flat["rope_scaling"], "rope_type": "default"}
    text = {key: flat[key] for key in TEXT_KEYS if key in flat}
    text |= {"model_type": "qwen2_5_vl_text", "rope_scaling": rope, "torch_dtype": flat["torch_dtype"]}
    return {**flat, "rope_scaling": rope, "text_config": text, "vision_config": {**flat["vision_config"]}}


def nested_by_4(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's keys in text_config only, the question of the tied head among them."""
    resaved = resaved_by_4(flat)
    text = resaved["text_config"] | {"tie_word_embeddings": flat["tie_word_embeddings"]}
    kept = {key: value for key, value in resaved.items() if key not in (*TEXT_KEYS, "tie_word_embeddings")}
    return kept | {"text_config": text}


def nested_by_5(flat: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5: rope_parameters, dtype, in_channels, layer_types, and tie_word_embeddings outside."""
    nested = nested_by_4(flat)
    text = {k: v for k, v in nested["text_config"].items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    del text["tie_word_embeddings"]
    text |= {
        "dtype": flat["torch_dtype"],
        "layer_types": ["full_attention"] * flat["num_hidden_layers"],
        "sliding_window": None,
        "rope_parameters": {
            "mrope_section": flat["rope_scaling"]["mrope_section"],
            "rope_theta": flat["rope_theta"],
            "rope_type": "default",
            "type": "mrope",
        },
    }
    vision = {key: value for key, value in flat["vision_config"].items() if key != "in_chans"}
    vision |= {
        "in_channels": 3,
        "model_type": "qwen2_5_vl_vision",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
    }
    del nested["torch_dtype"]
    same = {"dtype": flat["torch_dtype"], "tie_word_embeddings": flat["tie_word_embeddings"]}
    return nested | same | {"text_config": text, "vision_config": vision}


def without_defaults(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Flat, without the keys that have the class's default value."""
    vision = {k: v for k, v in flat["vision_config"].items() if k not in VISION_DEFAULTS or VISION_DEFAULTS[k] != v}
    kept = {k: v for k, v in flat.items() if k not in TEXT_DEFAULTS or TEXT_DEFAULTS[k] != v}
    return kept | {"vision_config": vision}


FORMS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "flat": dict,
    "resaved by 4": resaved_by_4,
    "nested by 4": nested_by_4,
    "nested by 5": nested_by_5,
    "without defaults": without_defaults,
}
