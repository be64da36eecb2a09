"""One update on a mesh of eight, and the same on one device: what `test_sharding.py` compares, as JSON.

    JAX_NUM_CPU_DEVICES=8 python tests/two_meshes.py MODEL_DIRECTORY data=2,fsdp=2,tensor=2

The leaves compared are Adam's first moments, 0.1 of the clipped gradient: parameters would hide an error behind the
small learning rate.
"""

import dataclasses
import json
import sys
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh
from test_update import png

from rethinker_jax.config import BucketsConfig, Config, DataConfig, LossConfig, ModelConfig, OptimizerConfig
from rethinker_jax.mesh_spec import parse_mesh
from rethinker_jax.models.sharding import AXES, parts_of, place_rows
from rethinker_jax.system import System, load_system, make_updater, training_shardings
from rethinker_jax.training import log_probs
from rethinker_jax.training.batch import pack_rows
from rethinker_jax.training.layout import TrainBatch, TrainRow
from rethinker_jax.training.update import TrainState
from rethinker_jax.types import Problem


def named(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def specs(tree: Any) -> dict[str, str]:
    return {name: str(array.sharding.spec) for name, array in named(tree).items()}


def moments_of(state: TrainState) -> Any:
    return optax.tree.get(state.opt_state, "mu")


def make_rows(system: System) -> list[TrainRow]:
    """Seven rows on three pictures and one text, with ratios on both sides of the clip."""
    rng = np.random.default_rng(0)
    problems = [Problem(str(i), f"<image> {i}?", "1", (png(84, 84, i),)) for i in range(3)]
    prompts = [system.builder.build(problem) for problem in [*problems, Problem("text", "What is 2 + 3?", "5")]]
    return [
        TrainRow(
            prompt=prompts[i % 4],
            completion_ids=rng.integers(5, 200, 4 + i).astype(np.int32),
            loss_mask=np.ones(4 + i, bool),
            nll_mask=np.arange(4 + i) > i,
            old_log_probs=-6 + rng.normal(0, 0.3, 4 + i).astype(np.float32),
            advantage=float((-1) ** i * (1 + i)),
        )
        for i in range(7)
    ]


def update(config: Config, system: System, batch: TrainBatch) -> tuple[TrainState, dict[str, float]]:
    updater = make_updater(config, system, 10, LossConfig())
    state, metrics = updater.step(updater.init(system.params), [batch])
    return state, {name: float(value) for name, value in metrics.items()}


def main(directory: str, mesh: str) -> None:
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is all that this costs
    assert jax.device_count() == 8
    config = Config(
        model=ModelConfig(path=directory, init="random", dtype="float32"),
        mesh=parse_mesh(mesh),
        buckets=BucketsConfig(row_tokens=(35,)),  # so that `context` has to pad
        data=DataConfig(prompt_template="none"),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0),
    )
    eight = load_system(config)
    log_probs.CHUNK_BYTES = 4 * 4 * eight.model.config.vocab  # four tokens a chunk: the head is shared by several
    alone = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    params = jax.device_put(jax.device_get(eight.params), training_shardings(eight.model.config, alone))
    one = dataclasses.replace(eight, mesh=alone, params=params, model=dataclasses.replace(eight.model, mesh=alone))

    rows = make_rows(eight)
    parts = parts_of(eight.mesh)
    batch, odd = (pack_rows(rows, eight.geometry, 16, count, config.buckets, parts) for count in (8, 7))
    placed, placed_odd = (place_rows(some, eight.mesh, 0, {"positions": 1}) for some in (batch, odd))
    before = specs(eight.params)
    state, metrics = update(config, eight, batch)
    state_of_one, metrics_of_one = update(config, one, pack_rows(rows, one.geometry, 16, 8, config.buckets))
    ours, theirs = (jax.tree.map(np.asarray, moments_of(some)) for some in (state, state_of_one))
    errors = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), ours, theirs)
    found = {
        "mesh": dict(eight.mesh.shape),
        "metrics": [metrics, metrics_of_one],
        "errors": named(errors),
        "specs": {"before": before, "params": specs(state.params), "moments": specs(moments_of(state))},
        "rows": [
            str(array.sharding.spec)
            for array in (placed.target_ids, placed.text.positions, placed.advantages, placed_odd.advantages)
        ],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
