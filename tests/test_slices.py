"""Meshes over several TPU slices: what crosses the network between them. No TPU is needed.

The devices are stand-ins with the attributes that jax reads of a TPU, in a process without the suite's type checks.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parent.parent
STAND_INS = """
import dataclasses, json, sys
from rethinker_jax.config import MeshConfig
from rethinker_jax.errors import UserError
from rethinker_jax.models.sharding import make_mesh

@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    slice_index: int
    process_index: int
    coords: tuple[int, ...]
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0

def devices(platform, slices):
    # A slice of four: 2 x 2 chips, one process each slice. Their order is not that of the slices.
    kind = "TPU v5" if platform == "tpu" else "NVIDIA H100"
    found = [Device(4 * s + i, s, s, (i % 2, i // 2, 0), platform, kind) for i in range(4) for s in range(slices)]
    return found[::-1]

for platform, slices, sizes in json.loads(sys.argv[1]):
    try:
        mesh = make_mesh(MeshConfig(**sizes), devices(platform, slices))
    except UserError as error:
        print(json.dumps(str(error)))
        continue
    grid = [[device.slice_index for device in row.flat] for row in mesh.devices]
    print(json.dumps([list(mesh.devices.shape), grid]))
"""
BARE = {"data": 1, "fsdp": -1}
# (platform, slices of four devices, axes) → (data, fsdp, context, tensor) and the slices along `data`, or what is said.
MESHES: list[tuple[tuple[str, int, dict[str, int]], Any]] = [
    # A bare --mesh: data takes the slices, fsdp the devices of one.
    (("tpu", 2, BARE), [[2, 4, 1, 1], [[0] * 4, [1] * 4]]),
    (("tpu", 3, BARE), [[3, 4, 1, 1], [[0] * 4, [1] * 4, [2] * 4]]),
    (("tpu", 1, BARE), [[1, 4, 1, 1], [[0] * 4]]),
    (("tpu", 2, BARE | {"tensor": 2}), [[2, 2, 1, 2], [[0] * 4, [1] * 4]]),
    (("tpu", 2, {"data": 4, "fsdp": 1, "context": 2}), [[4, 1, 2, 1], [[0, 0], [0, 0], [1, 1], [1, 1]]]),
    (("tpu", 2, {"data": -1, "fsdp": 2}), [[4, 2, 1, 1], [[0, 0], [0, 0], [1, 1], [1, 1]]]),
    # fsdp over both slices would send every weight through the network, three times a micro-batch.
    (("tpu", 2, {"data": 1, "fsdp": 8}), "2 slices of 4 devices, * a multiple of 2, came 1. Try --mesh data=2,fsdp=4"),
    (("tpu", 2, {"data": 1, "fsdp": 4, "tensor": 2}), "came 1. Try --mesh data=2,fsdp=2,tensor=2"),
    (("tpu", 3, {"data": 2, "fsdp": 3, "tensor": 2}), "a multiple of 3, came 2. Try --mesh data=3,fsdp=2,tensor=2"),
    (("tpu", 2, {"data": 1, "fsdp": 1, "tensor": 8}), "came 1. Try --mesh data=2,fsdp=4"),
    (("tpu", 2, BARE | {"tensor": 3}), "multiply to the 8 visible device(s)"),
    # jax calls a host of GPUs a slice: there fsdp may span hosts, and the inner axes stay inside.
    (("gpu", 2, BARE), [[1, 8, 1, 1], [[0] * 4 + [1] * 4]]),
    (("gpu", 2, {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}), [[1, 2, 2, 2], [[0] * 4 + [1] * 4]]),
]  # fmt: skip


def run(script: str, *words: str, path: str = "", **environment: str) -> list[Any]:
    """What a script prints, line by line."""
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY}{path}", "JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_data_alone_crosses_slices():
    answers = run(STAND_INS, json.dumps([asked for asked, _ in MESHES]))
    for (asked, wanted), found in zip(MESHES, answers, strict=True):
        if isinstance(wanted, str):
            assert isinstance(found, str), asked
            assert all(part in found for part in wanted.split(" * ")), (asked, found)
        else:
            assert found == wanted, asked


# Gradients of layers, summed over micro-batches as in an update, for two slices of 2 x 2 chips that are not there.
COMPILED = """
import json, re
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from rethinker_jax.config import MeshConfig
from rethinker_jax.models.sharding import make_mesh

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1", num_slices=2).devices
mesh = make_mesh(MeshConfig(), devices)

def loss(weights, rows):
    rows, _ = jax.lax.scan(lambda rows, weight: (jnp.tanh(rows @ weight), None), rows, weights)
    return (rows**2).mean()

def step(weights, batches):
    def add(total, rows):
        return total + jax.grad(loss)(weights, rows), None
    total, _ = jax.lax.scan(add, jnp.zeros_like(weights), batches)
    return weights - total, jnp.linalg.norm(total)

def argument(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

weights = argument((4, 1024, 1024), None, "fsdp")
lowered = jax.jit(step, out_shardings=(weights.sharding, None)).lower(
    weights, argument((3, 64, 1024), None, ("data", "fsdp"))
)
for line in lowered.compile().as_text().splitlines():
    crossing = re.search(r'_xla_megascale_target="([^"]*)",_xla_megascale_transfer_type="([^"]*)"', line)
    inside = re.search(r" (all-[a-z]+|reduce-scatter|collective-permute)(?:-start)?[(].*replica_groups=([^ ]*), ", line)
    if crossing and " send(" in line:
        print(json.dumps(["between", crossing[2], crossing[1]]))
    elif inside:
        print(json.dumps(["inside", inside[1], inside[2]]))
"""
COMPILE_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
}  # fmt: skip


LIBTPU = importlib.util.find_spec("libtpu")


@pytest.mark.skipif(LIBTPU is None, reason="libtpu is not installed")
def test_of_a_compiled_step_only_sums_of_gradients_cross_slices():
    """A gather between slices would be one of weights, at every layer. Collectives inside name devices 0 to 3 alone."""
    assert LIBTPU is not None
    path = f":{Path(str(LIBTPU.origin)).parent.parent}"
    found = run(COMPILED, path=path, **COMPILE_ONLY)
    between = [line[1:] for line in found if line[0] == "between"]
    inside = [line[1:] for line in found if line[0] == "inside"]
    assert between and {kind for kind, _ in between} == {"ALL_REDUCE"}
    assert {kind for kind, _ in inside} >= {"all-gather"}
    assert {groups for _, groups in inside} == {"{{0,1,2,3}}"}
