"""A plan as JSON and as tables for people."""

import collections
import dataclasses
import re
from typing import Any

from rich.console import Console
from rich.table import Table

from rethinker_jax.mesh_spec import mesh_words
from rethinker_jax.planning.hlo import Collective
from rethinker_jax.planning.plan import Phase, Plan
from rethinker_jax.planning.roofline import mfu

GIB = 2**30
SHOWN = 6  # collectives of a phase
LEVERS_OF_UPDATE = (
    "more fsdp (--mesh fsdp=N), for long prompts more context (--mesh context=N), a lower training.micro_batch_tokens, "
    "model.remat=full, optimizer.moments=mu_bfloat16, optimizer.offload=true, model.freeze=[vision,merger], "
    "model.lora.rank"
)
LEVERS_OF_SAMPLE = (
    "more tensor (--mesh tensor=N: the sampler's weights are cut over it alone), more fsdp for the training state, "
    "fewer sampling.num_slots, a lower sampling.prefill_tokens or sampling.max_new_tokens, optimizer.offload=true"
)


def as_json(plan: Plan) -> dict[str, Any]:
    """What `plan --json` writes."""
    return {
        "topology": plan.machine.name,
        "devices": plan.machine.num_devices,
        "mesh": plan.mesh.sizes,
        "model": plan.model.source,
        "parameters": plan.parameters,
        "fits": plan.fits,
        "longest": {
            "prompt_tokens": plan.longest.prompt_tokens,
            "image_patches": list(plan.longest.grid),
            "completion_tokens": plan.longest.completion_tokens,
        },
        "update": _phase_json(plan.update),
        "sample": _phase_json(plan.sample),
    }


def _phase_json(phase: Phase) -> dict[str, Any]:
    programs = phase.rooflines
    return {
        "fits": phase.fits,
        "why_not": phase.why_not,
        "peak_bytes_per_device": phase.peak_bytes,
        "hbm_bytes_per_device": phase.usable_bytes,
        "bytes_per_device": phase.parts,
        "flops_per_device": phase.flops,
        "collective_bytes_per_device": phase.collective_bytes,
        "predicted_seconds": sum(one.seconds for one in programs) if programs else None,
        "predicted_seconds_without_overlap": sum(one.without_overlap for one in programs) if programs else None,
        "predicted_mfu": mfu(programs) if programs else None,
        "programs": [
            {
                "name": one.name,
                "seconds": one.seconds,
                "compute_seconds": one.compute,
                "memory_seconds": one.memory,
                "link_seconds": one.links,
                "bound": one.bound,
            }
            for one in programs
        ],
        "collectives": [dataclasses.asdict(line) for line in grouped(phase)],
        "shape": phase.shape,
        "compile_seconds": round(phase.compile_seconds, 1),
    }


@dataclasses.dataclass(frozen=True)
class Line:
    """Collectives of one program that serve one operation: of one kind, among as many devices, of one shape."""

    program: str
    kind: str
    group: int
    shape: str
    serves: str
    loops: tuple[int | None, ...]
    count: int
    total_bytes: int


def grouped(phase: Phase) -> list[Line]:
    """The collectives of a phase, most bytes first."""
    counts: dict[tuple[Any, ...], list[int]] = collections.defaultdict(lambda: [0, 0])
    for program, one in phase.collectives:
        key = program, one.kind, len(one.group), _first_array(one), served(one.name), one.loops
        counts[key][0] += one.count
        counts[key][1] += one.total_bytes
    lines = [Line(*key, count, total) for key, (count, total) in counts.items()]
    return sorted(lines, key=lambda line: -line.total_bytes)


def _first_array(one: Collective) -> str:
    match = re.search(r"\w+\[[\d,]*\]", one.shape)
    return match.group(0) if match else one.shape


def served(name: str) -> str:
    """The end of an operation's name, with the pass that it is part of: the places of jax's own wrappers left out."""
    when = "recomputed " if "rematted" in name else "backward " if "transpose" in name else ""
    skipped = (
        "while",
        "body",
        "closed_call",
        "checkpoint",
        "rematted_computation",
        "jvp()",
        "transpose(jvp())",
        "cond",
    )
    words = [word for word in name.split("/") if word not in skipped and not word.startswith(("jit(", "transpose("))]
    return when + "/".join(words[-2:])


def print_plan(plan: Plan, console: Console) -> None:
    billions = plan.parameters["total"] / 1e9
    console.print(
        f"{plan.model.source}: {billions:.2f} billion parameters on {plan.machine.name}, {plan.machine.num_devices} × "
        f"{plan.machine.chip.kind}, mesh {mesh_words(plan.mesh)}"
    )
    height, width = plan.longest.grid
    console.print(
        f"planned for the longest: prompts of {plan.longest.prompt_tokens} tokens with an image of {height}×{width} "
        f"patches, completions of {plan.longest.completion_tokens}"
    )
    for name, phase, levers in (("update", plan.update, LEVERS_OF_UPDATE), ("sample", plan.sample, LEVERS_OF_SAMPLE)):
        print_phase(name, phase, levers, console)


def print_phase(name: str, phase: Phase, levers: str, console: Console) -> None:
    title = f"{name}: {'fits' if phase.fits else 'DOES NOT FIT'}"
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    for part, size in phase.parts.items():
        table.add_row(part, f"{size / GIB:.2f} GiB")
    table.add_row("peak", f"{phase.peak_bytes / GIB:.2f} of {phase.usable_bytes / GIB:.2f} GiB a device")
    for what, number in phase.shape.items():
        table.add_row(what, f"{number:,}")
    if phase.rooflines:
        table.add_row("useful products", f"{phase.flops / 1e12:.1f} TFLOP a device")
        table.add_row("sent over links", f"{phase.collective_bytes / GIB:.2f} GiB a device")
        for one in phase.rooflines:
            times = f"compute {one.compute:.3g}, memory {one.memory:.3g}, links {one.links:.3g}"
            table.add_row(f"seconds of {one.name}", f"{one.seconds:.3g} ({one.bound}; {times})")
        table.add_row("at best", f"{sum(one.seconds for one in phase.rooflines):.3g} s, MFU {mfu(phase.rooflines):.1%}")
    console.print()
    console.print(table)
    if phase.collectives:
        console.print(_collective_table(phase))
    if not phase.fits:
        console.print(f"{phase.why_not}.\nWhat may help: {levers}.")


def _collective_table(phase: Phase) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    for column in ("collective", "devices", "times", "GiB", "array", "serves"):
        table.add_column(column, justify="right" if column in ("devices", "times", "GiB") else "left")
    lines = grouped(phase)
    for line in lines[:SHOWN]:
        loops = "×".join("?" if loop is None else str(loop) for loop in line.loops)
        times = f"{line.count:,}" + (f" (loops {loops})" if loops else "")
        size = f"{line.total_bytes / GIB:.2f}"
        table.add_row(f"{line.program}: {line.kind}", str(line.group), times, size, line.shape, line.serves)
    rest = lines[SHOWN:]
    if rest:
        total = sum(line.total_bytes for line in rest) / GIB
        table.add_row(f"{len(rest)} others", "", f"{sum(line.count for line in rest):,}", f"{total:.2f}")
    return table
