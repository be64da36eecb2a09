"""The word after `--mesh`."""

import dataclasses
import re

from rethinker_jax.config import MeshConfig
from rethinker_jax.config_check import check_mesh
from rethinker_jax.config_keys import nearest
from rethinker_jax.errors import UserError

AUTO = "auto"
_AXES = tuple(MeshConfig().sizes)
_PART = r"[A-Za-z_]+=-?\d+"
_SPEC = re.compile(rf"(?:{AUTO}|{_PART})(?:,(?:{AUTO}|{_PART}))*")
ALL_ON_FSDP = MeshConfig(data=1, fsdp=-1, context=1, tensor=1)


def is_mesh_spec(word: str) -> bool:
    """Whether a word after a bare `--mesh` belongs to it: `auto`, or `name=int[,name=int...]`."""
    return _SPEC.fullmatch(word) is not None


def parse_mesh(spec: str) -> MeshConfig:
    """`data=2,fsdp=4` → sizes of the mesh axes; axes not named have size 1, -1 takes the devices that are left.

    An empty spec (`--mesh` alone) puts every device on fsdp; `auto` asks for a search.
    """
    if not spec:
        return ALL_ON_FSDP
    if spec == AUTO:
        return MeshConfig(search=True)
    sizes: dict[str, int] = {}
    for part in spec.split(","):
        if part == AUTO:
            raise UserError(f"--mesh {spec}: auto finds the sizes of all axes; wanted it alone, or sizes without it")
        axis, _, size = part.partition("=")
        if axis not in _AXES:
            raise UserError(f"--mesh {spec}: {axis}: no such axis{nearest(axis, _AXES)} (axes: {', '.join(_AXES)})")
        if axis in sizes:
            raise UserError(f"--mesh {spec}: {axis} is given twice")
        if not re.fullmatch(r"-?\d+", size):
            raise UserError(f"--mesh {spec}: {axis}: wanted a whole number, came {size!r}")
        sizes[axis] = int(size)
    mesh = dataclasses.replace(ALL_ON_FSDP, fsdp=1).with_sizes(sizes)
    if problems := check_mesh(mesh):
        raise UserError(f"--mesh {spec}: {'; '.join(problems)}")
    return mesh


def mesh_words(mesh: MeshConfig) -> str:
    """As `--mesh` takes it: axes of one device are not named, but for fsdp."""
    if mesh.search:
        return AUTO
    return ",".join(f"{axis}={size}" for axis, size in mesh.sizes.items() if size != 1 or axis == "fsdp")


def mesh_overrides(mesh: MeshConfig) -> list[str]:
    """The keys of the config that `--mesh` sets: all of the section."""
    sizes = [f"mesh.{axis}={size}" for axis, size in mesh.sizes.items()]
    return [*sizes, f"mesh.search={str(mesh.search).lower()}"]
