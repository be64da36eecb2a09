"""The mesh that a command runs on: found where `--mesh auto` asks for it, held against the model, and told once."""

import dataclasses
import sys

from rethinker_jax.config import Config, MeshConfig
from rethinker_jax.device_bytes import Held, Work, held_bytes
from rethinker_jax.mesh_checks import check_heads, warning_of
from rethinker_jax.mesh_spec import mesh_words
from rethinker_jax.models.sharding import make_mesh
from rethinker_jax.planning.auto_mesh import choose_mesh
from rethinker_jax.planning.named_models import find_model
from rethinker_jax.processes import is_first
from rethinker_jax.system import model_directory

UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


def on_mesh(config: Config, work: Work) -> Config:
    """The config with the mesh that `load_system` is to load the model on. All processes of a job call it.

    Says on standard error which mesh that is, what a device holds, and what the mesh fails to cut. Raises UserError for
    a mesh that the devices or the model do not allow, and where a search finds none.
    """
    model = find_model(str(model_directory(config.model.path)))
    said = []
    if config.mesh.search:
        chosen = choose_mesh(config, model.config, model.max_pixels, work)
        config = dataclasses.replace(config, mesh=chosen.mesh)
        said.append(f"--mesh auto: {mesh_words(chosen.mesh)}, {chosen.why}")
    mesh = make_mesh(config.mesh)
    filled = MeshConfig().with_sizes(dict(mesh.shape))
    if work != "sample":  # the sampler cuts no tokens
        check_heads(model.config, filled)
    if warning := warning_of(model.config, filled):
        said.append(f"warning: {warning}")
    device = mesh.devices.flat[0]
    held = held_bytes(config, model.config, mesh, work, device.platform)
    said.append(mesh_line(filled, held, device.device_kind, mesh.size))
    if is_first():
        print("\n".join(said), file=sys.stderr)
    return config


def mesh_line(mesh: MeshConfig, held: Held, kind: str, count: int) -> str:
    """mesh: data=2,fsdp=4 on 8 × TPU v5; a device holds 3.1 GiB of weights, 6.2 of optimizer, ..."""
    parts = {
        "weights": held.weights,
        "optimizer": held.optimizer,
        "reference": held.reference,
        "average": held.average,
        "the sampler's copy": held.copy,
    }
    unit = next((name for name, size in UNITS.items() if max(parts.values()) >= size), "KiB")
    told = [f"{size / UNITS[unit]:.1f} of {name}" for name, size in parts.items() if size]
    told[0] = told[0].replace(" of", f" {unit} of", 1)
    host = f"; the host holds {held.on_host / UNITS[unit]:.1f} {unit} of optimizer for it" if held.on_host else ""
    named = f"{mesh_words(mesh)} on {count} × {kind}" if count > 1 else f"1 × {kind}"
    return f"mesh: {named}; {'a device' if count > 1 else 'it'} holds {', '.join(told)}{host}"
