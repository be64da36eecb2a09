"""Precision, stated in one place.

float32: everything in float32.

bfloat16: weights and activations in bfloat16, and with them the operands of every matrix product. In float32 are

    norms             mean, root and scale, rounded once at the end; the scales stay float32 parameters
    attention         scores as the product gives them, softmax; the weights are rounded before they meet the values
    rotary            positions, frequencies, angles, and the rotation, rounded once
    logits            as the product gives them, and all that follows: log-probs, losses, sampling
    training          parameters, gradients and moments; parameters are cast at the start of each forward pass

That is what the original does in bfloat16, but for four things in which this is tighter: it rounds norms before the
scale, scores before the softmax, the text's cosines and sines, and logits. Not covered: SiLU and GELU are bfloat16 here
and there.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rethinker_jax.errors import UserError

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def resolve_dtype(asked: str, checkpoint: str) -> Any:
    """The computation dtype: what the config asks for, or the checkpoint's."""
    name = checkpoint if asked == "auto" else asked
    if name not in DTYPES:
        raise UserError(
            f"model.dtype: wanted one of {', '.join(DTYPES)}, came {name!r}. Set model.dtype in the config."
        )
    return DTYPES[name]


def cast_params(params: Any, dtype: Any) -> Any:
    """Cast all but the norm scales to `dtype`."""

    def cast(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
        return value if path[-1].key == "scale" else value.astype(dtype)

    return params if dtype == jnp.float32 else jax.tree_util.tree_map_with_path(cast, params)
