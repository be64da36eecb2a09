"""Whether a mesh divides the sizes of a model, said by the names of weights and axes, and which mesh would.

A dimension that its axis does not divide stays whole on every device (`models.sharding.spec_for`): nothing is wrong
with the numbers, but the memory that the axis was to save is not saved.
"""

import dataclasses
import math
from collections.abc import Iterable

from jax.sharding import Mesh

from rethinker_jax.config import MeshConfig
from rethinker_jax.device_bytes import Path, shard_bytes, stand_in, weights_of
from rethinker_jax.errors import UserError
from rethinker_jax.mesh_spec import mesh_words
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.models.sharding import TRAINING_RULES, spec_for
from rethinker_jax.planning.search import fits_heads, long_meshes, mesh_shapes

GIB = 2**30
TOLERATED = 0.01  # of the weights of a device, that may lie there for want of a cut
REPEATED = "kv_heads"  # the sampler repeats them on purpose where there are more devices


@dataclasses.dataclass(frozen=True)
class Uncut:
    """A dimension that not all of its axes cut. missing: these axes; extra: bytes that a device holds for it."""

    path: Path
    dim: str
    size: int
    missing: tuple[str, ...]
    extra: int


def uncut(qwen: QwenConfig, mesh: Mesh) -> list[Uncut]:
    """Of the training layout, the most bytes first."""
    found = []
    for path, weight in weights_of(qwen).items():
        held = shard_bytes(weight, mesh, TRAINING_RULES)
        spec = spec_for(weight.dims, weight.shape, mesh, TRAINING_RULES)
        # Of two dimensions that want one axis the first takes it: the weight is cut all the same.
        taken = {axis for cut in spec for axis in ((cut,) if isinstance(cut, str) else cut or ())}
        for dim, size in zip(weight.dims, weight.shape, strict=True):
            wanted = [axis for axis in TRAINING_RULES.get(dim, ()) if mesh.shape[axis] > 1]
            missing = tuple(axis for axis in wanted if axis not in taken)
            if missing and dim != REPEATED:
                kept = held // math.prod(mesh.shape[axis] for axis in missing)
                found.append(Uncut(path, dim, size, missing, held - kept))
    return sorted(found, key=lambda one: -one.extra)


def weight_bytes(qwen: QwenConfig, mesh: Mesh) -> int:
    """Of one device, float32."""
    return sum(shard_bytes(weight, mesh, TRAINING_RULES) for weight in weights_of(qwen).values())


def costly(qwen: QwenConfig, mesh: Mesh) -> list[Uncut]:
    """What stays whole, where that is worth a word: more than TOLERATED of a device's weights."""
    found = uncut(qwen, mesh)
    return found if sum(one.extra for one in found) > TOLERATED * weight_bytes(qwen, mesh) else []


def warning_of(qwen: QwenConfig, mesh: MeshConfig) -> str:
    """What the mesh leaves whole on every device, and the nearest one that would not; "" where that is little."""
    whole = stand_in(mesh)
    found = costly(qwen, whole)
    if not found:
        return ""
    first, held = found[0], weight_bytes(qwen, whole)
    axes = "·".join(first.missing)
    count = math.prod(whole.shape[axis] for axis in first.missing)
    cut = any(mesh.sizes[axis] > 1 and axis not in first.missing for axis in TRAINING_RULES[first.dim])
    others = len({one.path for one in found}) - 1
    also = f", nor {others} other weight{'s' * (others > 1)}" if others else ""
    return (
        f"mesh {mesh_words(mesh)}: {'.'.join(first.path)} is not cut{' further' * cut} over {axes}, as {count} does "
        f"not divide its {first.dim} of {first.size:,}{also}: a device holds {_gib(held)} of weights, of which "
        f"{_gib(min(held, sum(one.extra for one in found)))} could lie elsewhere. {_advice(qwen, mesh, held)}"
    )


def _advice(qwen: QwenConfig, mesh: MeshConfig, held: int) -> str:
    """Meshes that divide the model: of as many devices, or of other numbers."""
    count = math.prod(mesh.sizes.values())
    if (near := _nearest(qwen, mesh, count, held)) is not None:
        return f"--mesh {mesh_words(near)} would cut all of it."
    fewer = next((n for n in range(count - 1, 1, -1) if _nearest(qwen, mesh, n, held) is not None), 0)
    more = next((n for n in range(count + 1, 2 * count + 1) if _nearest(qwen, mesh, n, held) is not None), 0)
    counts = " or ".join(str(n) for n in (fewer, more) if n)
    return f"No mesh of {count} devices cuts it{f'; one of {counts} devices would' if counts else ''}."


def _nearest(qwen: QwenConfig, mesh: MeshConfig, count: int, held: int) -> MeshConfig | None:
    """Of `count` devices, the mesh most like this one that cuts everything and leaves less than `held` on a device."""
    shapes = mesh_shapes(count, qwen, context=mesh.context) or mesh_shapes(count, qwen)
    for one in sorted(shapes, key=lambda shape: _distance(mesh, shape)):
        whole = stand_in(one)
        if weight_bytes(qwen, whole) < held and not costly(qwen, whole):
            return one
    return None


def _distance(one: MeshConfig, other: MeshConfig) -> float:
    """How much larger or smaller the axes are, all together, in doublings."""
    pairs = zip(one.sizes.values(), other.sizes.values(), strict=True)
    return sum(abs(math.log2(here / there)) for here, there in pairs)


def check_heads(qwen: QwenConfig, mesh: MeshConfig) -> None:
    """Raises UserError where inside attention not every device would have heads of its own."""
    if fits_heads(qwen, mesh.tensor, mesh.context):
        return
    count = math.prod(mesh.sizes.values())
    sizes = [size for size in range(1, max(1, qwen.heads // mesh.tensor) + 1) if fits_heads(qwen, mesh.tensor, size)]
    near = min(long_meshes(count, qwen) or mesh_shapes(count, qwen), key=lambda one: _distance(mesh, one))
    raise UserError(
        f"mesh {mesh_words(mesh)}: inside attention heads lie over tensor·context = {mesh.tensor}·{mesh.context}, "
        f"which does not divide the model's {qwen.heads} heads, or not its {qwen.kv_heads} kv heads repeated. With "
        f"tensor={mesh.tensor} context may be {_listed(sizes)}; {count} devices could be --mesh {mesh_words(near)}."
    )


def _listed(sizes: Iterable[int]) -> str:
    *first, last = map(str, sizes)
    return f"{', '.join(first)} or {last}" if first else last


def _gib(number: int) -> str:
    return f"{number / GIB:.1f} GiB" if number >= GIB / 10 else f"{number / 2**20:.1f} MiB"
