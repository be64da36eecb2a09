"""Prefill: each distinct image is encoded once and each prompt run once, whatever the number of samples."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from rethinker_jax.models.attention_kernels import Attention
from rethinker_jax.models.lora import adapt_params, merge_adapters
from rethinker_jax.models.qwen25vl import Model, Params, causal_attend, param_dims, param_shapes
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.models.sharding import ROWS, SAMPLING_RULES, kv_repeats, param_shardings
from rethinker_jax.prompts.batch import PromptBatch
from rethinker_jax.sampling.caches import (
    Caches,
    LayerCache,
    as_cache,
    attend_caches,
    by_heads,
    by_kv_heads,
    empty_caches,
    write_columns,
)
from rethinker_jax.sampling.slots import Places, Prompts


def sampling_layout(model: Model, params: Params, mesh: Mesh, dtype: Any) -> Params:
    """Training parameters → sampling parameters: merged, cast, resharded over `tensor` alone, layers as a list.

    One jitted identity; stacked layers would be sliced (copied) at every decoded token. A tied head becomes a kernel of
    its own on CPUs, where a product with the rows of the embedding takes thrice as long; elsewhere it is not worth the
    memory. Where `tensor` is larger than the number of kv heads, these are repeated until each device has one.
    """
    config = model.config
    if mesh.devices.flat[0].platform == "cpu":
        config = dataclasses.replace(config, tied=False)
    copies = kv_copies(config, mesh)
    config = dataclasses.replace(config, kv_heads=config.kv_heads * copies)
    stacked = param_shardings(param_dims(config), param_shapes(config), mesh, SAMPLING_RULES)
    shardings = _unstack(model, stacked, lambda sharding: jax.NamedSharding(mesh, jax.P(*sharding.spec[1:])))
    return _layout(model, dtype, copies, _HashableTree(shardings))(params)


def kv_copies(config: QwenConfig, mesh: Mesh) -> int:
    """How often the sampling layout repeats each kv head, so that `tensor` divides them; 1 where heads forbid it."""
    return kv_repeats(config.heads, config.kv_heads, mesh.shape["tensor"]) or 1


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
def _layout(model: Model, dtype: Any, copies: int, shardings: _HashableTree) -> Any:
    def convert(params: Params) -> Params:
        params = adapt_params(params, dtype)
        layers = params["text"]["layers"]
        text = params["text"] | {
            "layers": [jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(model.config.layers)]
        }
        if "head" in shardings.tree["text"] and "head" not in text:
            text["head"] = {"kernel": text["embedding"].T}
        params = merge_adapters(params | {"text": text})  # layer by layer
        return _repeat_kv_heads(params, copies) if copies > 1 else params

    return jax.jit(convert, out_shardings=shardings.tree)


def _repeat_kv_heads(params: Params, copies: int) -> Params:
    """Query head n still reads kv head n // group, because copies of a head stand side by side."""

    def repeat(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return jnp.repeat(leaf, copies, axis=-2) if path[-2].key in ("key", "value") else leaf

    layers = jax.tree_util.tree_map_with_path(repeat, params["text"]["layers"])
    return params | {"text": params["text"] | {"layers": layers}}


@functools.partial(jax.jit, static_argnums=(0, 1, 4, 5))
def prefill(model: Model, places: Places, params: Params, batch: PromptBatch, chunk: int, num_rows: int) -> Caches:
    """Caches of the first `num_rows` prompts of a batch, one pair a layer; what lies behind a prompt's length is noise.

    `chunk` bounds how many tokens of a prompt run through the layers at once, for prompts whose activations would not
    fit; 0 = all of them. An image may lie across chunks.
    """
    text = batch.text
    table = None if batch.vision is None else model.encode_images(params, batch.vision)
    layers = params["text"]["layers"]
    rows, seq = text.token_ids.shape
    if not chunk or chunk >= seq:
        x = model.embed(params, text.token_ids, text.image_index, table)
        attend = functools.partial(_attend_and_keep, model.attention, text.lengths)
        caches = model.run_layers(layers, x, model.angles(text.positions), attend)[1]
        return places.put_caches([(keys[:num_rows], values[:num_rows]) for keys, values in caches], places.prompts)

    num_chunks = -(-seq // chunk)
    width = [(0, 0), (0, num_chunks * chunk - seq)]
    token_ids, image_index = jnp.pad(text.token_ids, width), jnp.pad(text.image_index, width, constant_values=-1)
    positions = jnp.pad(text.positions, [(0, 0), *width])

    def run_chunk(caches: Caches, start: jax.Array) -> tuple[Caches, None]:
        ids, index = (jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1) for x in (token_ids, image_index))
        x = model.embed(params, ids, index, table)
        angles = model.angles(jax.lax.dynamic_slice_in_dim(positions, start, chunk, axis=2))
        return model.run_layers(layers, x, angles, functools.partial(_attend_and_write, start), caches)[1], None

    kv_heads, head_dim = layers[0]["attention"]["key"]["kernel"].shape[-2:]
    empty = empty_caches(len(layers), rows, kv_heads, head_dim, num_chunks * chunk, params["text"]["embedding"].dtype)
    caches, _ = jax.lax.scan(run_chunk, empty, jnp.arange(num_chunks) * chunk)
    cut = [(keys[:num_rows, ..., :seq], values[:num_rows, :, :seq]) for keys, values in caches]
    return places.put_caches(cut, places.prompts)


def _attend_and_keep(
    attention: Attention, lengths: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array, cache: None
) -> tuple[Float[Array, "batch seq heads head_dim"], LayerCache]:
    context, _ = causal_attend(attention, lengths, query, key, value, cache)
    return context, as_cache(key, value)


def _attend_and_write(
    start: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array, cache: LayerCache
) -> tuple[Float[Array, "batch chunk heads head_dim"], LayerCache]:
    """A chunk from column `start` on sees itself causally and all columns before it."""
    cache = write_columns(cache, as_cache(key, value), start)
    _, seq, heads, _ = query.shape
    seen = jnp.arange(cache[0].shape[-1])[None, :] <= start + jnp.arange(seq)[:, None]
    seen = jnp.tile(seen, (heads // key.shape[2], 1))[None]
    context = attend_caches(by_kv_heads(query, key.shape[2]), (*cache, seen))
    return by_heads(context, seq).astype(query.dtype), cache


@functools.partial(jax.jit, static_argnums=(0, 1, 6))
def prefill_responses(
    model: Model,
    places: Places,
    params: Params,
    prompts: Prompts,
    prompt_of: Int[Array, " rows"],
    token_ids: Int[Array, "rows seq"],
    block: int,
) -> Caches:
    """Caches of first responses, each read in one chunk behind its prefilled prompt; no prompt is run again.

    Rows are cut over the shards; `prompt_of` counts in the shard's prompts. A row's tokens come in the order of
    feeding: the last token of its prompt, then the response. `block` rows of a shard run at once.
    """

    def read(params: Params, prompts: Prompts, prompt_of: jax.Array, token_ids: jax.Array) -> Caches:
        rows = token_ids.shape[0]
        size = min(block, rows)
        starts = jnp.minimum(jnp.arange(-(-rows // size)) * size, rows - size)  # the last block may overlap

        def one(start: jax.Array) -> Caches:
            ids, prompt = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (token_ids, prompt_of))
            return _read_behind(model, params, prompts, prompt, ids)

        found = jax.lax.map(one, starts)
        order = jnp.arange(rows)
        return jax.tree.map(lambda leaf: leaf[order // size, order - starts[order // size]], found)

    shards = jax.shard_map(
        read,
        mesh=places.mesh,
        in_specs=(PartitionSpec(), places.prompts, ROWS, ROWS),
        out_specs=ROWS,
        axis_names=set(ROWS[0]),
        check_vma=False,
    )
    return places.put_caches(shards(params, prompts, prompt_of, token_ids))


def _read_behind(
    model: Model, params: Params, prompts: Prompts, prompt: jax.Array, token_ids: Int[Array, "rows seq"]
) -> Caches:
    seq = token_ids.shape[1]
    positions = (prompts.next_positions[prompt] - 1)[:, None] + jnp.arange(seq)
    columns = jnp.arange(prompts.caches[0][0].shape[-1])
    seen_prompt = columns[None, None, :] < prompts.lengths[prompt][:, None, None] - 1  # its last token is fed again
    causal = jnp.arange(seq)[None, :] <= jnp.arange(seq)[:, None]

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        own = as_cache(key, value)
        keys, values = cache[0][prompt], cache[1][prompt]
        seen_own = jnp.tile(causal, (query.shape[2] // key.shape[2], 1))[None]
        context = attend_caches(by_kv_heads(query, key.shape[2]), (keys, values, seen_prompt), (*own, seen_own))
        return by_heads(context, seq).astype(query.dtype), own

    angles = model.angles(jnp.broadcast_to(positions, (3, *positions.shape)))
    return model.run_layers(params["text"]["layers"], model.embed(params, token_ids), angles, attend, prompts.caches)[1]
