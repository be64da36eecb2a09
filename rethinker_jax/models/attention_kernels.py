"""The implementations of attention, and the switch between them.

    attention = choose_attention("auto", config, dtype, mesh)
    context = attention(query, key, value, Mask(causal=True, lengths=lengths))

All compute what `attention.attend` defines, softmax in float32, and give zeros where a query is padding:

plain    `attend` itself, by XLA. Everywhere; holds [heads, seq, seq] scores.
cudnn    NVIDIA's fused kernel, through `jax.nn.dot_product_attention`. Causal rows and windows go by their lengths;
         segments become a bias of [seq, seq], shared by the heads.
splash   the Pallas kernel that comes with jax, on TPUs. Windows of an image are smaller than its tiles and go plain.

The decode loop has one query against two caches and no use for tiles: `sampling/decode.py` keeps its own sum.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from rethinker_jax.errors import UserError
from rethinker_jax.models.attention import Mask, Prefix, attend
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.models.sharding import ROWS

LANES = 128  # of a TPU's registers: tiles of keys and head dimensions are multiples
BLOCKS = (512, 256, 128)  # tile sizes of the splash kernel, queries and keys alike; 512 fits v5e, v5p and v6e

Name = Literal["plain", "cudnn", "splash"]


@dataclasses.dataclass(frozen=True)
class Attention:
    """One implementation. Hashable, a part of `Model`.

    mesh: where XLA cannot cut a kernel into shards by itself (splash), the mesh over which we do; None = one device.
    interpret: run the splash kernel as ordinary operations, where there is no TPU.
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
        if prefix is not None:
            context = attend_behind(query, key, value, mask, prefix)
        elif self.name == "cudnn":
            context = attend_cudnn(query, key, value, mask)
        elif self.name == "splash" and (mask.causal or mask.segments is not None):
            context = attend_splash(query, key, value, mask, self.mesh, self.interpret)
        else:
            context = attend(query, key, value, mask.dense(seq))
        # Padding gets nothing and, in the backward pass, gives nothing.
        return jnp.where(mask.real(seq)[..., None, None], context, 0)


PLAIN = Attention()


def choose_attention(asked: str, config: QwenConfig, dtype: Any, mesh: Mesh) -> Attention:
    """What `model.attention` asks for, on the devices of `mesh`. Raises UserError for a kernel that cannot be used."""
    head_dims = config.head_dim, config.vision.head_dim
    name = choose_name(asked, _platform(mesh.devices.flat[0]), dtype, head_dims)
    return Attention(name, mesh if name == "splash" else None)


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
    """Attention to a prefix and to the row's own keys, by `attend`."""
    keys, values = (jnp.concatenate(pair, axis=-3) for pair in ((prefix.key, key), (prefix.value, value)))
    return attend(query, keys, values, jnp.concatenate([prefix.dense(), mask.dense(query.shape[-3])], axis=-1))


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


def attend_splash(
    query: Float[Array, "rows seq heads head_dim"],
    key: Float[Array, "rows seq kv_heads head_dim"],
    value: Float[Array, "rows seq kv_heads head_dim"],
    mask: Mask,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Float[Array, "rows seq heads head_dim"]:
    """By the splash kernel: rows over `data` and `fsdp`, heads over `tensor`, where these divide them.

    Sequences are padded to whole tiles and heads to whole lanes. Lengths alone need no mask under causality, because
    what is real comes first; in full attention they are a segment.
    """
    rows, seq, heads, head_dim = query.shape
    block, padded = _tiles(seq)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    segments = []
    if mask.segments is not None or not mask.causal:
        ids = jnp.where(mask.real(seq), 1 if mask.segments is None else mask.segments, 0)
        segments = [jnp.pad(jnp.broadcast_to(ids, (rows, seq)), ((0, 0), (0, padded - seq)))]
    one = splash_mask.CausalMask if mask.causal else splash_mask.FullMask
    spec, copies = _partition(rows, heads, key.shape[2], mesh)

    def run(query: jax.Array, key: jax.Array, value: jax.Array, *segments: jax.Array) -> jax.Array:
        kernel = splash.make_splash_mha(
            splash_mask.MultiHeadMask([one((padded, padded))] * query.shape[1]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        ids = [splash.SegmentIds(row, row) for row in segments]
        return jax.vmap(kernel)(query, key, value, *ids)

    def lay_out(x: jax.Array) -> jax.Array:
        """[rows, heads, padded, lanes]"""
        x = jnp.pad(x, ((0, 0), (0, padded - seq), (0, 0), (0, -head_dim % LANES)))
        return x.swapaxes(1, 2)

    # The kernel does not scale its scores.
    scaled = (query.astype(jnp.float32) * head_dim**-0.5).astype(query.dtype)
    heads_first = [lay_out(scaled), *(lay_out(jnp.repeat(x, copies, axis=2)) for x in (key, value))]
    if mesh is not None:
        specs = (spec, spec, spec, *[PartitionSpec(spec[0])] * len(segments))
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return run(*heads_first, *segments).swapaxes(1, 2)[:, :seq, :, :head_dim]


def _tiles(seq: int) -> tuple[int, int]:
    """(tile size, padded length): the largest tile that pads by no more than an eighth, else the smallest."""
    options = [(block, -(-seq // block) * block) for block in BLOCKS]
    return next((option for option in options if option[1] <= seq * 1.125), options[-1])


def _partition(rows: int, heads: int, kv_heads: int, mesh: Mesh | None) -> tuple[PartitionSpec, int]:
    """(partition of [rows, heads, ...], copies of each kv head).

    What its axes do not divide lies whole. Where `tensor` is larger than the number of kv heads, these are copied.
    """
    if mesh is None:
        return PartitionSpec(None, None), 1
    shards, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    copies = math.lcm(kv_heads, tensor) // kv_heads
    fits = heads % (kv_heads * copies) == 0
    return PartitionSpec(ROWS[0] if rows % shards == 0 else None, "tensor" if fits else None), copies if fits else 1
