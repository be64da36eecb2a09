"""Optimizer state that lies in host memory between steps: where it lies, and how a jitted step passes over it.

The step's `out_shardings` must name host memory too. Where it donates the state, results must have the order of what is
donated, or every argument a place: jax 0.10 otherwise pairs both by shape alone and gives host memory to a result of
the device, which ends the process.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

HOST = "pinned_host"  # the memory that devices copy from and to by themselves


def host_shardings(shardings: Any) -> Any:
    """The same cuts over the same devices, in the memory of their hosts. A tree of shardings, or one."""
    return jax.tree.map(lambda sharding: sharding.with_memory_kind(HOST), shardings)


def is_on_host(leaf: jax.Array) -> bool:
    """Whether an array, traced or not, lies in host memory, where nothing can be computed with it."""
    return jax.typeof(leaf).memory_space == jax.memory.Space.Host


def leaf_by_leaf(
    function: Callable[[Any, Any], tuple[Any, Any]], leaves: Sequence[Any], parked: Sequence[Any], after: Any
) -> tuple[list[Any], list[Any]]:
    """`function(leaf, parked)` → (result, new parked) for each leaf in turn; what is parked lies in host memory.

    Under jit. It is on the device only while its leaf is at work: a fetch waits until what the leaf before it parked
    has arrived, and the first one waits for `after`, such as whether the gradient is finite. Without these barriers the
    compiler fetches everything at once, and early: during the backward pass, which needs the room.
    """
    results, new_parked = [], []
    for leaf, old in zip(leaves, parked, strict=True):
        waited, _ = jax.lax.optimization_barrier((old, after))
        # Result and new value at once: else the inputs of both stay until the result is asked for.
        result, new = jax.lax.optimization_barrier(function(leaf, jax.device_put(waited, jax.memory.Space.Device)))
        after = jax.device_put(new, jax.memory.Space.Host)
        results.append(result)
        new_parked.append(after)
    return results, new_parked
