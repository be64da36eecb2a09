"""Models and prompts on which the port is compared with transformers. Numpy only; both sides build from here.

Weights and pixels come from the raw 64-bit words of PCG64, which numpy keeps the same for ever (its `normal` it may
change), so golden files need to hold results only. Norm scales and biases are away from their defaults, and kernels are
large enough that attention is far from uniform: a forgotten bias or a swapped axis shows in the first digits.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rethinker_jax.prompts.positions import mrope_positions
from rethinker_jax.types import ImagePatches, Problem, Prompt

VARIANTS = ("tied", "untied")  # of these there are golden files
NUM_GREEDY = 8
NUM_SUMS = 16

Grid = tuple[int, int]
# A prompt is a list of parts: a number of text tokens, or an image of so many patches, which stands between
# vision_start and vision_end; (grid,) is an image without them.
Parts = Sequence[int | Grid | tuple[Grid]]

# Images of this grid have so little contrast that the epsilon of the norms counts.
FAINT: Grid = (2, 4)

# 10x14 patches are ragged in both directions for both window sizes; 2x4 is smaller than a window.
CASES: Mapping[str, Sequence[Parts]] = {
    "one_image": [[5, (10, 14), 6]],
    "two_images": [[3, (6, 6), 4, FAINT, 5]],
    "text_only": [[11]],
    "padded_batch": [[4, (6, 6), 3], [7], [2, FAINT, 1, (4, 6), 9]],
}
# Compared live only. Images of 2x2 patches are one token, the least there is; 2x80 and 60x2 are 40 and 30 times as
# long as wide, and end in a ragged window for every window size.
LIVE_CASES: Mapping[str, Sequence[Parts]] = {
    "ragged grid": [[5, (10, 14), 6]],
    "image first and last": [[((6, 8),), 5, ((4, 10),)], [((4, 4),), 3]],
    "three images, text between": [[2, (4, 6), 3, (10, 4), 1, (6, 6), 4]],
    "text only": [[1], [11], [6]],
    "mixed batch": [[9], [3, (6, 10), 4], [(4, 4), 2, FAINT, 3, (8, 6), 5]],
    "extreme aspect": [[3, (2, 80), 4], [2, (60, 2), 3]],
    "smallest images": [[1, (2, 2), 2], [((2, 2),), 1], [4, (2, 4), 1, (4, 2), 1]],
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model of the live comparison: what it changes in the example's config, and how its checkpoint is written.

    `form` is one of `published.FORMS`; `layout` is who wrote the tensors' names: "hub", "in memory" or "base model";
    `cut`: in several files, with an index.
    """

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    form: str
    layout: str = "hub"
    cut: bool = False


def _shape(
    heads: int, kv_heads: int, d_ff: int, layers: int, vision: Mapping[str, Any], form: str, **options: Any
) -> Shape:
    """Heads of 16 with the published sections' ratio 2:3:3, and vision heads of 20: as there, not a power of two."""
    text = {
        "hidden_size": 16 * heads,
        "intermediate_size": d_ff,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "max_window_layers": layers,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "rope_theta": 1000.0,
        "tie_word_embeddings": False,
    }
    vision = {"hidden_size": 20 * vision["num_heads"], "out_hidden_size": 16 * heads, **vision}
    return Shape(text | options.pop("text", {}), vision, form, **options)


# Heads, groups of heads and widths in the published ratios; what a config may choose differs from shape to shape.
SHAPES: Mapping[str, Shape] = {
    "like 3B": _shape(
        16, 2, 1376, 3,
        {"depth": 4, "num_heads": 4, "intermediate_size": 214, "window_size": 112, "fullatt_block_indexes": [1, 3]},
        "flat", layout="base model", text={"tie_word_embeddings": True},
    ),
    "like 7B": _shape(
        14, 2, 1184, 2,
        {"depth": 3, "num_heads": 4, "intermediate_size": 214, "window_size": 56, "fullatt_block_indexes": [2]},
        "resaved by 4",
    ),
    "like 32B": _shape(
        10, 2, 864, 4,
        {"depth": 4, "num_heads": 3, "intermediate_size": 162, "window_size": 84, "fullatt_block_indexes": [0, 3, 7]},
        "nested by 5", layout="in memory", cut=True,
    ),
    "like 72B": _shape(
        16, 2, 924, 3,
        {"depth": 2, "num_heads": 2, "intermediate_size": 108, "window_size": 28, "fullatt_block_indexes": []},
        "nested by 4", cut=True, text={"rms_norm_eps": 1e-5},
    ),
}  # fmt: skip


def make_config(variant: str, example: Mapping[str, Any]) -> dict[str, Any]:
    """Flat config.json of a variant or shape. 'tied' is the example's own; 'untied' differs wherever a size may."""
    config = dict(example)
    if variant == "tied":
        return config
    if variant in SHAPES:
        shape = SHAPES[variant]
        return {**config, **shape.text, "vision_config": config["vision_config"] | shape.vision}
    config |= {
        "hidden_size": 144,
        "intermediate_size": 200,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_hidden_layers": 2,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 4, 4]},
        "rope_theta": 1000.0,
        "tie_word_embeddings": False,
    }
    config["vision_config"] = config["vision_config"] | {
        "depth": 3,
        "hidden_size": 72,
        "intermediate_size": 100,
        "num_heads": 3,
        "out_hidden_size": 144,
        "window_size": 112,
    }
    return config


def noise(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 numbers of `shape`, uniform with mean 0 and variance 1; the same for the same (seed, name) everywhere."""
    words = np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(int(np.prod(shape)))
    unit = (words >> np.uint64(40)).astype(np.float64) / 2**24
    return ((2 * unit - 1) * 3**0.5).astype(np.float32).reshape(shape)


def make_weight(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """The tensor of the hub's name `name`."""
    if name.endswith(".bias"):
        scale = 0.3
    elif len(shape) == 1:
        return 1 + np.float32(0.4) * noise(seed, name, shape)
    elif name == "model.embed_tokens.weight":
        scale = 0.4
    else:
        gain = 1.5 if any(part in name for part in ("q_proj", "k_proj", "qkv", "lm_head")) else 1.2
        scale = gain * float(np.prod(shape[1:])) ** -0.5
    return np.float32(scale) * noise(seed, name, shape)


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt: int64 token_ids [seq], and its images' patches [num_patches, patch_dim] with grids (1, h, w)."""

    token_ids: np.ndarray
    images: tuple[ImagePatches, ...]


def make_rows(case: str, config: Mapping[str, Any]) -> list[Row]:
    """The rows of a case. Text tokens are ordinary ones."""
    vision = config["vision_config"]
    patch_dim = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    rows = []
    for number, parts in enumerate({**CASES, **LIVE_CASES}[case]):
        ids: list[int] = []
        images = []
        for place, part in enumerate(parts):
            name = f"{case}.{number}.{place}"
            if isinstance(part, int):
                ids += [int(value) for value in 20 + (np.abs(noise(1, name, (part,))) * 100).astype(np.int64)]
                continue
            h, w = part if len(part) == 2 else part[0]
            contrast = np.float32(0.02 if (h, w) == FAINT else 1.0)
            images.append(ImagePatches(contrast * noise(1, name, (h * w, patch_dim)), (1, h, w)))
            pads = [config["image_token_id"]] * (h * w // vision["spatial_merge_size"] ** 2)
            between = config["vision_start_token_id"], config["vision_end_token_id"]
            ids += [between[0], *pads, between[1]] if len(part) == 2 else pads
        rows.append(Row(np.array(ids), tuple(images)))
    return rows


def make_prompt(row: Row, config: Mapping[str, Any]) -> Prompt:
    """The row as our model takes it."""
    is_image = row.token_ids == config["image_token_id"]
    positions, next_position = mrope_positions(
        row.token_ids,
        config["image_token_id"],
        [image.grid for image in row.images],
        config["vision_config"]["spatial_merge_size"],
    )
    return Prompt(
        problem=Problem(id=f"row {len(row.token_ids)}", question="", answer=""),
        token_ids=row.token_ids.astype(np.int32),
        positions=positions,
        image_index=np.where(is_image, np.cumsum(is_image) - 1, -1).astype(np.int32),
        next_position=next_position,
        images=row.images,
    )


def never_drawn(config: Mapping[str, Any]) -> list[int]:
    """Ids that greedy decoding may not choose, in both implementations."""
    names = ("vision_start", "vision_end", "vision", "image", "video")
    return [config[f"{name}_token_id"] for name in names]


def sums(name: str, tensor: np.ndarray) -> np.ndarray:
    """[1 + NUM_SUMS]: the norm of a gradient, and its sums under pseudo-random signs; each element counts in each."""
    flat = tensor.astype(np.float64).ravel()
    words = np.random.PCG64([2, zlib.crc32(name.encode())]).random_raw(flat.size)
    signs = ((words[:, None] >> np.arange(NUM_SUMS, dtype=np.uint64)) & np.uint64(1)).astype(np.float64) * 2 - 1
    return np.concatenate([[np.linalg.norm(flat)], flat @ signs])


def checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).tobytes())
