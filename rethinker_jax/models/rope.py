"""Rotary positions: m-RoPE of the text decoder, two-dimensional of the vision tower. Angles stay float32.

Positions are data, made on the host (`prompts/positions.py`, `prompts/windows.py`), never read off traced token ids.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def text_angles(
    positions: Int[Array, "3 batch seq"], head_dim: int, theta: float, section: tuple[int, int, int]
) -> Float[Array, "batch seq half"]:
    """Angles of m-RoPE: the first section of frequencies turns with time, the next with height, the last with width.

    Source: Qwen2-VL (arXiv 2409.12191) §2.1; sections are contiguous, not interleaved.
    """
    half = head_dim // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    axis = jnp.repeat(jnp.arange(3), jnp.array(section), total_repeat_length=half)
    chosen = jnp.moveaxis(positions.astype(jnp.float32), 0, -1)[..., axis]
    return chosen * frequencies


def vision_angles(hw: Int[Array, "*dims 2"], head_dim: int, theta: float) -> Float[Array, "*dims half"]:
    """Angles of the vision tower: half of the frequencies turn with the patch's row, half with its column."""
    quarter = head_dim // 4
    frequencies = theta ** (-2.0 * jnp.arange(quarter, dtype=jnp.float32) / (head_dim // 2))
    angles = hw.astype(jnp.float32)[..., None] * frequencies
    return angles.reshape(*hw.shape[:-1], 2 * quarter)


def rotate(
    x: Float[Array, "*dims heads head_dim"], angles: Float[Array, "*dims half"]
) -> Float[Array, "*dims heads head_dim"]:
    """Rotate pairs (x[i], x[i + half]) by `angles`, in float32, and cast back."""
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
