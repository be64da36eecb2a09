"""Imports go downwards only: the order in which the program can be read, held by a test."""

import ast
from pathlib import Path

import rethinker_jax

ROOT = Path(rethinker_jax.__file__).parent
FLOORS = (
    {"__init__", "types", "config", "errors", "options", "output_files", "peers", "roll_call"}
    | {"config_curation", "config_health", "config_numbers", "config_rewards"}
    | {"config_check", "config_file", "config_keys", "mesh_spec", "json_values", "stopping", "request", "json_lines"}
    | {"terminal", "phases", "job_options", "starts"},
    {"prompts", "verify", "rewards", "benchmarks", "example", "report", "rethink", "consistency", "advantage", "replay"}
    | {"chat_server", "console", "curation", "health", "metrics"},
    {"devices", "models", "processes", "profiling"},
    {"sampling", "training"},
    {
        "system",
        "device_bytes",
        "mesh_checks",
        "chosen_mesh",
        "rollout",
        "prompts_ahead",
        "rounds",
        "experience",
        "evaluate",
        "evaluation",
        "step_metrics",
        "step_rows",
        "run_data",
        "run_directory",
        "validation",
        "sft",
        "sample",
        "distill",
        "export",
        "planning",
    },
    {"loop", "pipeline"},
    {"commands", "commands_evaluate", "commands_plan", "main"},
)
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
JAX = ("jax", "flax", "optax", "orbax")


def imports() -> list[tuple[Path, str, str]]:
    """(file, its top-level part, imported module) of every import statement of the package."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found += [(path, part, name.name) for name in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = node.module == "rethinker_jax"
                found += [(path, part, f"{node.module}.{name.name}" if inner else node.module) for name in node.names]
    return found


def test_every_part_has_a_floor() -> None:
    """Catches a new module that nobody placed."""
    assert {part for _, part, _ in imports()} <= set(FLOOR_OF)


def test_no_import_runs_upwards() -> None:
    """Catches a stage that calls back up, such as the verifier importing the loop."""
    wrong = []
    for path, part, name in imports():
        if name.startswith("rethinker_jax."):
            target = name.split(".")[1]
            if target == "__version__":
                continue
            if FLOOR_OF[part] < FLOOR_OF[target]:
                wrong.append(f"{path.name} imports {name}")
    assert not wrong


def test_sampling_and_training_do_not_know_each_other() -> None:
    """Catches a second path between sampler and trainer than the model function both use."""
    pairs = {(part, name.split(".")[1]) for _, part, name in imports() if name.startswith("rethinker_jax.")}
    assert not pairs & {("sampling", "training"), ("training", "sampling")}


def test_the_host_side_imports_no_jax() -> None:
    """Catches an import with which a verifier worker would seize the accelerator."""
    host = FLOORS[0] | FLOORS[1]
    wrong = [f"{path.name}: {name}" for path, part, name in imports() if part in host and name.split(".")[0] in JAX]
    assert not wrong
