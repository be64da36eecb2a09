"""Accelerators by name: how many devices, how much memory, how fast memory and links are; and jax's view of them.

Names are jax's for TPU slices (`v5p:4x4x4`, chips along each side) and `h100:8` or `h100:2x8` (hosts x GPUs) for GPUs.
`v6e-64` and the like, a kind and a number, are the cloud's names of slices: there v5p counts cores, two a chip.
`v6e-64x2` is two such slices, as one job.

Figures are the makers', of one chip: docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e, /tpu7x (HBM and bidirectional
interconnect bandwidth, halved here for one way and divided by the number of links; data-centre network), NVIDIA's data
sheets of H100 SXM and H200 SXM (HBM, NVLink, halved; network: one 400 Gb/s adapter a GPU, as in DGX H100). Usable
memory of TPUs is what the compiler of libtpu 0.0.42 names when a program does not fit.
"""

import dataclasses
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from rethinker_jax.config_keys import nearest
from rethinker_jax.devices import PEAK_TFLOPS
from rethinker_jax.errors import UserError

GIB = 2**30
GPU_SHARE = 0.75  # of a GPU's memory, that jax takes unless XLA_CLIENT_MEM_FRACTION says otherwise
GPU_TARGET = Path(__file__).parent / "gpu_target.textproto"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device. Bytes and bytes per second of one device; `link`: one way of one link.

    sides: dimensions of a slice. wraps: a side closes to a ring where its length is a multiple of it.
    network: to other slices, or other hosts of GPUs.
    """

    kind: str  # as jax calls it; the key of devices.PEAK_TFLOPS begins it
    hbm_bytes: int
    hbm_bandwidth: float
    link: float
    network: float
    sides: int = 0
    wraps: int = 0
    devices_per_chip: int = 1

    @property
    def peak_flops(self) -> float:
        """Of dense bfloat16 products."""
        [peak, *_] = [peak for name, peak in PEAK_TFLOPS.items() if self.kind.startswith(name)]
        return peak * 1e12


CHIPS = {
    "v5e": Chip("TPU v5 lite", int(15.75 * GIB), 819e9, 50e9, 3.125e9, sides=2, wraps=16),
    "v5p": Chip("TPU v5", int(95.74 * GIB), 2765e9, 100e9, 6.25e9, sides=3, wraps=4),
    "v6e": Chip("TPU v6 lite", int(31.25 * GIB), 1638e9, 100e9, 12.5e9, sides=2, wraps=16),
    "tpu7x": Chip("TPU7x", int(94.75 * GIB), 3690e9, 50e9, 6.25e9, sides=3, wraps=4, devices_per_chip=2),
    "h100": Chip("NVIDIA H100", 84_929_347_584, 3352e9, 450e9, 50e9),
    "h200": Chip("NVIDIA H200", 143_771 * 2**20, 4800e9, 450e9, 50e9),
}
# Sides of the slices that the cloud sells by number of chips.
SLICES_2D = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
SLICES_3D = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
}  # fmt: skip
_NAME = re.compile(r"([a-z0-9]+)([:-])(\d+(?:x\d+)*)")


@dataclasses.dataclass(frozen=True)
class Machine:
    """A named set of devices. shape: chips along the sides of one slice, or (hosts, GPUs of a host)."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def is_gpu(self) -> bool:
        return not self.chip.sides

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices_per_chip

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def usable_bytes(self) -> int:
        """Of one device's memory, that programs may take."""
        if not self.is_gpu:
            return self.chip.hbm_bytes
        env = os.environ
        share = env.get("XLA_CLIENT_MEM_FRACTION") or env.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
        return int(self.chip.hbm_bytes * (float(share) if share else GPU_SHARE))


def names() -> str:
    """The names that there are, for messages."""
    return (
        "v5e:4x4 to v5e:16x16, v6e:2x2 to v6e:16x16, v5p:2x2x1 to v5p:8x8x8, tpu7x:2x2x1 to tpu7x:4x4x4 (chips along "
        "each side), the cloud's names such as v6e-64 or v5p-128 (of v5p, cores: two a chip), v6e-64x2 (two slices), "
        "h100:8, h200:8, h100:2x8 "
        "(hosts x GPUs)"
    )


def find_machine(name: str) -> Machine:
    """The machine of this name. Raises UserError for a name that is none."""
    wanted = f"--topology {name}: wanted one of {names()}"
    match = _NAME.fullmatch(name.lower().replace("v5litepod", "v5e"))
    if match is None:
        raise UserError(wanted)
    kind, joint, sizes = match.groups()
    if kind not in CHIPS:
        raise UserError(f"{wanted}; there is no {kind}{nearest(kind, CHIPS)}")
    chip, shape = CHIPS[kind], tuple(map(int, sizes.split("x")))
    slices = 1
    if joint == "-":
        if chip.sides and len(shape) == 2:
            shape, slices = shape[:1], shape[1]
        shape = _slice_of(name, kind, shape)
    elif not chip.sides:
        shape = (1, *shape) if len(shape) == 1 else shape
    if len(shape) != (chip.sides or 2) or min(*shape, slices) < 1:
        raise UserError(f"{wanted}; {kind} wants {chip.sides or 2} sizes, above 0, came {'x'.join(map(str, shape))}")
    called = f"{kind}:{'x'.join(map(str, shape))}" if slices == 1 else name.lower()
    return Machine(called, chip, shape, slices)


def _slice_of(name: str, kind: str, number: tuple[int, ...]) -> tuple[int, ...]:
    """The sides of a slice that is named by its size: v6e-64, and v5p-128, which is 64 chips."""
    unit, sides = {"v5e": (1, SLICES_2D), "v6e": (1, SLICES_2D), "v5p": (2, SLICES_3D)}.get(kind, (1, {}))
    of_size = {str(unit * chips): shape for chips, shape in sides.items()}
    size = "x".join(map(str, number))
    if size not in of_size:
        sold = ", ".join(f"{kind}-{known}" for known in of_size)
        example = {0: "8", 2: "4x4", 3: "4x4x4"}[CHIPS[kind].sides]
        raise UserError(f"--topology {name}: wanted {f'{sold}, or ' if sold else ''}sizes as in {kind}:{example}")
    return tuple(map(int, of_size[size].split("x")))


def devices_of(machine: Machine) -> list[jax.Device]:
    """jax's devices of a machine that is not there, for compiling. Raises UserError where what compiles is missing."""
    if machine.is_gpu:
        return _gpus(machine)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {machine.name}: programs for TPUs are compiled by libtpu, which is not installed. "
            'Install it: pip install "libtpu==0.0.42.*" (it needs no TPU; take the version that the TPUs will have).'
        )
    chips, kind = math.prod(machine.shape), re.split("[:-]", machine.name)[0]
    options: dict[str, Any] = {} if machine.slices == 1 else {"num_slices": machine.slices}
    if chips == 1:
        options["chips_per_host_bounds"] = (1,) * 3
    elif machine.chip.sides == 2 and chips == 8:
        options["chips_per_host_bounds"] = (*machine.shape, 1)
    name = f"{kind}:{'x'.join(map(str, machine.shape))}"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        said = str(error).partition("\n")[0]
        raise UserError(
            f"--topology {machine.name}: libtpu knows no such slice ({said}). There are {names()}."
        ) from error


def _gpus(machine: Machine) -> list[jax.Device]:
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        raise UserError(
            f"--topology {machine.name}: programs for NVIDIA GPUs are compiled by jax's CUDA plugin, which is not "
            f'installed. Install it: pip install "jax-cuda13-plugin=={jax.__version__}" '
            f'"jax-cuda13-pjrt=={jax.__version__}" nvidia-cudnn-cu13 (no GPU is needed).'
        )
    hosts, gpus = machine.shape
    chip = machine.chip
    target = GPU_TARGET.read_text(encoding="utf-8")
    for key, value in (("device_memory_size", chip.hbm_bytes), ("memory_bandwidth", int(chip.hbm_bandwidth))):
        target = re.sub(rf"{key}: \d+", f"{key}: {value}", target)
    target = target.replace("NVIDIA H100 80GB HBM3", chip.kind)
    found = topologies.get_topology_desc(
        topology_name="plan", platform="cuda", target_config=target, topology=f"1x{hosts}x{gpus}"
    )
    return list(found.devices)
