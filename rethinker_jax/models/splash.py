"""Attention by the splash kernel, the Pallas kernel for TPUs that comes with jax: `attend_splash`.

A query's keys may come in parts, its own row and a prefix, that one call of the kernel cannot hold: they have masks of
different kinds. Each part is a call of its own, and the parts are merged. With scores s, part p of the keys gives

    L_p = log Σ_{k in p} exp s_k        o_p = Σ_{k in p} exp(s_k - L_p) v_k

and the softmax over all keys is

    L = log Σ_p exp L_p                 o = Σ_p exp(L_p - L) o_p

Backward, with weights w_k = exp(s_k - L), a context's gradient do gives

    dv_k = w_k do        ds_k = w_k (do·v_k - do·o)        dq = Σ_k ds_k k        dk_k = ds_k q

Of what lies outside a key's own part, this knows L and o alone, and those are what a flash backward pass starts from.
Given the merged L and o, the kernel's backward pass over one part is therefore exact: it gives the gradients of the
part's keys and values, and the part's share of dq. A part of which a query sees nothing has an L_p far below any score,
and weighs nothing.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from rethinker_jax.models.attention import Mask, Prefix
from rethinker_jax.models.sharding import cut_rows, kv_repeats

LANES = 128  # of a TPU's registers: tiles of keys and head dimensions are multiples
BLOCKS = (512, 256, 128)  # tile sizes of queries and of keys; 512 by 512 fits v5e, v5p and v6e

# Of one part: keys and values [rows, kv_heads, padded, lanes], and segment ids of queries and keys where they matter.
Source = tuple[jax.Array, jax.Array, splash.SegmentIds | None]


@dataclasses.dataclass(frozen=True)
class Part:
    """What a call of the kernel is compiled for: heads of queries, and lengths, which are whole tiles."""

    causal: bool
    heads: int
    queries: int
    keys: int
    interpret: bool

    def kernel(self, save_residuals: bool = False) -> splash.SplashAttentionKernel:
        """For one row. `save_residuals`: it returns (o_p, (L_p,)), and has no gradient."""
        mask = splash_mask.CausalMask if self.causal else splash_mask.FullMask
        queries, keys = _tile(self.queries), _tile(self.keys)
        return splash.make_splash_mha(
            splash_mask.MultiHeadMask([mask((self.queries, self.keys))] * self.heads),
            block_sizes=splash.BlockSizes(
                block_q=queries,
                block_kv=keys,
                block_q_dkv=queries,
                block_kv_dkv=keys,
                block_q_dq=queries,
                block_kv_dq=keys,
            ),
            head_shards=1,
            q_seq_shards=1,
            save_residuals=save_residuals,
            interpret=self.interpret,
        )


def attend_splash(
    query: Float[Array, "rows seq heads head_dim"],
    key: Float[Array, "rows seq kv_heads head_dim"],
    value: Float[Array, "rows seq kv_heads head_dim"],
    mask: Mask,
    prefix: Prefix | None = None,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Float[Array, "rows seq heads head_dim"]:
    """By the splash kernel: rows over the axes that cut them, heads over `tensor`, where these divide them.

    Sequences are padded to whole tiles and heads to whole lanes. `interpret`: as ordinary operations, without a TPU.
    """
    rows, seq, heads, head_dim = query.shape
    spec, copies = partition(rows, heads, key.shape[2], mesh)

    def lay_out(x: jax.Array, copies: int = 1) -> jax.Array:
        """[rows, heads, padded, lanes]"""
        x = jnp.pad(x, ((0, 0), (0, _padded(x.shape[1]) - x.shape[1]), (0, 0), (0, -head_dim % LANES)))
        return jnp.repeat(x.swapaxes(1, 2), copies, axis=1)

    sources: list[Source] = [(lay_out(key, copies), lay_out(value, copies), _own_segments(mask, rows, seq))]
    if prefix is not None:
        sources.append((lay_out(prefix.key, copies), lay_out(prefix.value, copies), _prefix_segments(prefix)))

    def run(query: jax.Array, *sources: Source) -> Any:
        _, heads, queries, _ = query.shape
        lengths = [keys.shape[2] for keys, *_ in sources]
        own, *others = (Part(mask.causal and not n, heads, queries, keys, interpret) for n, keys in enumerate(lengths))
        if not others:
            return jax.vmap(own.kernel())(query, *sources[0])
        return attend_parts((own, *others), query, sources)

    if mesh is not None:
        by_row = PartitionSpec(spec[0])
        run = jax.shard_map(
            run, mesh=mesh, in_specs=(spec, *[(spec, spec, by_row)] * len(sources)), out_specs=spec, check_vma=False
        )
    # The kernel does not scale its scores.
    scaled = (query.astype(jnp.float32) * head_dim**-0.5).astype(query.dtype)
    return run(lay_out(scaled), *sources).swapaxes(1, 2)[:, :seq, :, :head_dim]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_parts(
    parts: tuple[Part, ...], query: Float[Array, "rows heads queries lanes"], sources: tuple[Source, ...]
) -> Float[Array, "rows heads queries lanes"]:
    """One softmax over the keys of all parts, as at the top of this file. The query is scaled."""
    return _forward(parts, query, sources)[0]


def _forward(
    parts: tuple[Part, ...], query: jax.Array, sources: tuple[Source, ...]
) -> tuple[jax.Array, tuple[jax.Array, tuple[Source, ...], jax.Array, jax.Array]]:
    found = [
        jax.vmap(part.kernel(save_residuals=True))(query, *source) for part, source in zip(parts, sources, strict=True)
    ]
    log_sum = functools.reduce(jnp.logaddexp, [log_sum for _, (log_sum,) in found])
    shares = [jnp.exp(part - log_sum)[..., None] * context for context, (part,) in found]
    context = sum(shares[1:], shares[0]).astype(query.dtype)
    return context, (query, sources, context, log_sum)


def _backward(
    parts: tuple[Part, ...],
    residuals: tuple[jax.Array, tuple[Source, ...], jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, tuple[tuple[jax.Array, jax.Array, None], ...]]:
    query, sources, context, log_sum = residuals
    found = [
        jax.vmap(functools.partial(_part_backward, part.kernel()))(query, *source, context, log_sum, gradient)
        for part, source in zip(parts, sources, strict=True)
    ]
    of_query = sum(share.astype(jnp.float32) for share, *_ in found)
    return jnp.asarray(of_query, query.dtype), tuple((of_key, of_value, None) for _, of_key, of_value in found)


attend_parts.defvjp(_forward, _backward)


def _part_backward(
    kernel: splash.SplashAttentionKernel,
    query: Float[Array, "heads queries lanes"],
    key: Float[Array, "kv_heads keys lanes"],
    value: Float[Array, "kv_heads keys lanes"],
    segments: splash.SegmentIds | None,
    context: Float[Array, "heads queries lanes"],
    log_sum: Float[Array, "heads queries"],
    gradient: Float[Array, "heads queries lanes"],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The share of dq, dk and dv. The kernel's own backward pass is private: a test pins its arguments."""
    masks = kernel.dq_mask_info, kernel.dkv_mask_info
    residuals = query, key, value, segments, None, context, log_sum, *masks  # None: no attention sinks
    gradients = splash._splash_attention_bwd(**kernel.kwargs, res=residuals, do=gradient)
    return gradients[3], gradients[4], gradients[5]


def _own_segments(mask: Mask, rows: int, seq: int) -> splash.SegmentIds | None:
    """Lengths alone need no segments under causality, because what is real comes first; else they are a segment."""
    if mask.causal and mask.segments is None:
        return None
    ids = jnp.where(mask.real(seq), 1 if mask.segments is None else mask.segments, 0)
    ids = jnp.pad(jnp.broadcast_to(ids, (rows, seq)), ((0, 0), (0, _padded(seq) - seq)))
    return splash.SegmentIds(ids, ids)


def _prefix_segments(prefix: Prefix) -> splash.SegmentIds:
    """The kernel lets equal ids meet, so that queries without a prompt (-1) and padding keys (0) must differ."""

    def pad(ids: jax.Array, nothing: int) -> jax.Array:
        ids = jnp.where(ids > 0, ids, nothing)
        return jnp.pad(ids, ((0, 0), (0, _padded(ids.shape[1]) - ids.shape[1])), constant_values=nothing)

    return splash.SegmentIds(pad(prefix.query_segments, -1), pad(prefix.segments, 0))


def _padded(length: int) -> int:
    """To whole tiles: of the largest size that pads by no more than an eighth, else of the smallest."""
    options = [-(-length // block) * block for block in BLOCKS]
    return next((padded for padded in options if padded <= length * 1.125), options[-1])


def _tile(padded: int) -> int:
    return next(block for block in BLOCKS if padded % block == 0)


def partition(rows: int, heads: int, kv_heads: int, mesh: Mesh | None) -> tuple[PartitionSpec, int]:
    """(partition of [rows, heads, ...], copies of each kv head).

    What its axes do not divide lies whole. Where `tensor` is larger than the number of kv heads, these are copied.
    """
    if mesh is None:
        return PartitionSpec(None, None), 1
    copies = kv_repeats(heads, kv_heads, mesh.shape["tensor"])
    by_row = next(iter(cut_rows(rows, mesh)), None)
    return PartitionSpec(by_row, "tensor" if copies else None), copies or 1
