"""The command `plan`: its options. See `commands.py`."""

import argparse
import os
from pathlib import Path

from rethinker_jax.config_file import load_defaults
from rethinker_jax.errors import UserError
from rethinker_jax.request import Request

# Read when jax and libtpu are loaded: no accelerator of this computer is touched, nothing is asked of the network, and
# several of these processes may run at once. The last three name a machine, so that libtpu does not look for one.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
QUICK = {"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0"}


def plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", metavar="NAME", help="such as v5p:4x4x4, v6e-64, h100:8")
    parser.add_argument("--json", metavar="FILE", type=Path, help="writes the plan there, too")
    parser.add_argument("--suggest", action="store_true", help="searches for a mesh, remat and micro-batch that fit")
    parser.add_argument("--quick", action="store_true", help="compiles with less effort, three to five times as fast")


def run_plan(request: Request) -> None:
    options = request.options
    config = request.config(load_defaults)
    if options.topology is None:
        raise UserError("plan: wanted --topology NAME, such as --topology v5p:4x4x4, v6e-64 or h100:8")
    if config.mesh.search and not options.suggest:
        raise UserError("plan: --mesh auto searches on devices that are there; wanted --suggest, or sizes after --mesh")
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError(f"plan: --json {options.json}: no such directory: {options.json.parent}")
    os.environ.update(ENVIRONMENT | (QUICK if options.quick else {}))
    from rethinker_jax.devices import tpu_flags

    if not options.topology.lower().startswith(("h100", "h200")):
        os.environ["XLA_FLAGS"] = tpu_flags(os.environ.get("XLA_FLAGS", ""))  # as a run on TPUs has them
    from rethinker_jax.planning.command import plan

    plan(config, options.topology, options.json, options.suggest)
