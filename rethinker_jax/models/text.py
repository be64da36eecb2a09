"""The text decoder of Qwen2.5-VL."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rethinker_jax.models.layers import GatedMlp, HeadsLinear, Linear, RMSNorm, make_param
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.models.rope import rotate

# attend(query, key, value, cache) -> (context, new cache): what differs between training, prefill and decoding.
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class TextAttention(nnx.Module):
    """Grouped-query attention with biases on q, k, v and none on the output."""

    def __init__(self, config: QwenConfig, rngs: nnx.Rngs, stack: int | None):
        d, n, k, h = config.d_model, config.heads, config.kv_heads, config.head_dim
        self.query = HeadsLinear((d, n, h), "d_model heads head_dim", rngs, stack)
        self.key = HeadsLinear((d, k, h), "d_model kv_heads head_dim", rngs, stack)
        self.value = HeadsLinear((d, k, h), "d_model kv_heads head_dim", rngs, stack)
        self.output = make_param(rngs, (n, h, d), "heads head_dim d_model", stack)

    def __call__(
        self, x: Float[Array, "batch seq d_model"], angles: Float[Array, "batch seq half"], attend: Attend, cache: Any
    ) -> tuple[Float[Array, "batch seq d_model"], Any]:
        query, key = rotate(self.query(x), angles), rotate(self.key(x), angles)
        context, cache = attend(query, key, self.value(x), cache)
        return jnp.einsum("BSNH,NHD->BSD", context, self.output[...]), cache


class DecoderLayer(nnx.Module):
    def __init__(self, config: QwenConfig, rngs: nnx.Rngs, stack: int | None = None):
        self.attention_norm = RMSNorm(config.d_model, "d_model", config.norm_eps, rngs, stack)
        self.attention = TextAttention(config, rngs, stack)
        self.mlp_norm = RMSNorm(config.d_model, "d_model", config.norm_eps, rngs, stack)
        self.mlp = GatedMlp((config.d_model, config.d_ff), ("d_model", "d_ff"), rngs, stack, bias=False)

    def __call__(
        self, x: Float[Array, "batch seq d_model"], angles: Float[Array, "batch seq half"], attend: Attend, cache: Any
    ) -> tuple[Float[Array, "batch seq d_model"], Any]:
        context, cache = self.attention(self.attention_norm(x), angles, attend, cache)
        x = x + context
        return x + self.mlp(self.mlp_norm(x)), cache


class TextDecoder(nnx.Module):
    """Embedding, stacked layers, last norm, and the head unless it is tied; `qwen25vl.Model` runs them."""

    def __init__(self, config: QwenConfig, rngs: nnx.Rngs):
        self.embedding = make_param(rngs, (config.vocab, config.d_model), "vocab d_model", None)
        self.layers = DecoderLayer(config, rngs, stack=config.layers)
        self.norm = RMSNorm(config.d_model, "d_model", config.norm_eps, rngs)
        self.head = None if config.tied else Linear((config.d_model, config.vocab), "d_model vocab", rngs)
