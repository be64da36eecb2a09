"""The table of docs/plans.md: the recipes on slices of many sizes, each on the quickest mesh that is estimated to fit.

    python scripts/plan_table.py --plans DIR [--only 7B ...] [--topology v6e-64 ...] [--no-compile] [--no-page]

Every plan is compiled by `python -m rethinker_jax.main plan ... --quick`, in a process of its own, and kept in DIR as
JSON, where the next start finds it: minutes each. Where the compiler refuses a mesh, the next best is tried, three in
all. The table is written between the marks in docs/plans.md, from what is in DIR; without a plan there it says what is
estimated (~).
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rethinker_jax.commands_plan import ENVIRONMENT

os.environ.update(ENVIRONMENT)

from rethinker_jax.config import Config
from rethinker_jax.config_file import load_config
from rethinker_jax.errors import UserError
from rethinker_jax.planning.machines import find_machine
from rethinker_jax.planning.named_models import find_model
from rethinker_jax.planning.search import Estimate
from rethinker_jax.planning.suggest import candidates, words_of

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "plans.md"
MARKS = ("<!-- table: scripts/plan_table.py -->", "<!-- end of the table -->")
GIB = 2**30
TRIES = 3
# The recipe of each size; 3B has none of its own.
RECIPES = {
    "7B": ("configs/vl_rethinker_7b.yaml", ()),
    "72B": ("configs/vl_rethinker_72b.yaml", ()),
    "32B": ("configs/vl_rethinker_32b.yaml", ()),
    "3B": ("configs/vl_rethinker_7b.yaml", ("model.path=Qwen2.5-VL-3B-Instruct",)),
}
TOPOLOGIES = (
    "v5p-128", "v6e-64", "v5e-256", "v6e-256", "v5p-256", "v5p-8", "v6e-8", "v5e-16", "h100:8", "h200:8",
)  # fmt: skip
HEADER = (
    "| model | devices | mesh and overrides | update: GiB of usable | sampler: GiB | sent, GiB: update, rollout "
    "| seconds at best: update, rollout | MFU of update |\n|---|---|---|---|---|---|---|---|"
)


def recipe(size: str) -> tuple[Path, Config, list[str]]:
    path, overrides = RECIPES[size]
    return ROOT / path, load_config(ROOT / path, list(overrides)), list(overrides)


def ways(size: str, topology: str) -> tuple[list[Estimate], str]:
    """The best estimates, or why there is none."""
    _, config, _ = recipe(size)
    try:
        return candidates(config, find_model(config.model.path), find_machine(topology), TRIES), ""
    except UserError as error:
        return [], str(error)


def compile_plan(size: str, topology: str, directory: Path) -> None:
    """Leaves the plan in `directory`, the first that fits or, where none does, the last."""
    file = directory / f"{size}_{topology.replace(':', '_')}.json"
    if file.is_file():
        return
    path, config, overrides = recipe(size)
    for estimate in ways(size, topology)[0]:
        words = words_of(config, estimate).split()
        command = [sys.executable, "-m", "rethinker_jax.main", "plan", str(path), "--topology", topology, "--quick"]
        made = file.with_suffix(".made")
        done = subprocess.run(
            [*command, *words, *overrides, "--json", str(made)], cwd=ROOT, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
        )  # fmt: skip
        if done.returncode:
            print(f"{size} {topology} {' '.join(words)}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        found = json.loads(made.read_text(encoding="utf-8")) | {"words": " ".join(words)}
        made.unlink()
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"{size} {topology} {' '.join(words)}: {'fits' if found['fits'] else 'does not fit'}", file=sys.stderr)
        if found["fits"]:
            return


def rows(directory: Path, sizes: list[str], topologies: list[str]) -> Iterator[str]:
    for size in sizes:
        for topology in topologies:
            file = directory / f"{size}_{topology.replace(':', '_')}.json"
            machine = find_machine(topology)
            name = f"{topology} ({machine.num_chips} {'GPUs' if machine.is_gpu else 'chips'})"
            if file.is_file():
                yield f"| {size} | {name} | {compiled_cells(json.loads(file.read_text(encoding='utf-8')))} |"
                continue
            found, why = ways(size, topology)
            yield f"| {size} | {name} | {estimated_cells(size, found, why)} |"


def compiled_cells(plan: dict[str, Any]) -> str:
    update, sample = plan["update"], plan["sample"]
    usable = f"{update['hbm_bytes_per_device'] / GIB:.1f}"
    peaks = [f"{phase['peak_bytes_per_device'] / GIB:.1f}" for phase in (update, sample)]
    marks = ["" if phase["fits"] else " (does not fit)" for phase in (update, sample)]
    sent = ", ".join(f"{phase['collective_bytes_per_device'] / GIB:,.0f}" for phase in (update, sample))
    seconds = ", ".join(_number(phase["predicted_seconds"]) for phase in (update, sample))
    mfu = "" if update["predicted_mfu"] is None else f"{update['predicted_mfu']:.0%}"
    memory = f"{peaks[0]} of {usable}{marks[0]} | {peaks[1]}{marks[1]}"
    return f"`{plan['words']}` | {memory} | {sent} | {seconds} | {mfu}"


def _number(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3g}"


def estimated_cells(size: str, found: list[Estimate], why: str) -> str:
    if not found:
        least = why.partition("the least is ")[2].partition(", with")[0]
        return f"nothing fits (estimated: {least} GiB at least) | | | | |"
    _, config, _ = recipe(size)
    best = found[0]
    sizes = f"~{best.update_bytes / GIB:.1f} | ~{best.sample_bytes / GIB:.1f}"
    return f"`{words_of(config, best)}` | {sizes} | | | "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="SIZE")
    parser.add_argument("--topology", nargs="+", default=list(TOPOLOGIES), metavar="NAME")
    parser.add_argument("--no-compile", action="store_true", help="only writes the page")
    parser.add_argument("--no-page", action="store_true", help="only compiles")
    options = parser.parse_args()
    options.plans.mkdir(parents=True, exist_ok=True)
    if not options.no_compile:
        for size in options.only:
            for topology in options.topology:
                compile_plan(size, topology, options.plans)
    if options.no_page:
        return
    table = "\n".join([HEADER, *rows(options.plans, sorted(RECIPES, key=lambda one: int(one[:-1])), list(TOPOLOGIES))])
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
