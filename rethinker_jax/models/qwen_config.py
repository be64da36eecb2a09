"""The sizes of a Qwen2.5-VL, read from any published form of its config.json.

Three forms exist: flat (the hub's), flat with a nested copy (transformers 4.52+), and nested only (transformers 5).
A key that is missing takes the default of the transformers class, as it does there.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
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

    @property
    def window_patches(self) -> int:
        """Patches of a full attention window: 64 in the published sizes."""
        return (self.window_size // self.patch_size) ** 2


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
        return parse_config(raw)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: a value cannot be used: {error}. Compare it with the published config.json."
        ) from error


def parse_config(raw: Mapping[str, Any]) -> QwenConfig:
    """Read the dictionary of a config.json; raises KeyError, TypeError or ValueError on what cannot be used."""
    text: Mapping[str, Any] = raw.get("text_config") or raw

    def text_key(name: str, default: Any) -> Any:
        value = text.get(name, raw.get(name))
        return default if value is None else value

    rope = text_key("rope_parameters", None) or text_key("rope_scaling", None) or {}
    _refuse_other_models(raw, text_key, rope)
    section = tuple(int(part) for part in rope.get("mrope_section", (16, 24, 24)))
    heads = int(text_key("num_attention_heads", 64))
    d_model = int(text_key("hidden_size", 8192))
    head_dim = int(text_key("head_dim", d_model // heads))
    if len(section) != 3 or 2 * sum(section) != head_dim:
        raise ValueError(
            f"mrope_section {list(section)} must be three numbers that add up to head_dim / 2 = {head_dim // 2}"
        )
    kv_heads = int(text_key("num_key_value_heads", 8))
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
    tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    return QwenConfig(
        vocab=int(text_key("vocab_size", 152064)),
        d_model=d_model,
        d_ff=int(text_key("intermediate_size", 29568)),
        layers=int(text_key("num_hidden_layers", 80)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=float(text_key("rms_norm_eps", 1e-5)),
        rope_theta=float(rope.get("rope_theta", text_key("rope_theta", 1e6))),
        mrope_section=(section[0], section[1], section[2]),
        tied=bool(tied),
        dtype=str(
            raw.get("dtype") or raw.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype") or "float32"
        ),
        image_token=int(raw.get("image_token_id", 151655)),
        video_token=int(raw.get("video_token_id", 151656)),
        vision_start_token=int(raw.get("vision_start_token_id", 151652)),
        vision_end_token=int(raw.get("vision_end_token_id", 151653)),
        vision=_parse_vision(raw.get("vision_config") or {}),
    )


def _refuse_other_models(raw: Mapping[str, Any], text_key: Callable[[str, Any], Any], rope: Mapping[str, Any]) -> None:
    """Raise ValueError for what the key names allow but this port would compute as something else."""
    if text_key("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {text_key('hidden_act', '')!r} is not known; the published models use 'silu'")
    for key in ("type", "rope_type"):
        if rope.get(key, "default") not in ("default", "mrope"):
            raise ValueError(f"rope {key} {rope[key]!r} is not known; wanted 'mrope' or 'default'. Remove the scaling")
    if text_key("use_sliding_window", False):
        raise ValueError("use_sliding_window true is not ported; the published models have false")
    if raw.get("quantization_config"):
        raise ValueError(
            f"quantization_config {raw['quantization_config']} cannot be trained; take the original checkpoint"
        )


def _parse_vision(raw: Mapping[str, Any]) -> VisionConfig:
    rope = raw.get("rope_parameters") or {}
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"vision hidden_act {raw['hidden_act']!r} is not known; the published models use 'silu'")
    return VisionConfig(
        depth=int(raw.get("depth", 32)),
        d_model=int(raw.get("hidden_size", 3584)),
        heads=int(raw.get("num_heads", 16)),
        d_ff=int(raw.get("intermediate_size", 3420)),
        out_dim=int(raw.get("out_hidden_size", 3584)),
        in_channels=int(raw.get("in_channels", raw.get("in_chans", 3))),
        patch_size=int(raw.get("patch_size", 14)),
        merge_size=int(raw.get("spatial_merge_size", 2)),
        temporal_patch_size=int(raw.get("temporal_patch_size", 2)),
        window_size=int(raw.get("window_size", 112)),
        full_attention_blocks=tuple(int(block) for block in raw.get("fullatt_block_indexes", (7, 15, 23, 31))),
        tokens_per_second=int(raw.get("tokens_per_second", 4)),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
    )
