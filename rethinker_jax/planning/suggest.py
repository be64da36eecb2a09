"""`plan --suggest`: the search of `search.py`, and the compiler's word on the best that it found."""

import dataclasses
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from rethinker_jax.config import Config
from rethinker_jax.errors import UserError
from rethinker_jax.mesh_spec import mesh_words
from rethinker_jax.planning.machines import Machine
from rethinker_jax.planning.named_models import NamedModel
from rethinker_jax.planning.plan import Plan
from rethinker_jax.planning.search import RINGS, Estimate, Speeds, fitting
from rethinker_jax.planning.work import longest_of

GIB = 2**30
COMPILED = 3  # of the best estimates


def speeds_of(machine: Machine) -> Speeds:
    chip = machine.chip
    links = chip.link * (1 if machine.is_gpu else RINGS)
    if machine.is_gpu and machine.shape[0] > 1:
        links = chip.network
    return Speeds(chip.peak_flops, chip.hbm_bandwidth, links)


def with_estimate(config: Config, found: Estimate) -> Config:
    """The config, run as the estimate says."""
    return dataclasses.replace(
        config,
        mesh=found.mesh,
        model=dataclasses.replace(config.model, remat=found.remat),
        training=dataclasses.replace(config.training, micro_batch_tokens=found.micro_batch_tokens),
    )


def words_of(config: Config, found: Estimate) -> str:
    """What to write on the command line to run the config so."""
    words = [f"--mesh {mesh_words(found.mesh)}"]
    if found.remat != config.model.remat:
        words.append(f"model.remat={found.remat}")
    if found.micro_batch_tokens != config.training.micro_batch_tokens:
        words.append(f"training.micro_batch_tokens={found.micro_batch_tokens}")
    return " ".join(words)


def candidates(config: Config, model: NamedModel, machine: Machine, count: int) -> list[Estimate]:
    """The quickest estimates that fit, of different meshes. Raises UserError where none does."""
    longest = longest_of(config, model.config, model.max_pixels)
    devices, usable, speeds = machine.num_devices, machine.usable_bytes, speeds_of(machine)
    found, least = fitting(config, model.config, longest, devices, usable, speeds, vary=True)
    if not found:
        raise UserError(
            f"plan --suggest: nothing is estimated to fit on {machine.name}: the least is "
            f"{least.peak_bytes / GIB:.1f} GiB of {usable / GIB:.1f}, with {words_of(config, least)}. "
            "Take a larger slice, or optimizer.offload=true, optimizer.moments=mu_bfloat16, model.freeze or "
            "model.lora.rank."
        )
    first_of = {}
    for one in found:
        first_of.setdefault(one.mesh, one)
    return list(first_of.values())[:count]


def suggest(
    config: Config, model: NamedModel, machine: Machine, compiled: Callable[[Config, str], Plan], console: Console
) -> tuple[Estimate, Plan]:
    """Has the best few compiled and prints them; the quickest that the compiler takes. Raises UserError for none."""
    table = Table(box=None, pad_edge=False, header_style="", title="of the meshes searched", title_justify="left")
    for column in ("to run it", "estimated GiB", "compiled GiB", "estimated s a step", "by the plan"):
        table.add_column(column, justify="left" if column == "to run it" else "right")
    best: tuple[float, Estimate, Plan] | None = None
    for one in candidates(config, model, machine, COMPILED):
        words = [words_of(config, one), f"{one.peak_bytes / GIB:.2f}"]
        try:
            made = compiled(with_estimate(config, one), machine.name)
        except UserError as error:
            console.print(str(error))
            table.add_row(*words, "", f"{one.seconds:.3g}", "does not compile")
            continue
        peak = max(made.update.peak_bytes, made.sample.peak_bytes)
        seconds = seconds_of_step(config, made) if made.fits else float("inf")
        shown = f"{seconds:.3g}" if made.fits else "does not fit"
        table.add_row(*words, f"{peak / GIB:.2f}", f"{one.seconds:.3g}", shown)
        if made.fits and (best is None or seconds < best[0]):
            best = seconds, one, made
    console.print(table)
    if best is None:
        raise UserError(
            f"plan --suggest: the compiler took none of the meshes above for {machine.name}. Take a larger one."
        )
    return best[1], best[2]


def seconds_of_step(config: Config, made: Plan) -> float:
    """Of a step of the run, nothing overlapped: one rollout batch, and the optimizer steps that are made of it."""
    rows = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    updates = max(1, rows // config.training.batch_size)
    return sum(one.without_overlap for one in made.sample.rooflines) + updates * sum(
        one.without_overlap for one in made.update.rooflines
    )
