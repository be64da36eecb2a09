"""The sizes of a Qwen2.5-VL, read from any published form of its config.json.

Three forms exist: flat (the hub's), flat with a nested copy (transformers 4.52+), and nested only (transformers 5).
A key that is missing takes the default of the transformers class, as it does there.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rethinker_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    depth: int
    d_model: int
    heads: int
    d_ff: int
    out_dim: int
    in_channels: int
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    window_size: int
    full_attention_blocks: tuple[int, ...]
    tokens_per_second: int
    rope_theta: float

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class QwenConfig:
    vocab: int
    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tied: bool
    dtype: str
    image_token: int
    video_token: int
    vision_start_token: int
    vision_end_token: int
    vision: VisionConfig

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.heads // self.kv_heads


def read_config(directory: Path) -> QwenConfig:
    """Read `directory/config.json`. Raises UserError if it is missing, is not JSON, or is another architecture."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(
            f"{directory}: wanted a Hugging Face model directory, found no config.json there. Name the directory that "
            "holds config.json and *.safetensors."
        )
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path}: wanted JSON, came: {error}. Copy the file from the original checkpoint again."
        ) from error
    if not isinstance(raw, dict):
        raise UserError(
            f"{path}: wanted a JSON object, came {type(raw).__name__}. Copy the original config.json again."
        )
    if raw.get("model_type") != "qwen2_5_vl":
        raise UserError(
            f"{path}: wanted model_type 'qwen2_5_vl', came {raw.get('model_type')!r}. Only Qwen2.5-VL is ported."
        )
    try:
        config = parse_config(raw)
        # Not in parse_config: the two class defaults contradict each other, and no model can be made from them.
        if config.vision.out_dim != config.d_model:
            raise ValueError(f"out_hidden_size {config.vision.out_dim} must be hidden_size {config.d_model}")
        return config
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: a value cannot be used: {error}. Compare it with the published config.json."
        ) from error


def parse_config(raw: Mapping[str, Any]) -> QwenConfig:
    """Read the dictionary of a config.json; raises AttributeError, TypeError or ValueError on what cannot be used."""
    # As in transformers: where there is a text_config, keys of the text decoder beside it mean nothing.
    text: Mapping[str, Any] = raw if raw.get("text_config") is None else raw["text_config"]
    vision = _parse_vision(raw.get("vision_config") or {})
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    _refuse_other_models(raw, text, rope)
    heads = _whole(text, "num_attention_heads", 64)
    d_model = _whole(text, "hidden_size", 8192)
    head_dim = _whole(text, "head_dim", d_model // heads)
    if heads * head_dim != d_model:
        raise ValueError(f"hidden_size {d_model} must be num_attention_heads {heads} times head_dim {head_dim}")
    section = tuple(int(part) for part in rope.get("mrope_section", (16, 24, 24)))
    if len(section) != 3 or min(section) < 0 or 2 * sum(section) != head_dim:
        raise ValueError(
            f"mrope_section {list(section)} must be three numbers that add up to head_dim / 2 = {head_dim / 2:g}"
        )
    # A null here means a head each, where a missing key means 8.
    kv_heads = _whole(text, "num_key_value_heads", heads if "num_key_value_heads" in text else 8)
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
    return QwenConfig(
        vocab=_whole(text, "vocab_size", 152064),
        d_model=d_model,
        d_ff=_whole(text, "intermediate_size", 29568),
        layers=_whole(text, "num_hidden_layers", 80),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=_number(text, "rms_norm_eps", 1e-5),
        rope_theta=_number(rope, "rope_theta", _number(text, "rope_theta", 1e6)),
        mrope_section=(section[0], section[1], section[2]),
        # Before transformers 5 it could stand in text_config alone.
        tied=bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        dtype=str(
            raw.get("dtype") or raw.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype") or "float32"
        ),
        image_token=_whole(raw, "image_token_id", 151655, least=0),
        video_token=_whole(raw, "video_token_id", 151656, least=0),
        vision_start_token=_whole(raw, "vision_start_token_id", 151652, least=0),
        vision_end_token=_whole(raw, "vision_end_token_id", 151653, least=0),
        vision=vision,
    )


def _whole(section: Mapping[str, Any], key: str, default: int, least: int = 1) -> int:
    """The whole number of `key`; `default` where it is missing or null."""
    value = default if section.get(key) is None else section[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key} must be a whole number of at least {least}, came {value!r}")
    return value


def _number(section: Mapping[str, Any], key: str, default: float) -> float:
    value = default if section.get(key) is None else section[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{key} must be a number above 0, came {value!r}")
    return float(value)


def _refuse_other_models(raw: Mapping[str, Any], text: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    """Raise ValueError for what the key names allow but this port would compute as something else."""
    if text.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {text['hidden_act']!r} is not known; the published models use 'silu'")
    for key in ("type", "rope_type"):
        if rope.get(key, "default") not in ("default", "mrope"):
            raise ValueError(f"rope {key} {rope[key]!r} is not known; wanted 'mrope' or 'default'. Remove the scaling")
    if text.get("use_sliding_window") or "sliding_attention" in (text.get("layer_types") or ()):
        raise ValueError("use_sliding_window true (or layer_types with sliding_attention) is not ported")
    if raw.get("quantization_config"):
        raise ValueError(
            f"quantization_config {raw['quantization_config']} cannot be trained; take the original checkpoint"
        )


def _parse_vision(raw: Mapping[str, Any]) -> VisionConfig:
    rope = raw.get("rope_parameters") or {}
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"vision hidden_act {raw['hidden_act']!r} is not known; the published models use 'silu'")
    config = VisionConfig(
        depth=_whole(raw, "depth", 32),
        d_model=_whole(raw, "hidden_size", 3584),
        heads=_whole(raw, "num_heads", 16),
        d_ff=_whole(raw, "intermediate_size", 3420),
        out_dim=_whole(raw, "out_hidden_size", 3584),
        in_channels=_whole(raw, "in_channels", _whole(raw, "in_chans", 3)),
        patch_size=_whole(raw, "patch_size", 14),
        merge_size=_whole(raw, "spatial_merge_size", 2),
        temporal_patch_size=_whole(raw, "temporal_patch_size", 2),
        window_size=_whole(raw, "window_size", 112),
        full_attention_blocks=tuple(int(block) for block in raw.get("fullatt_block_indexes", (7, 15, 23, 31))),
        tokens_per_second=_whole(raw, "tokens_per_second", 4),
        rope_theta=_number(rope, "rope_theta", 10000.0),
    )
    if config.d_model % config.heads or config.head_dim % 4:
        raise ValueError(
            f"vision hidden_size {config.d_model} must be num_heads {config.heads} times a multiple of 4: "
            "rows and columns turn a quarter of a head each"
        )
    if config.window_size < config.patch_size * config.merge_size:
        raise ValueError(
            f"window_size {config.window_size} must hold one merged token of {config.patch_size * config.merge_size} "
            "pixels (patch_size x spatial_merge_size)"
        )
    return config
