"""The vision tower of Qwen2.5-VL, on images laid out as rows of padded windows.

The layout (`prompts/windows.py`) makes grids data: an array [rows, windows, patches] in which a window is a batch
dimension. A windowed layer is then plain dense attention inside each window, and a full layer is attention among the
windows of one row with equal `segment`. One compiled function serves every resolution; no image sees another.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rethinker_jax.models.attention import Mask
from rethinker_jax.models.attention_kernels import Attention
from rethinker_jax.models.layers import GatedMlp, HeadsLinear, Linear, Remat, RMSNorm, make_param, recomputed
from rethinker_jax.models.qwen_config import VisionConfig
from rethinker_jax.models.rope import rotate, vision_angles

NORM_EPS = 1e-6  # fixed in the original's code, not in its config


class VisionBlock(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: nnx.Rngs, stack: int):
        d, n, h = config.d_model, config.heads, config.head_dim
        heads = "vision_d_model vision_heads vision_head_dim"
        self.attention_norm = RMSNorm(d, "vision_d_model", NORM_EPS, rngs, stack)
        self.query = HeadsLinear((d, n, h), heads, rngs, stack)
        self.key = HeadsLinear((d, n, h), heads, rngs, stack)
        self.value = HeadsLinear((d, n, h), heads, rngs, stack)
        self.output = make_param(rngs, (n, h, d), "vision_heads vision_head_dim vision_d_model", stack)
        self.output_bias = make_param(rngs, (d,), "vision_d_model", stack, fill=0.0)
        self.mlp_norm = RMSNorm(d, "vision_d_model", NORM_EPS, rngs, stack)
        self.mlp = GatedMlp((d, config.d_ff), ("vision_d_model", "vision_d_ff"), rngs, stack, bias=True)

    def __call__(
        self,
        x: Float[Array, "vision_rows windows patches vision_d_model"],
        angles: Float[Array, "vision_rows windows patches half"],
        segment: Int[Array, "vision_rows windows"],
        valid: Bool[Array, "vision_rows windows patches"],
        full: Bool[Array, ""],
        attention: Attention,
    ) -> Float[Array, "vision_rows windows patches vision_d_model"]:
        h = self.attention_norm(x)
        qkv = rotate(self.query(h), angles), rotate(self.key(h), angles), self.value(h)
        context = jax.lax.cond(
            full,
            functools.partial(_attend_image, attention, segment, valid),
            functools.partial(_attend_window, attention, valid),
            qkv,
        )
        x = x + jnp.einsum("RWPNH,NHD->RWPD", context, self.output[...]) + self.output_bias[...]
        return x + self.mlp(self.mlp_norm(x))


def _attend_window(attention: Attention, valid: jax.Array, qkv: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    return attention(*qkv, Mask(lengths=valid.sum(axis=-1, dtype=jnp.int32)))  # windows are padded at their ends


def _attend_image(
    attention: Attention, segment: jax.Array, valid: jax.Array, qkv: tuple[jax.Array, jax.Array, jax.Array]
) -> jax.Array:
    rows, windows, patches = valid.shape
    query, key, value = (x.reshape(rows, windows * patches, *x.shape[3:]) for x in qkv)
    image = jnp.where(valid, segment[:, :, None], 0).reshape(rows, windows * patches)
    return attention(query, key, value, Mask(segments=image)).reshape(qkv[0].shape)


class Merger(nnx.Module):
    """Four neighbouring patches become one token of the decoder's width."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        wide = config.d_model * config.merge_size**2
        self.norm = RMSNorm(config.d_model, "vision_d_model", NORM_EPS, rngs)
        self.up = Linear((wide, wide), "merged merged_out", rngs, bias=True)
        self.down = Linear((wide, config.out_dim), "merged d_model", rngs, bias=True)
        self.unit = config.merge_size**2

    def __call__(self, x: Float[Array, "vision_rows windows patches vision_d_model"]) -> Float[Array, "merged d_model"]:
        x = self.norm(x)
        x = x.reshape(-1, self.unit * x.shape[-1])
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class VisionTower(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.patch_embedding = make_param(rngs, (config.patch_dim, config.d_model), "patch_dim vision_d_model", None)
        self.blocks = VisionBlock(config, rngs, stack=config.depth)
        self.merger = Merger(config, rngs)
        self.config = config

    def __call__(
        self,
        patches: Float[Array, "vision_rows windows patches patch_dim"],
        hw: Int[Array, "vision_rows windows patches 2"],
        segment: Int[Array, "vision_rows windows"],
        valid: Bool[Array, "vision_rows windows patches"],
        attention: Attention,
        remat: Remat = "none",
    ) -> Float[Array, "merged d_model"]:
        """Encode rows of windows; row r of the result is the r-th merge unit of the flattened layout."""
        kernel = self.patch_embedding[...]
        x = patches.astype(kernel.dtype) @ kernel
        angles = vision_angles(hw, self.config.head_dim, self.config.rope_theta)
        graphdef, stacked = nnx.split(self.blocks)

        def block(x: jax.Array, layer: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
            return nnx.merge(graphdef, layer[0])(x, angles, segment, valid, layer[1], attention), None

        full = jnp.isin(jnp.arange(self.config.depth), jnp.array(self.config.full_attention_blocks, jnp.int32))
        x, _ = jax.lax.scan(recomputed(block, remat), x, (stacked, full))
        return self.merger(x)
