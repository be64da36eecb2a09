"""Prefill: each distinct image is encoded once and each prompt run once, whatever the number of samples."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from rethinker_jax.models.attention_kernels import Attention
from rethinker_jax.models.lora import adapt_params, merge_adapters
from rethinker_jax.models.qwen25vl import Model, Params, causal_attend, param_dims, param_shapes
from rethinker_jax.models.sharding import SAMPLING_RULES, param_shardings
from rethinker_jax.prompts.batch import PromptBatch

# One layer's cache: keys K-major [rows, kv_heads, head_dim, length], values [rows, kv_heads, length, head_dim].
LayerCache = tuple[jax.Array, jax.Array]


def sampling_layout(model: Model, params: Params, mesh: Mesh, dtype: Any) -> Params:
    """Training parameters → sampling parameters: merged, cast, resharded over `tensor` alone, layers as a list.

    One jitted identity; stacked layers would be sliced (copied) at every decoded token. A tied head becomes a kernel of
    its own on CPUs, where a product with the rows of the embedding takes thrice as long; elsewhere it is not worth the
    memory.
    """
    config = model.config
    if mesh.devices.flat[0].platform == "cpu":
        config = dataclasses.replace(config, tied=False)
    stacked = param_shardings(param_dims(config), param_shapes(config), mesh, SAMPLING_RULES)
    shardings = _unstack(model, stacked, lambda sharding: jax.NamedSharding(mesh, jax.P(*sharding.spec[1:])))
    return _layout(model, dtype, _HashableTree(shardings))(params)


def _unstack(model: Model, tree: Params, first: Any) -> Params:
    layers = tree["text"]["layers"]
    unstacked = [jax.tree.map(first, layers) for _ in range(model.config.layers)]
    return tree | {"text": tree["text"] | {"layers": unstacked}}


class _HashableTree:
    """A tree of shardings as a cache key."""

    def __init__(self, tree: Params):
        self.tree = tree
        leaves, structure = jax.tree.flatten(tree)
        self.key = (tuple(leaves), structure)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _HashableTree) and self.key == other.key


@functools.lru_cache(maxsize=8)
def _layout(model: Model, dtype: Any, shardings: _HashableTree) -> Any:
    def convert(params: Params) -> Params:
        params = adapt_params(params, dtype)
        layers = params["text"]["layers"]
        text = params["text"] | {
            "layers": [jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(model.config.layers)]
        }
        if "head" in shardings.tree["text"] and "head" not in text:
            text["head"] = {"kernel": text["embedding"].T}
        return merge_adapters(params | {"text": text})  # layer by layer

    return jax.jit(convert, out_shardings=shardings.tree)


@functools.partial(jax.jit, static_argnums=0)
def prefill(model: Model, params: Params, batch: PromptBatch) -> list[LayerCache]:
    """Caches of a batch of prompts, one pair a layer; columns behind a prompt's length hold no meaning."""
    table = None if batch.vision is None else model.encode_images(params, batch.vision)
    x = model.embed(params, batch.text.token_ids, batch.text.image_index, table)
    attend = functools.partial(_attend_and_keep, model.attention, batch.text.lengths)
    return model.run_layers(params["text"]["layers"], x, model.angles(batch.text.positions), attend)[1]


def _attend_and_keep(
    attention: Attention, lengths: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array, cache: None
) -> tuple[Float[Array, "batch seq heads head_dim"], LayerCache]:
    context, _ = causal_attend(attention, lengths, query, key, value, cache)
    return context, (jnp.transpose(key, (0, 2, 3, 1)), jnp.transpose(value, (0, 2, 1, 3)))
