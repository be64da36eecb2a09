"""The word after `--mesh`."""

import dataclasses
import re

from rethinker_jax.config import MeshConfig
from rethinker_jax.config_check import check_mesh
from rethinker_jax.config_keys import nearest
from rethinker_jax.errors import UserError

_AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))
_SPEC = re.compile(r"auto|[A-Za-z_]+=-?\d+(?:,[A-Za-z_]+=-?\d+)*")
ALL_ON_FSDP = MeshConfig(data=1, fsdp=-1, tensor=1)


def is_mesh_spec(word: str) -> bool:
    """Whether a word after a bare `--mesh` belongs to it: `auto`, or `name=int[,name=int...]`."""
    return _SPEC.fullmatch(word) is not None


def parse_mesh(spec: str) -> MeshConfig:
    """`data=2,fsdp=4` → sizes of the mesh axes; axes not named have size 1, -1 takes the devices that are left.

    An empty spec (`--mesh` alone) puts every device on fsdp.
    """
    if not spec:
        return ALL_ON_FSDP
    if spec == "auto":
        raise UserError(
            "--mesh auto: the search for a mesh is not there yet; name the axes, such as --mesh data=2,fsdp=4"
        )
    sizes: dict[str, int] = {}
    for part in spec.split(","):
        axis, _, size = part.partition("=")
        if axis not in _AXES:
            raise UserError(f"--mesh {spec}: {axis}: no such axis{nearest(axis, _AXES)} (axes: {', '.join(_AXES)})")
        if axis in sizes:
            raise UserError(f"--mesh {spec}: {axis} is given twice")
        if not re.fullmatch(r"-?\d+", size):
            raise UserError(f"--mesh {spec}: {axis}: wanted a whole number, came {size!r}")
        sizes[axis] = int(size)
    mesh = MeshConfig(**{axis: sizes.get(axis, 1) for axis in _AXES})
    if problems := check_mesh(mesh):
        raise UserError(f"--mesh {spec}: {'; '.join(problems)}")
    return mesh
