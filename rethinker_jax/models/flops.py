"""Operations of the model's matrix products, two for a multiplication and an addition; nothing else is counted.

What the result needs is counted: no padding, no recomputation, no masked pair of tokens.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from rethinker_jax.models.qwen_config import QwenConfig

BACKWARD = (
    3  # forward and backward of what is trained, in forward passes: a product has two of its size in the backward
)
THROUGH = 2  # of what is frozen, where the gradient goes through to something that is trained


Grid = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class ImageWork:
    """What the vision tower is fed: patches, and pairs of patches that see each other, in whole frames or windows."""

    patches: int
    frame_pairs: int
    window_pairs: int


def image_work(config: QwenConfig, grids: Iterable[Grid]) -> ImageWork:
    """Of images of these grids (frames, height, width in patches), each encoded once."""
    side = config.vision.window_size // config.vision.patch_size
    patches = frame_pairs = window_pairs = 0
    for frames, height, width in grids:
        patches += frames * height * width
        frame_pairs += frames * (height * width) ** 2
        # A ragged window is narrower: the squares of its sides multiply.
        window_pairs += frames * _squares(height, side) * _squares(width, side)
    return ImageWork(patches, frame_pairs, window_pairs)


def _squares(length: int, side: int) -> int:
    return length // side * side**2 + (length % side) ** 2


def vision_flops(config: QwenConfig, work: ImageWork) -> int:
    """Of the vision tower's forward pass, without its merger."""
    vision = config.vision
    d, full = vision.d_model, len(vision.full_attention_blocks)
    layer = 4 * d * d + 3 * d * vision.d_ff
    pairs = full * work.frame_pairs + (vision.depth - full) * work.window_pairs
    return 2 * work.patches * (vision.patch_dim * d + vision.depth * layer) + 4 * pairs * d


def merger_flops(config: QwenConfig, work: ImageWork) -> int:
    unit = config.vision.merge_size**2
    wide = unit * config.vision.d_model
    return 2 * (work.patches // unit) * (wide * wide + wide * config.vision.out_dim)


def decoder_flops(config: QwenConfig, tokens: int, pairs: int, targets: int) -> int:
    """Of the decoder's forward pass over `tokens`, which see `pairs` of tokens, and the logits of `targets`."""
    heads, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    layer = 2 * config.d_model * (heads + keys) + 3 * config.d_model * config.d_ff
    return (
        2 * tokens * config.layers * layer
        + 4 * pairs * config.layers * heads
        + 2 * targets * config.d_model * config.vocab
    )


def update_flops(
    config: QwenConfig,
    tokens: int,
    pairs: int,
    targets: int,
    grids: Iterable[Grid],
    freeze: Sequence[str] = (),
    adapters: bool = False,
) -> int:
    """Of a forward and backward pass. With adapters nothing else is trained; their own products are not counted."""
    images = image_work(config, grids)
    decoder = THROUGH if adapters or "decoder" in freeze else BACKWARD
    trained = THROUGH if adapters else BACKWARD
    vision, merger = (1 if part in freeze else trained for part in ("vision", "merger"))
    if merger == 1 and vision > 1:
        merger = THROUGH
    if "decoder" in freeze and max(vision, merger) == 1 and not adapters:
        decoder = 1
    return (
        decoder * decoder_flops(config, tokens, pairs, targets)
        + vision * vision_flops(config, images)
        + merger * merger_flops(config, images)
    )
