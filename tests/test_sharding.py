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
from rethinker_jax.models.sharding import AXES, SAMPLING_RULES, TRAINING_RULES, make_mesh, param_shardings, spec_for

# One step on data=2,fsdp=2,tensor=2, and the same on one of the devices. The leaves that are compared are Adam's first
# moments, 0.1 of the clipped gradient: parameters would hide an error behind the small learning rate.
TWO_MESHES = """
import dataclasses, json, sys
import jax, numpy as np, optax
from jax.sharding import AxisType, Mesh
from rethinker_jax.config import Config, DataConfig, LossConfig, MeshConfig, ModelConfig, OptimizerConfig
from rethinker_jax.models.qwen25vl import param_dims
from rethinker_jax.models.sharding import AXES, SAMPLING_RULES, TRAINING_RULES, place_rows, spec_for
from rethinker_jax.system import load_system, make_updater, training_shardings
from rethinker_jax.training.batch import TrainRow, pack_rows
from rethinker_jax.types import Problem
from test_update import png

jax.config.update("jax_disable_most_optimizations", True)
assert jax.device_count() == 8
config = Config(
    model=ModelConfig(path=sys.argv[1], init="random", dtype="float32"),
    mesh=MeshConfig(data=2, fsdp=-1, tensor=2),
    data=DataConfig(prompt_template="none"),
    optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0),
)
eight = load_system(config)
alone = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)
params = jax.device_put(jax.device_get(eight.params), training_shardings(eight.model.config, alone))
one = dataclasses.replace(eight, mesh=alone, params=params)

rng = np.random.default_rng(0)
images = [png(84, 84, seed) for seed in range(3)]
prompts = [eight.builder.build(Problem(str(i), f"<image> {i}?", "1", (image,))) for i, image in enumerate(images)]
prompts.append(eight.builder.build(Problem("text", "What is 2 + 3?", "5")))
rows = [
    TrainRow(
        prompts[i % 4], rng.integers(5, 200, 4 + i).astype(np.int32), np.ones(4 + i, bool), np.arange(4 + i) > i,
        -6 + rng.normal(0, 0.3, 4 + i).astype(np.float32), float((-1) ** i * (1 + i)),
    )
    for i in range(7)
]
batch = pack_rows(rows, eight.geometry, 16, 8)
found = {"mesh": dict(eight.mesh.shape), "metrics": [], "spec": {}}
moments, after = [], []
for system in (eight, one):
    updater = make_updater(config, system, 10, LossConfig())
    if system is eight:
        place = {jax.tree_util.keystr(p): str(a.sharding.spec) for p, a in jax.tree_util.tree_leaves_with_path(eight.params)}
        rows_of = place_rows(batch, eight.mesh, 0, {"positions": 1})
        found["rows"] = [str(a.sharding.spec) for a in (rows_of.completion_ids, rows_of.text.positions, rows_of.advantages)]
        odd = pack_rows(rows, eight.geometry, 16, 7)
        found["odd"] = str(place_rows(odd, eight.mesh, 0, {"positions": 1}).completion_ids.sharding.spec)
    state, metrics = updater.step(updater.init(system.params), [batch])
    mu = optax.tree.get(state.opt_state, "mu")
    if system is eight:
        found["moved"] = [
            name for (path, m), p in zip(
                jax.tree_util.tree_leaves_with_path(mu), jax.tree.leaves(state.params), strict=True
            )
            for name in [jax.tree_util.keystr(path)]
            if str(m.sharding.spec) != place[name] or str(p.sharding.spec) != place[name]
        ]
        found["place"] = place
    found["metrics"].append({name: float(value) for name, value in metrics.items()})
    moments.append({jax.tree_util.keystr(p): np.asarray(m) for p, m in jax.tree_util.tree_leaves_with_path(mu)})
found["errors"] = {
    name: float(np.abs(value - moments[1][name]).max() / np.abs(moments[1][name]).max())
    for name, value in moments[0].items()
}
mesh = eight.mesh
for name, dims, shape in [
    ("plain", ("d_model", "d_ff"), (4, 4)), ("odd", ("d_model", "d_ff"), (3, 4)), ("both odd", ("vocab", "d_ff"), (5, 7)),
    ("twice", ("merged", "d_model"), (4, 4)), ("twice, first odd", ("merged", "d_model"), (3, 4)),
    ("unknown", ("layers", "head_dim"), (4, 4)),
]:
    found["spec"][name] = [list(spec_for(dims, shape, mesh, rules)) for rules in (TRAINING_RULES, SAMPLING_RULES)]
print(json.dumps(found))
"""
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    build_model_directory(directory)
    return directory


@pytest.fixture(scope="module")
def meshes(model_directory):
    clean = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_MESHES, str(model_directory)],
        cwd=REPOSITORY, env=clean | environment, capture_output=True, text=True,
    )  # fmt: skip
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
    assert meshes["moved"] == []
    place = meshes["place"]
    assert place["['text']['embedding']"] == str(PartitionSpec("tensor", "fsdp"))
    whole = [name for name, spec in place.items() if "fsdp" not in spec and "tensor" not in spec]
    # Two of two kv heads and of two vision heads fit the tensor axis; patch pixels and norms of no known width do not.
    assert len(whole) < len(place) / 4, whole


def test_rows_lie_over_data_and_fsdp(meshes):
    """Catches positions cut along time, height, width; 7 rows on 4 shards lie whole everywhere."""
    rows, after_three = PartitionSpec(("data", "fsdp")), PartitionSpec(None, ("data", "fsdp"))
    assert meshes["rows"] == [str(rows), str(after_three), str(rows)]
    assert meshes["odd"] == str(PartitionSpec())


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
    assert meshes["spec"][case] == [training, sampling]


@pytest.mark.parametrize("rules", [TRAINING_RULES, SAMPLING_RULES])
def test_no_parameter_is_cut_twice_by_one_axis(model_directory, rules):
    """Every parameter's words through the table, on a mesh of ones, where every size divides. jax refuses a spec with an
    axis twice only when an array is placed."""
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
        with pytest.raises(UserError, match=rf"mesh data={config.data},fsdp={config.fsdp},tensor=.*the {count} visible"):
            make_mesh(config)


def test_minus_one_takes_what_is_left():
    count = jax.device_count()
    assert dict(make_mesh(MeshConfig(data=1, fsdp=-1, tensor=1)).shape) == {"data": 1, "fsdp": count, "tensor": 1}
    assert dict(make_mesh(MeshConfig(data=-1, fsdp=1, tensor=count)).shape) == {"data": 1, "fsdp": 1, "tensor": count}
