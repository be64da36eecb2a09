"""The small parts that the text decoder and the vision tower share.

Every parameter carries its dimension words (`dims`); the sharding rules and the weight table speak the same words.
A module built with `stack=L` holds L layers' parameters on a leading `layers` dimension; a layer is called on slices of
them, so the same module definition serves the scanned trainer and the unrolled sampler.

Einsum letters: B batch, S query position, T key position, N heads, K kv_heads, G group (N = K·G), H head_dim,
D d_model, F d_ff, V vocab; R vision rows, W windows, P patches of a window.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Remat = Literal["none", "dots", "full"]
Init = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def recomputed(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """The layer, of which the backward pass recomputes what `remat` says instead of keeping it.

    full: all but its input. dots: all but the results of products with weights, which are most of the time and, in an
    MLP, most of the memory. Scores of attention are recomputed in both.
    """
    if remat == "none":
        return layer
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(layer, policy=keep)


def normal_init(key: jax.Array, shape: tuple[int, ...], scale: float = 0.02) -> jax.Array:
    return scale * jax.random.normal(key, shape, jnp.float32)


def make_param(
    rngs: nnx.Rngs, shape: tuple[int, ...], dims: str, stack: int | None, fill: float | None = None
) -> nnx.Param:
    """A float32 parameter of `shape`, with dimension words `dims` (one per axis), stacked over `layers` if asked.

    `fill` is a constant (norm scales, biases); without it the values are normal with standard deviation 0.02.
    """
    names = tuple(dims.split())
    assert len(names) == len(shape), (names, shape)
    if stack is not None:
        names, shape = ("layers", *names), (stack, *shape)
    value = normal_init(rngs.params(), shape) if fill is None else jnp.full(shape, fill, jnp.float32)
    return nnx.Param(value, dims=names)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, all in float32, cast to the input's dtype at the end (the original casts before scaling)."""

    def __init__(self, size: int, dims: str, eps: float, rngs: nnx.Rngs, stack: int | None = None):
        self.scale = make_param(rngs, (size,), dims, stack, fill=1.0)
        self.eps = eps

    def __call__(self, x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
        # Rows flattened, as in Linear: XLA's CPU backend sums the scale's gradient several times as fast.
        wide = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...].astype(jnp.float32)).astype(x.dtype).reshape(x.shape)


class Linear(nnx.Module):
    """y = x · kernel + bias over the last dimension."""

    def __init__(self, sizes: tuple[int, int], dims: str, rngs: nnx.Rngs, stack: int | None = None, bias: bool = False):
        self.kernel = make_param(rngs, sizes, dims, stack)
        self.bias = make_param(rngs, sizes[1:], dims.split()[1], stack, fill=0.0) if bias else None

    def __call__(self, x: Float[Array, "... dim_in"]) -> Float[Array, "... dim_out"]:
        # Rows flattened: with one contracted dimension XLA's CPU backend makes the kernel's gradient twice as fast.
        y = x.reshape(-1, x.shape[-1]) @ self.kernel[...]
        y = y if self.bias is None else y + self.bias[...]
        return y.reshape(*x.shape[:-1], y.shape[-1])


class HeadsLinear(nnx.Module):
    """y[..., n, h] = x · kernel + bias: a projection into heads."""

    def __init__(self, sizes: tuple[int, int, int], dims: str, rngs: nnx.Rngs, stack: int | None = None):
        self.kernel = make_param(rngs, sizes, dims, stack)
        self.bias = make_param(rngs, sizes[1:], " ".join(dims.split()[1:]), stack, fill=0.0)

    def __call__(self, x: Float[Array, "... dim_in"]) -> Float[Array, "... heads head_dim"]:
        return jnp.einsum("...D,DNH->...NH", x, self.kernel[...]) + self.bias[...]


class GatedMlp(nnx.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, sizes: tuple[int, int], dims: tuple[str, str], rngs: nnx.Rngs, stack: int | None, bias: bool):
        into, out = " ".join(dims), " ".join(dims[::-1])
        self.gate = Linear(sizes, into, rngs, stack, bias)
        self.up = Linear(sizes, into, rngs, stack, bias)
        self.down = Linear(sizes[::-1], out, rngs, stack, bias)

    def __call__(self, x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
        rows = x.reshape(-1, x.shape[-1])
        return self.down(jax.nn.silu(self.gate(rows)) * self.up(rows)).reshape(x.shape)
