"""The sizes of a Qwen2.5-VL, read from any published form of its config.json.

Three forms exist: flat (the hub's), flat with a nested copy (transformers 4.52+), and nested only (transformers 5).
A key that is missing takes the default of the transformers class, as it does there; a null is refused, as it is there,
but for the few keys where it has a meaning.
"""

import dataclasses
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rethinker_jax.errors import UserError
from rethinker_jax.json_values import flag, mapping, number, read_object, string, whole, whole_list


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
    raw = read_object(path)
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
    except ValueError as error:
        raise UserError(
            f"{path}: a value cannot be used: {error}. Compare it with the published config.json."
        ) from error


def parse_config(raw: Mapping[str, Any]) -> QwenConfig:
    """Read the dictionary of a config.json; raises ValueError on what cannot be used."""
    # As in transformers: where there is a text_config, keys of the text decoder beside it mean nothing.
    text = raw if raw.get("text_config") is None else mapping(raw, "text_config")
    try:
        vision = _parse_vision(mapping(raw, "vision_config"))
    except ValueError as error:  # of its keys, some stand in the decoder too
        raise ValueError(f"in vision_config, {error}") from error
    rope = mapping(text, "rope_scaling") or mapping(text, "rope_parameters")
    _refuse_other_models(raw, text, rope)
    heads = whole(text, "num_attention_heads", 64)
    d_model = whole(text, "hidden_size", 8192)
    head_dim = d_model // heads if text.get("head_dim") is None else whole(text, "head_dim", 0)
    if heads * head_dim != d_model:
        raise ValueError(f"hidden_size {d_model} must be num_attention_heads {heads} times head_dim {head_dim}")
    section = whole_list(rope, "mrope_section", (16, 24, 24))
    if len(section) != 3 or 2 * sum(section) != head_dim:
        raise ValueError(
            f"mrope_section {list(section)} must be three numbers that add up to half of head_dim {head_dim}"
        )
    # A null here means a head each, where a missing key means 8.
    kv_heads = heads if text.get("num_key_value_heads", 8) is None else whole(text, "num_key_value_heads", 8)
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
    config = QwenConfig(
        vocab=whole(text, "vocab_size", 152064),
        d_model=d_model,
        d_ff=whole(text, "intermediate_size", 29568),
        layers=whole(text, "num_hidden_layers", 80),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=number(text, "rms_norm_eps", 1e-5),
        rope_theta=number(rope, "rope_theta", number(text, "rope_theta", 1e6)),
        mrope_section=(section[0], section[1], section[2]),
        # Before transformers 5 it could stand in text_config alone.
        tied=flag(raw, "tie_word_embeddings") | flag(text, "tie_word_embeddings"),
        dtype=string(raw, "dtype")
        or string(raw, "torch_dtype")
        or string(text, "dtype")
        or string(text, "torch_dtype")
        or "float32",
        image_token=whole(raw, "image_token_id", 151655, least=0),
        video_token=whole(raw, "video_token_id", 151656, least=0),
        vision_start_token=whole(raw, "vision_start_token_id", 151652, least=0),
        vision_end_token=whole(raw, "vision_end_token_id", 151653, least=0),
        vision=vision,
    )
    _check_tokens(config)
    return config


def _check_tokens(config: QwenConfig) -> None:
    """Raise ValueError for a special token that the embedding does not hold, or that is two things at once."""
    tokens = {
        "image_token_id": config.image_token,
        "video_token_id": config.video_token,
        "vision_start_token_id": config.vision_start_token,
        "vision_end_token_id": config.vision_end_token,
    }
    keys: dict[int, str] = {}
    for key, token in tokens.items():
        if token >= config.vocab:
            raise ValueError(f"{key} must be below vocab_size {config.vocab}, came {token}")
        if token in keys:
            raise ValueError(f"{key} must be another token than {keys[token]}, came {token} for both")
        keys[token] = key


def _refuse_other_models(raw: Mapping[str, Any], text: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    """Raise ValueError for what the key names allow but this port would compute as something else."""
    if text.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {text['hidden_act']!r} is not known; the published models use 'silu'")
    for key in ("type", "rope_type"):
        # A null is no type: transformers 4 reads it so, and 5 makes no model of it.
        if rope.get(key) not in ("default", "mrope", None):
            raise ValueError(f"rope {key} {rope[key]!r} is not known; wanted 'mrope' or 'default'. Remove the scaling")
    layer_types = text.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ValueError(f"layer_types must be a list of 'full_attention' only, came {reprlib.repr(layer_types)}")
    if flag(text, "use_sliding_window"):
        raise ValueError("use_sliding_window true is not ported")
    if raw.get("quantization_config"):
        raise ValueError(
            f"quantization_config {raw['quantization_config']} cannot be trained; take the original checkpoint"
        )


def _parse_vision(raw: Mapping[str, Any]) -> VisionConfig:
    rope = mapping(raw, "rope_parameters")
    if rope.get("rope_type") not in ("axial", "default", None):
        raise ValueError(f"rope_type {rope['rope_type']!r} is not known; the published models use 'axial'")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {raw['hidden_act']!r} is not known; the published models use 'silu'")
    config = VisionConfig(
        depth=whole(raw, "depth", 32),
        d_model=whole(raw, "hidden_size", 3584),
        heads=whole(raw, "num_heads", 16),
        d_ff=whole(raw, "intermediate_size", 3420),
        out_dim=whole(raw, "out_hidden_size", 3584),
        in_channels=whole(raw, "in_channels", whole(raw, "in_chans", 3)),
        patch_size=whole(raw, "patch_size", 14),
        merge_size=whole(raw, "spatial_merge_size", 2),
        temporal_patch_size=whole(raw, "temporal_patch_size", 2),
        window_size=whole(raw, "window_size", 112),
        full_attention_blocks=whole_list(raw, "fullatt_block_indexes", (7, 15, 23, 31)),
        tokens_per_second=whole(raw, "tokens_per_second", 4),
        rope_theta=number(rope, "rope_theta", 10000.0),
    )
    if config.d_model % config.heads or config.head_dim % 4:
        raise ValueError(
            f"hidden_size {config.d_model} must be num_heads {config.heads} times a multiple of 4: "
            "rows and columns turn a quarter of a head each"
        )
    if config.window_size < config.patch_size * config.merge_size:
        raise ValueError(
            f"window_size {config.window_size} must hold one merged token of {config.patch_size * config.merge_size} "
            "pixels (patch_size x spatial_merge_size)"
        )
    return config
