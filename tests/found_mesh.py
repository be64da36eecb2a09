"""`--mesh auto` where there are several devices; what `test_chosen_mesh.py` looks at, as JSON on the last line.

    JAX_NUM_CPU_DEVICES=8 python tests/found_mesh.py bytes
    JAX_NUM_CPU_DEVICES=2 JAX_COORDINATOR_ADDRESS=... JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1 python found_mesh.py agree

bytes: what lies on the first device, of weights, moments and the sampler's copy, and what was said of it.
agree: the mesh of 7B that each of two processes would choose by its own memory, and the one that both choose.
"""

import dataclasses
import json
import sys
from typing import Any

import jax

from rethinker_jax import peers
from rethinker_jax.chosen_mesh import on_mesh
from rethinker_jax.config import Config, LossConfig, MeshConfig, RunConfig
from rethinker_jax.config_file import load_defaults
from rethinker_jax.device_bytes import held_bytes
from rethinker_jax.devices import start_jax
from rethinker_jax.mesh_spec import mesh_words
from rethinker_jax.planning import auto_mesh
from rethinker_jax.planning.named_models import find_model
from rethinker_jax.system import load_system, make_updater

GIB = 2**30
MEMORY = (120 * GIB, 90 * GIB)  # of the first and the second process's devices
MESHES = {"auto": MeshConfig(search=True), "cut": MeshConfig(1, 2, 2, 2), "odd": MeshConfig(1, 8)}


def on_first_device(tree: Any) -> int:
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards
        if shard.device == first
    )  # fmt: skip


def lying(config: Config) -> dict[str, Any]:
    config = on_mesh(config, "rl")
    system = load_system(config)
    state = make_updater(config, system, 1, LossConfig()).init(system.params)
    held = held_bytes(config, system.model.config, system.mesh, "rl", "cpu")
    return {
        "mesh": mesh_words(config.mesh),
        "held": [held.weights, held.optimizer, held.copy],
        "real": [on_first_device(one) for one in (state.params, state.opt_state, system.sampling_params(state.params))],
    }


def agreed() -> dict[str, str]:
    config = load_defaults(["model.remat=full", "training.micro_batch_tokens=8192"])
    model = find_model("Qwen2.5-VL-7B-Instruct")
    own = MEMORY[peers.index()]
    vars(auto_mesh)["usable_bytes"] = lambda _: own  # this computer's is the same for both
    alone = auto_mesh.best_mesh(config, model.config, model.max_pixels, jax.device_count(), own, auto_mesh.UNKNOWN)
    both = auto_mesh.choose_mesh(config, model.config, model.max_pixels, "rl")
    return {"alone": mesh_words(alone.mesh), "both": mesh_words(both.mesh)}


start_jax(Config(run=RunConfig(compilation_cache="")))
if sys.argv[1] == "bytes":
    found = {name: lying(dataclasses.replace(Config(), mesh=mesh)) for name, mesh in MESHES.items()}
else:
    found = agreed()
print(json.dumps(found), flush=True)
peers.finish()
