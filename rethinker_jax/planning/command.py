"""The command `plan`, whose environment `commands_plan.py` has set: it is read when jax is imported.

Everything is compiled in a child process: the compiler for TPUs ends the process that it is in where it meets a program
that it cannot compile, and what it took of the memory goes with it.
"""

import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rich.console import Console

from rethinker_jax.config import Config
from rethinker_jax.errors import UserError
from rethinker_jax.planning.machines import devices_of, find_machine
from rethinker_jax.planning.named_models import find_model
from rethinker_jax.planning.plan import Plan, make_plan
from rethinker_jax.planning.show import as_json, print_plan
from rethinker_jax.planning.suggest import suggest, words_of


def plan(config: Config, topology: str, output: Path | None, searched: bool) -> bool:
    """Prints the plan of a config for a topology, writes it as JSON if asked. Whether it fits.

    `searched`: not as the config says, but on the best mesh that is found.
    """
    machine = find_machine(topology)
    model = find_model(config.model.path)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    if searched:
        found, made = suggest(config, model, machine, compile_apart, console)
        print_plan(made, console)
        console.print(f"\nto run it: python -m rethinker_jax.main train CONFIG.yaml {words_of(config, found)}")
    else:
        made = compile_apart(config, topology)
        print_plan(made, console)
    if output is not None:
        output.write_text(json.dumps(as_json(made), indent=2) + "\n", encoding="utf-8")
    return made.fits


def compile_apart(config: Config, topology: str) -> Plan:
    """The plan, made in a process of its own. Raises UserError where the compiler ends that."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(compile_here, config, topology).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"plan: the compiler for {topology} ended its process; its last words stand above. No such program can "
                "be compiled for a run, either: take another --mesh."
            ) from error


def compile_here(config: Config, topology: str) -> Plan:
    machine = find_machine(topology)
    return make_plan(config, find_model(config.model.path), machine, devices_of(machine))
