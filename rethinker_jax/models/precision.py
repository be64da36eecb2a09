"""Precision, stated in one place.

float32: everything in float32. bfloat16: weights and activations in bfloat16; norms (with their scales), softmax,
rotary angles and logits in float32. Parameters that are trained are kept in float32 and cast at the start of each
forward pass.
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
