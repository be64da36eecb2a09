"""Where arrays lie on a mesh, and that it changes nothing: eight simulated devices against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import Mesh, PartitionSpec

from rethinker_jax.config import MeshConfig
from rethinker_jax.errors import UserError
from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.models.qwen25vl import param_dims, param_shapes
from rethinker_jax.models.qwen_config import read_config
from rethinker_jax.models.sharding import AXES, SAMPLING_RULES, TRAINING_RULES, make_mesh, param_shardings

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    build_model_directory(directory)
    return directory


@pytest.fixture(scope="module")
def meshes(model_directory):
    clean = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    path = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
    done = subprocess.run(
        [sys.executable, "tests/two_meshes.py", str(model_directory)],
        cwd=REPOSITORY,
        env=clean | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_eight_devices_make_the_step_of_one(meshes):
    """Catches sums over shards that are taken twice or not at all, rows that are dropped where they do not divide (7 of
    8 are real), and a mean per shard."""
    assert meshes["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    eight, one = meshes["metrics"]
    assert one["gradient_norm"] > 0.1 and one["skipped_update"] == 0
    assert eight == pytest.approx(one, rel=1e-5, abs=1e-6)
    errors = {name: error for name, error in meshes["errors"].items() if "'key']['bias']" not in name}
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


def test_weights_and_moments_are_in_pieces(meshes):
    """Catches a mesh on which everything lies whole, which computes the same, eight times over; and moments, or new
    parameters, that lie elsewhere than the parameters did."""
    place = meshes["specs"]["before"]
    assert meshes["specs"]["params"] == place
    assert meshes["specs"]["moments"] == place
    assert place["['text']['embedding']"] == str(PartitionSpec("tensor", "fsdp"))
    whole = [name for name, spec in place.items() if "fsdp" not in spec and "tensor" not in spec]
    # Two of two kv heads and of two vision heads fit the tensor axis; patch pixels and norms of no known width do not.
    assert len(whole) < len(place) / 4, whole


def test_rows_lie_over_data_and_fsdp(meshes):
    """Catches positions cut along time, height, width; 7 rows on 4 shards lie whole everywhere."""
    rows, after_three = PartitionSpec(("data", "fsdp")), PartitionSpec(None, ("data", "fsdp"))
    assert meshes["rows"] == [str(spec) for spec in (rows, after_three, rows, PartitionSpec())]


@pytest.mark.parametrize(
    "case, training, sampling",
    [
        ("plain", ["fsdp", "tensor"], [None, "tensor"]),  # for sampling nothing lies over fsdp
        ("odd", [None, "tensor"], [None, "tensor"]),  # 3 does not divide by 2
        ("both odd", [None, None], [None, None]),
        ("twice", ["fsdp", None], [None, None]),  # one axis cannot cut two dimensions
        ("twice, first odd", [None, "fsdp"], [None, None]),  # a dimension that stays whole leaves the axis free
        ("unknown", [None, None], [None, None]),
    ],
)
def test_the_rule_table(meshes, case, training, sampling):
    assert meshes["rules"][case] == [training, sampling]


@pytest.mark.parametrize("rules", [TRAINING_RULES, SAMPLING_RULES])
def test_no_parameter_is_cut_twice_by_one_axis(model_directory, rules):
    """Every parameter's words through the table, on a mesh of ones, where every size divides. jax refuses a spec with
    an axis twice only when an array is placed."""
    config = read_config(model_directory)
    mesh = Mesh([[[jax.devices()[0]]]], AXES)
    shardings = jax.tree.leaves(param_shardings(param_dims(config), param_shapes(config), mesh, rules))
    assert len(shardings) == len(jax.tree.leaves(param_shapes(config)))
    for sharding in shardings:
        axes = [axis for axis in sharding.spec if axis is not None]
        assert len(set(axes)) == len(axes)
    used = {axis for sharding in shardings for axis in sharding.spec} - {None}
    assert used == set(rules.values())


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    """The message names the mesh and the number of devices. Catches jax's own error, or a mesh of some devices only."""
    count = jax.device_count()
    for config in (
        MeshConfig(data=count + 1, fsdp=1, tensor=1),
        MeshConfig(data=count + 1, fsdp=-1, tensor=1),
        MeshConfig(data=-1, fsdp=-1, tensor=count),
    ):
        with pytest.raises(
            UserError, match=rf"mesh data={config.data},fsdp={config.fsdp},tensor=.*the {count} visible"
        ):
            make_mesh(config)


def test_minus_one_takes_what_is_left():
    count = jax.device_count()
    assert dict(make_mesh(MeshConfig(data=1, fsdp=-1, tensor=1)).shape) == {"data": 1, "fsdp": count, "tensor": 1}
    assert dict(make_mesh(MeshConfig(data=-1, fsdp=1, tensor=count)).shape) == {"data": 1, "fsdp": 1, "tensor": count}
