"""What `test_planning.py` looks at on eight simulated devices, as JSON.

JAX_NUM_CPU_DEVICES=8 python tests/plan_devices.py
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rethinker_jax.config import Config, MeshConfig
from rethinker_jax.config_file import load_config
from rethinker_jax.models.sharding import make_mesh, parts_of
from rethinker_jax.planning.hlo import find_collectives
from rethinker_jax.planning.layouts import lay_out
from rethinker_jax.planning.machines import find_machine
from rethinker_jax.planning.named_models import find_model
from rethinker_jax.planning.plan import plan_sample, plan_update
from rethinker_jax.planning.search import Speeds, estimates
from rethinker_jax.planning.show import _phase_json
from rethinker_jax.planning.update import lower_update, update_state
from rethinker_jax.planning.work import longest_of, update_work

OUTER, INNER, ROWS, WIDTH = 5, 3, 16, 8
SMALL = [
    "model.remat=full", "rollout.prompts_per_step=8", "rollout.samples_per_prompt=2", "training.batch_size=16",
    "training.micro_batch_tokens=512", "data.max_prompt_tokens=256", "sampling.max_new_tokens=64",
    "sampling.num_slots=8", "sampling.prefill_tokens=256", "sampling.cache_gib=1",
]  # fmt: skip


def known_collectives() -> list[dict[str, Any]]:
    """A loop of OUTER turns with a sum over `a` and, inside, one of INNER turns that gathers over `b`; then a scatter,
    an exchange and a shift outside of both. Every array is float32 [ROWS, WIDTH] on a device."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def inner(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.lax.all_gather(jnp.sin(x), "b").sum(0), None

    def outer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.tanh(jax.lax.scan(inner, jax.lax.psum(x, "a"), None, INNER)[0]), None

    def program(x: jax.Array) -> jax.Array:
        x = jax.lax.scan(outer, x, None, OUTER)[0]
        x = jax.lax.all_to_all(jnp.cos(x), "b", 0, 0, tiled=True)
        x = jax.lax.ppermute(jnp.cos(x), "b", [(0, 1), (1, 2), (2, 3), (3, 0)])
        return jax.lax.psum_scatter(jnp.cos(x), "b", tiled=True)

    spec = PartitionSpec(("a", "b"))
    whole = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, spec))
    mapped = jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(mapped).lower(whole).compile().as_text()
    assert text is not None
    return [dataclasses.asdict(one) for one in find_collectives(text, 8)]


def phases(mesh: MeshConfig) -> dict[str, Any]:
    """Both phases of the example's model at a small config, planned for eight chips as if these devices were theirs."""
    config: Config = load_config(None, SMALL)
    model = find_model(config.model.path)
    layout = lay_out(config, model.config, make_mesh(mesh))
    longest = longest_of(config, model.config, model.max_pixels)
    machine = find_machine("h100:8")
    made = update_state(layout)
    held = sum(made.bytes.values())
    [near] = estimates(config, model.config, longest, 8, Speeds(1e12, 1e12, 1e11), meshes=[mesh])
    return {
        "held": made.bytes,
        "update": _phase_json(plan_update(layout, longest, machine, made)),
        "sample": _phase_json(plan_sample(layout, longest, machine, held)),
        "estimated": {"update": near.update_bytes, "sample": near.sample_bytes},
    }


def lowered(*overrides: str) -> dict[str, int]:
    """The update of a variant, traced alone: bytes of a device by what they hold, and rows of its loss."""
    config: Config = load_config(None, [*SMALL, *overrides])
    model = find_model(config.model.path)
    layout = lay_out(config, model.config, make_mesh(MeshConfig(2, 2, 1, 2)))
    work = update_work(config, model.config, longest_of(config, model.config, model.max_pixels), parts_of(layout.mesh))
    made = update_state(layout)
    lower_update(layout, made, work)
    return made.bytes | {"rows": work.batch.loss_mask.shape[0] * work.batch.loss_mask.shape[1]}


VARIANTS = {
    "adapters": ["model.lora.rank=4"],
    "reference": ["loss.reference=start", "loss.kl=loss", "loss.importance_cap=2.0", "loss.old_log_probs=trainer"],
    "offload": ["optimizer.offload=true", "training.micro_batch_tokens=0", "rethink.kept_as=addition"],
    "average": ["reward.consistency.weight=0.1", "reward.consistency.model=ema"],
}

if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of what this costs
    found = {"collectives": known_collectives(), "phases": phases(MeshConfig(data=1, fsdp=4, tensor=2))}
    found["variants"] = {name: lowered(*overrides) for name, overrides in VARIANTS.items()}
    print(json.dumps(found))
