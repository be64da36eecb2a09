"""The parts of the model, and what of it is trained: what is not frozen, or adapters alone where there are any."""

from collections.abc import Sequence

import jax
from flax.nnx.traversals import flatten_mapping, unflatten_mapping

from rethinker_jax.models.qwen25vl import Params

PARTS = ("vision", "merger", "decoder")
LORA_SCALE = ("lora", "scale")  # a constant that lies among the parameters, not one of them


def part_of(path: tuple[str, ...]) -> str:
    """The part of the model that a parameter of the original belongs to: vision, merger or decoder."""
    if path[0] != "vision":
        return "decoder"
    return "merger" if path[1] == "merger" else "vision"


def split_params(params: Params, freeze: Sequence[str]) -> tuple[Params, Params]:
    """(trained, frozen): two nested dictionaries without empty branches. With adapters, nothing else is trained."""
    flat = flatten_mapping(params)

    def is_trained(path: tuple[str, ...]) -> bool:
        return path[0] == "lora" and path != LORA_SCALE if "lora" in params else part_of(path) not in freeze

    trained = {path: leaf for path, leaf in flat.items() if is_trained(path)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    return unflatten_mapping(trained), unflatten_mapping(frozen)


def join_params(trained: Params, frozen: Params) -> Params:
    return unflatten_mapping(flatten_mapping(trained) | flatten_mapping(frozen))


def count_parameters(params: Params, freeze: Sequence[str]) -> dict[str, int]:
    """Numbers of parameters of each part, of the adapters, in all, and trained; of arrays or shapes."""
    counts = dict.fromkeys((*PARTS, "adapters"), 0)
    for path, leaf in flatten_mapping(params).items():
        if path != LORA_SCALE:
            counts["adapters" if path[0] == "lora" else part_of(path)] += leaf.size
    trained = sum(leaf.size for leaf in jax.tree.leaves(split_params(params, freeze)[0]))
    return counts | {"total": sum(counts.values()), "trained": trained}
