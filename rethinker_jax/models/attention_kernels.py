"""The implementations of attention, and the switch between them.

    attention = choose_attention("auto", config, dtype, mesh)
    context = attention(query, key, value, Mask(causal=True, lengths=lengths))

All compute what `attention.attend` defines, softmax in float32, and give zeros where a query is padding:

plain    `attend` itself, by XLA. Everywhere; holds [heads, seq, seq] scores, or a block of them behind a prefix.
cudnn    NVIDIA's fused kernel, through `jax.nn.dot_product_attention`. Causal rows and windows go by their lengths;
         segments and prefixes become a bias of [seq, keys], shared by the heads.
splash   the Pallas kernel that comes with jax, on TPUs (`splash.py`). Windows of an image are smaller than its tiles
         and go plain.

The decode loop has one query against two caches and no use for tiles: `sampling/decode.py` keeps its own sum.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from rethinker_jax.errors import UserError
from rethinker_jax.models.attention import Mask, Prefix, attend
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.models.splash import attend_splash, partition

WHOLE = 2**18  # scores of a head and row that are held at once, 1 MiB; more go in blocks of queries
BLOCK = 128  # queries

Name = Literal["plain", "cudnn", "splash"]


@dataclasses.dataclass(frozen=True)
class Attention:
    """One implementation. Hashable, a part of `Model`.

    mesh: XLA cannot cut a kernel into shards by itself; the mesh over which we do; None = one device.
    interpret: run the kernel as ordinary operations, where its hardware is not there.
    """

    name: Name = "plain"
    mesh: Mesh | None = None
    interpret: bool = False

    def __call__(
        self,
        query: Float[Array, "*rows seq heads head_dim"],
        key: Float[Array, "*rows seq kv_heads head_dim"],
        value: Float[Array, "*rows seq kv_heads head_dim"],
        mask: Mask,
        prefix: Prefix | None = None,
    ) -> Float[Array, "*rows seq heads head_dim"]:
        """Attention inside the rows by `mask`, and to the keys of a `prefix`, under one softmax."""
        seq = query.shape[-3]
        if self.name == "cudnn":
            context = self._by_cudnn(query, key, value, mask, prefix)
        elif self.name == "splash" and (mask.causal or mask.segments is not None or prefix is not None):
            context = attend_splash(query, key, value, mask, prefix, self.mesh, self.interpret)
        elif prefix is not None:
            context = attend_behind(query, key, value, mask, prefix)
        else:
            context = attend(query, key, value, mask.dense(seq))
        # Padding gets nothing and, in the backward pass, gives nothing.
        return jnp.where(mask.real(seq)[..., None, None], context, 0)

    def _by_cudnn(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, prefix: Prefix | None
    ) -> jax.Array:
        """Rows over `data` and `fsdp`, heads over `tensor`, where these divide them; jax cuts the call in no other way
        than queries, keys and values lie, and those may lie differently."""
        way: Literal["cudnn", "xla"] = "xla" if self.interpret else "cudnn"

        def run(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, prefix: Prefix | None) -> jax.Array:
            if prefix is None:
                return attend_cudnn(query, key, value, mask, way)
            return attend_cudnn_behind(query, key, value, mask, prefix, way)

        if self.mesh is None:
            return run(query, key, value, mask, prefix)
        spec, copies = partition(query.shape[0], query.shape[-2], key.shape[-2], self.mesh)

        def repeated(x: jax.Array) -> jax.Array:
            return jnp.repeat(x, copies, axis=-2) if copies > 1 else x

        key, value = repeated(key), repeated(value)
        by_row = PartitionSpec(spec[0])
        by_head = PartitionSpec(spec[0], *[None] * (query.ndim - 3), spec[1])
        of_prefix = None
        if prefix is not None:
            prefix = dataclasses.replace(prefix, key=repeated(prefix.key), value=repeated(prefix.value))
            of_prefix = Prefix(by_head, by_head, by_row, by_row)
        shards = jax.shard_map(
            run,
            mesh=self.mesh,
            in_specs=(by_head, by_head, by_head, jax.tree.map(lambda _: by_row, mask), of_prefix),
            out_specs=by_head,
            check_vma=False,
        )
        return shards(query, key, value, mask, prefix)


PLAIN = Attention()


def choose_attention(asked: str, config: QwenConfig, dtype: Any, mesh: Mesh) -> Attention:
    """What `model.attention` asks for, on the devices of `mesh`. Raises UserError for a kernel that cannot be used."""
    head_dims = config.head_dim, config.vision.head_dim
    name = choose_name(asked, _platform(mesh.devices.flat[0]), dtype, head_dims)
    return Attention(name, None if name == "plain" or mesh.size == 1 else mesh)


def _platform(device: jax.Device) -> str:
    """tpu, cpu, or gpu; an NVIDIA GPU whose generation has no fused attention says so."""
    if device.platform != "gpu":
        return device.platform
    capability = getattr(device, "compute_capability", "")  # of NVIDIA's devices alone
    new_enough = capability.partition(".")[0].isdigit() and float(capability) >= 8.0
    return "gpu" if new_enough else f"GPUs of {device.device_kind} (compute capability {capability or 'unknown'})"


def choose_name(asked: str, platform: str, dtype: Any, head_dims: tuple[int, ...]) -> Name:
    """The implementation that is asked for; `auto` takes the platform's kernel where it can compute this model.

    Raises UserError where what is asked for cannot be used, saying why.
    """
    obstacles: dict[Name, str] = {
        "splash": "" if platform == "tpu" else f"it is a kernel for TPUs, and the devices are {platform}",
        "cudnn": _obstacle_to_cudnn(platform, dtype, head_dims),
        "plain": "",
    }
    for name, obstacle in obstacles.items():
        if asked == name and obstacle:
            raise UserError(
                f"model.attention: wanted {asked}, but {obstacle}. Set model.attention=auto, or plain, which is always "
                "possible."
            )
        if asked == name or (asked == "auto" and not obstacle):
            return name
    raise UserError(f"model.attention: wanted auto, {', '.join(obstacles)}, came {asked!r}.")


def _obstacle_to_cudnn(platform: str, dtype: Any, head_dims: tuple[int, ...]) -> str:
    if platform not in ("gpu", "cuda"):
        return f"it is a kernel for NVIDIA GPUs from compute capability 8.0 on, and the devices are {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in 16 bits, and the model in {jnp.dtype(dtype).name} (model.dtype)"
    wrong = [size for size in head_dims if size > 128 or size % 8]
    return f"it wants heads of 128 at most, a multiple of 8, and the model has heads of {wrong[0]}" if wrong else ""


def attend_behind(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, prefix: Prefix
) -> Float[Array, "*rows seq heads head_dim"]:
    """Attention to a prefix and to the row's own keys, by `attend`; long rows in blocks, whose scores are not kept."""
    keys, values, seen = _behind(key, value, mask, prefix)
    way = attend if seen.shape[-2] * seen.shape[-1] <= WHOLE else attend_in_blocks
    return way(query, keys, values, seen)


def _behind(
    key: jax.Array, value: jax.Array, mask: Mask, prefix: Prefix
) -> tuple[jax.Array, jax.Array, Bool[Array, "*rows seq keys"]]:
    """Keys, values, and which of them a query sees: those of the prefix, then its row's own."""
    *rows, seq, _, _ = key.shape
    own = jnp.broadcast_to(mask.dense(seq), (*rows, seq, seq))
    keys, values = (jnp.concatenate(pair, axis=-3) for pair in ((prefix.key, key), (prefix.value, value)))
    return keys, values, jnp.concatenate([prefix.dense(), own], axis=-1)


def attend_in_blocks(
    query: Float[Array, "*rows seq heads head_dim"],
    key: Float[Array, "*rows keys kv_heads head_dim"],
    value: Float[Array, "*rows keys kv_heads head_dim"],
    mask: Bool[Array, "*rows seq keys"],
) -> Float[Array, "*rows seq heads head_dim"]:
    """`attend`, one block of queries after the other. The backward pass computes a block's scores again.

    Every block meets all keys, though under causality the early ones need few: blocks of many sizes make no loop, and
    unrolled they are all held at the same time.
    """
    *rows, seq, heads, head_dim = query.shape

    def cut(x: jax.Array, axis: int) -> jax.Array:
        """[blocks, *rows, BLOCK, ...]"""
        widths = [(0, -seq % BLOCK if n == axis else 0) for n in range(x.ndim)]
        return jnp.moveaxis(jnp.pad(x, widths).reshape(*rows, -1, BLOCK, *x.shape[axis + 1 :]), axis, 0)

    blocks = cut(query, len(rows)), cut(mask, len(rows))
    context = jax.lax.map(jax.checkpoint(lambda block: attend(block[0], key, value, block[1])), blocks)
    return jnp.moveaxis(context, 0, len(rows)).reshape(*rows, -1, heads, head_dim)[..., :seq, :, :]


def attend_cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, implementation: Literal["cudnn", "xla"] = "cudnn"
) -> jax.Array:
    """By `jax.nn.dot_product_attention`; its `xla` takes the same arguments, so that they can be tested anywhere."""
    seq = query.shape[-3]
    # A softmax over nothing is NaN: rows without a token get one, and the switch takes the result away.
    lengths = None if mask.lengths is None else jnp.maximum(mask.lengths, 1).astype(jnp.int32).reshape(-1)
    segments = mask.segments
    if segments is not None:  # padding sees padding, for the same reason
        segments = (segments[..., :, None] == segments[..., None, :]).reshape(-1, 1, seq, seq)
    context = jax.nn.dot_product_attention(
        *(x.reshape(-1, *x.shape[-3:]) for x in (query, key, value)),
        mask=segments,
        is_causal=mask.causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return context.reshape(query.shape)


def attend_cudnn_behind(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    prefix: Prefix,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """`attend_cudnn` to a prefix and to the row's own keys. What is seen is a bias of [rows, seq, prefix + seq]."""
    keys, values, seen = _behind(key, value, mask, prefix)
    seq, num_keys = seen.shape[-2:]
    # Padding sees itself, since a softmax over nothing may be NaN. With a bias, the kernel's lengths must be even.
    seen = seen | jnp.eye(seq, num_keys, num_keys - seq, dtype=bool)
    context = jax.nn.dot_product_attention(
        *(_to_even(x.reshape(-1, *x.shape[-3:]), 1) for x in (query, keys, values)),
        mask=_to_even(_to_even(seen.reshape(-1, 1, seq, num_keys), 3), 2, True),
        implementation=implementation,
    )
    return context[:, :seq].reshape(query.shape)


def _to_even(x: jax.Array, axis: int, fill: bool = False) -> jax.Array:
    widths = [(0, size % 2 if n == axis else 0) for n, size in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=fill)
