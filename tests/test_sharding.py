"""Where arrays lie on a mesh, and that it changes nothing: eight simulated devices against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from rethinker_jax.config import MeshConfig
from rethinker_jax.errors import UserError
from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.models.qwen25vl import param_dims, param_shapes
from rethinker_jax.models.qwen_config import read_config
from rethinker_jax.models.sharding import (
    AXES,
    ROWS,
    SAMPLING_RULES,
    TRAINING_RULES,
    make_mesh,
    param_shardings,
    spec_for,
)  # fmt: skip

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    build_model_directory(directory)
    return directory


MESHES = ("data=2,fsdp=2,tensor=2", "fsdp=2,context=2,tensor=2", "data=2,context=4")


@pytest.fixture(scope="module", params=MESHES)
def meshes(request, model_directory):
    clean = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    path = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
    done = subprocess.run(
        [sys.executable, "tests/two_meshes.py", str(model_directory), request.param],
        cwd=REPOSITORY,
        env=clean | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Involuntary full rematerialization" not in done.stderr
    return {"asked": request.param} | json.loads(done.stdout.splitlines()[-1])


def test_eight_devices_make_the_step_of_one(meshes):
    """Catches sums over shards that are taken twice or not at all, rows that are dropped where they do not divide (7 of
    8 are real), a mean per shard; under `context` heads in another order, and padding that is attended to. (XLA says
    on stderr where it makes an array whole on every device because it knows no other way.)"""
    sizes = dict(part.split("=") for part in meshes["asked"].split(","))
    assert meshes["mesh"] == {axis: int(sizes.get(axis, 1)) for axis in AXES}
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
    columns = ("fsdp", "context") if "context" in meshes["asked"] else "fsdp"
    assert place["['text']['embedding']"] == str(PartitionSpec("tensor", columns))
    whole = [name for name, spec in place.items() if "fsdp" not in spec and "tensor" not in spec]
    # Two of two kv heads and of two vision heads fit the tensor axis; patch pixels and norms of no known width do not.
    assert len(whole) < len(place) / 4, whole


def test_rows_lie_over_the_axes_that_divide_them(meshes):
    """Catches positions cut along time, height, width; 7 rows on 4 parts lie whole everywhere, 8 over all of them."""
    shards, after_three = PartitionSpec(("data", "fsdp")), PartitionSpec(None, ("data", "fsdp"))
    rows = ROWS if "context" in meshes["asked"] else shards
    found = [spec.replace(", 'context'", "") if rows is shards else spec for spec in meshes["rows"]]
    assert found == [str(spec) for spec in (shards, after_three, rows, PartitionSpec())]


BOTH = ("fsdp", "context")


@pytest.mark.parametrize(
    "words, shape, sizes, training, sampling",
    [
        (("d_model", "d_ff"), (4, 4), (2, 2, 1, 2), ("fsdp", "tensor"), (None, "tensor")),  # nothing over fsdp: sampler
        (("d_model", "d_ff"), (3, 4), (2, 2, 1, 2), (None, "tensor"), (None, "tensor")),  # 3 does not divide by 2
        (("vocab", "d_ff"), (5, 7), (2, 2, 1, 2), (None, None), (None, None)),
        (("merged", "d_model"), (4, 4), (2, 2, 1, 2), ("fsdp", None), (None, None)),  # one axis, two dimensions
        (("merged", "d_model"), (3, 4), (2, 2, 1, 2), (None, "fsdp"), (None, None)),  # what stays whole leaves it free
        (("layers", "head_dim"), (4, 4), (2, 2, 1, 2), (None, None), (None, None)),
        (("d_model", "d_ff"), (4, 4), (1, 2, 2, 2), (BOTH, "tensor"), (None, "tensor")),
        (("d_model", "d_ff"), (6, 4), (1, 2, 2, 2), ("fsdp", "tensor"), (None, "tensor")),  # 6 divides by 2, not by 4
        (("d_model", "d_ff"), (4, 4), (1, 1, 2, 4), (BOTH, "tensor"), (None, "tensor")),
    ],
)
def test_the_rule_table(words, shape, sizes, training, sampling):
    """Catches a dimension cut by an axis that does not divide it, and an axis taken twice."""
    mesh = Mesh(np.full(sizes, jax.devices()[0]), AXES)
    assert spec_for(words, shape, mesh, TRAINING_RULES) == PartitionSpec(*training)
    assert spec_for(words, shape, mesh, SAMPLING_RULES) == PartitionSpec(*sampling)


@pytest.mark.parametrize("rules", [TRAINING_RULES, SAMPLING_RULES])
def test_no_parameter_is_cut_twice_by_one_axis(model_directory, rules):
    """Every parameter's words through the table, on a mesh of ones, where every size divides. jax refuses a spec with
    an axis twice only when an array is placed."""
    config = read_config(model_directory)
    mesh = Mesh([[[[jax.devices()[0]]]]], AXES)
    shardings = jax.tree.leaves(param_shardings(param_dims(config), param_shapes(config), mesh, rules))
    assert len(shardings) == len(jax.tree.leaves(param_shapes(config)))
    for sharding in shardings:
        axes = [axis for axis in sharding.spec if axis is not None]
        assert len(set(axes)) == len(axes)
    used = {axis for sharding in shardings for axis in sharding.spec} - {None}
    assert used == {axes[0] for axes in rules.values()}


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    """The message names the mesh and the number of devices. Catches jax's own error, or a mesh of some devices only."""
    count = jax.device_count()
    for config in (
        MeshConfig(data=count + 1, fsdp=1, tensor=1),
        MeshConfig(data=count + 1, fsdp=-1, tensor=1),
        MeshConfig(data=-1, fsdp=-1, tensor=count),
    ):
        with pytest.raises(
            UserError, match=rf"mesh data={config.data},fsdp={config.fsdp},context=1,tensor=.*the {count} visible"
        ):
            make_mesh(config)


@pytest.mark.parametrize("axis", AXES)
def test_minus_one_takes_what_is_left(axis):
    count, ones = jax.device_count(), dict.fromkeys(AXES, 1)
    assert dict(make_mesh(MeshConfig().with_sizes(ones | {axis: -1})).shape) == ones | {axis: count}
