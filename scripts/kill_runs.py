"""Kills a small RL run again and again, and compares what it leaves with what an uninterrupted one leaves, bit for bit.

    python scripts/kill_runs.py --runs 20 --seed 0 [--folder DIR] [--chosen]

The run has Selective Sample Replay, Forced Rethinking, validation, evaluation before and after, and a checkpoint every
step. It is made twice without interruption, then `--runs` times under SIGKILL: at moments drawn uniformly over the CPU
time that it takes, and started again by the same command until it ends. `--chosen` adds a run that is killed at each of
the places in CHOSEN in turn. Compared are weights, optimizer, replay buffer and counters of every checkpoint,
metrics.jsonl (what is no clock), rollouts/, evaluations/ and summary.json. Exit code 1 if anything differs.
"""

import argparse
import collections
import contextlib
import functools
import importlib
import json
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
STOPS_ITSELF = REPOSITORY / "tests" / "stops_itself.py"
if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))

from rethinker_jax.output_files import versions  # noqa: E402

CONFIG = """
base: package:example
run: {num_steps: 4, save_every: 1, rollouts_every: 1, keep_checkpoints: 2, keep_best: 1}
data: {train: train.parquet, test: test.parquet, validation: validation.parquet}
sampling: {max_new_tokens: 24}
rollout: {prompts_per_step: 2, samples_per_prompt: 4}
training: {batch_size: 4}
replay: {capacity: 16}
rethink: {fraction: 0.75}
evaluation: {num_problems: 4, num_sampled_problems: 2, samples_per_problem: 2, batch_size: 4, validate_every: 2}
"""
WORDS = ("train", "kills.yaml")
# Where a random kill hit: what the run was doing last. Inside the first three, nothing finer is said.
PHASES = {
    "evaluation": "rethinker_jax.loop:evaluate",
    "validation": "rethinker_jax.validation:measure",
    "loading": "rethinker_jax.loop:load_system",
    "prefill": "rethinker_jax.sampling.call:prefill",
    "decode": "rethinker_jax.sampling.call:Call.look",
    "verification": "rethinker_jax.rollout:Judging.result",
    "replay": "rethinker_jax.replay:select",
    "update": "rethinker_jax.training.update:Updater.step",
    "metrics": "rethinker_jax.metrics:MetricsLog.write",
    "rollouts": "rethinker_jax.run_directory:RunDirectory.write_rollouts",
    "checkpoint begun": "rethinker_jax.training.checkpoint:CheckpointStore.save",
    "restore": "rethinker_jax.training.checkpoint:CheckpointStore.restore",
    "report": "rethinker_jax.loop:write_report",
}
COARSE = ("evaluation", "validation", "loading")
STEP = "rethinker_jax.loop:train_step"
# (name, place, call) for tests/stops_itself.py, in the order in which one run comes by: each process redoes a step.
CHOSEN = (
    ("start, before there is a config", "rethinker_jax.config_file:save_config", 1),
    ("evaluation before", "rethinker_jax.evaluate:Judging.result", 1),
    ("prefill", f"{STEP}>rethinker_jax.sampling.call:prefill", 1),
    ("decode", f"{STEP}>rethinker_jax.sampling.call:Call.look", 1),
    ("a checkpoint's directory made", "os:mkdir@checkpoints/1.orbax-checkpoint-tmp/state", 1),
    ("a checkpoint's state written", "os:rename@state.orbax-checkpoint-tmp", 1),
    ("a checkpoint before its rename", "os:rename@checkpoints/1.orbax-checkpoint-tmp", 4),
    ("verification", f"{STEP}>rethinker_jax.rollout:Judging.result", 2),
    ("replay", "rethinker_jax.replay:select", 2),
    ("update", "rethinker_jax.training.update:Updater.step", 2),
    ("validation", "rethinker_jax.validation:measure", 1),
    ("rows trained on, before their rename", "os:replace@trained_000001", 1),
    ("metrics written, not yet a checkpoint", "rethinker_jax.run_directory:RunDirectory.write_rollouts", 1),
    ("metrics cut at the checkpoint", "os:replace@metrics.jsonl", 1),
    ("rollouts, before their rename", "os:replace@step_000002.jsonl", 1),
    ("an old checkpoint half deleted", "os:rmdir@checkpoints/1", 1),
    ("evaluation after", f"{STEP}>rethinker_jax.loop:evaluate", 1),
    ("summary, before its rename", "os:replace@summary.json", 1),
    ("report", "rethinker_jax.loop:write_report", 1),
)


def prepare(folder: Path) -> None:
    """Rows and kills.yaml."""
    from rethinker_jax.example.dataset import write_split

    for split, count in (("train", 12), ("test", 4), ("validation", 4)):
        write_split(folder / f"{split}.parquet", split, count)
    (folder / "kills.yaml").write_text(CONFIG)


def begin(script: Sequence[str | Path], run: Path, *more: str, **environment: str) -> subprocess.Popen[bytes]:
    """Starts the run in the folder of `run`; what it prints is added to `run`.log."""
    words = [sys.executable, *map(str, script), *WORDS, f"run.dir={run.name}", *more]
    defaults = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(REPOSITORY),
        "JAX_COMPILATION_CACHE_DIR": str(run.parent / "xla"),
    }
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            words, cwd=run.parent, env=defaults | os.environ | environment, stdout=log, stderr=subprocess.STDOUT
        )


def finish(run: Path, *more: str, **environment: str) -> None:
    """Runs to the end; raises RuntimeError if it fails."""
    code = begin(["-m", "rethinker_jax.main"], run, *more, **environment).wait()
    if code:
        raise RuntimeError(f"{run}: exit code {code}:\n{run.with_suffix('.log').read_text()[-3000:]}")


def kill_at(run: Path, place: str, call: int) -> bool:
    """Runs until it kills itself at a place; False where it came to its end without."""
    code = begin([STOPS_ITSELF, place, str(call), "SIGKILL"], run).wait()
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{run}: exit code {code}:\n{run.with_suffix('.log').read_text()[-3000:]}")
    return code != 0


def kill_at_random(run: Path, rng: random.Random, seconds: float, most: int = 1000) -> list[str]:
    """Runs to the end, killed at moments uniform over `seconds` of CPU time of each process, so often at `most`.

    CPU time, as on a busy machine a process would otherwise never get beyond its start. Returns where each kill hit.
    """
    hits = []
    phase = run.with_suffix(".phase")
    while True:
        phase.write_bytes(b"")
        process = begin([__file__, "--inside", phase], run)
        moment = rng.uniform(0, seconds) if len(hits) < most else float("inf")
        while process.poll() is None and cpu_seconds(process.pid) < moment:
            time.sleep(0.02)
        process.kill()
        code = process.wait()
        if code == 0:
            return hits
        if code != -signal.SIGKILL:
            raise RuntimeError(f"{run}: exit code {code}:\n{run.with_suffix('.log').read_text()[-3000:]}")
        writing = any((run / "checkpoints").glob("*tmp*"))
        hits.append((phase.read_text().strip() or "start-up") + (", a checkpoint half written" if writing else ""))


def cpu_seconds(process: int) -> float:
    """What a child that was not waited for has used, all threads together; Linux alone says it."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_of_children() -> float:
    """Of those that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tell_phases(file: Path) -> None:
    """Keep the name of what this process does in a file; it outlives a SIGKILL."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT)
    stack = ["between"]

    def wrap(label: str, function: Any) -> Any:
        @functools.wraps(function)
        def wrapped(*values: Any, **options: Any) -> Any:
            stack.append(stack[-1] if stack[-1] in COARSE else label)
            os.pwrite(handle, stack[-1].ljust(32).encode(), 0)
            try:
                return function(*values, **options)
            finally:
                stack.pop()
                os.pwrite(handle, stack[-1].ljust(32).encode(), 0)

        return wrapped

    for label, place in PHASES.items():
        module, _, path = place.partition(":")
        *owners, name = path.split(".")
        owner = functools.reduce(lambda found, part: vars(found)[part], owners, importlib.import_module(module))
        setattr(owner, name, wrap(label, vars(owner)[name]))


def differences(ours: Path, theirs: Path) -> list[str]:
    """In what the run `ours` differs from `theirs`; nothing of what the clock says counts."""
    return [*_metrics_differ(ours, theirs), *_files_differ(ours, theirs), *_checkpoints_differ(ours, theirs)]


def _metrics_differ(ours: Path, theirs: Path) -> Iterator[str]:
    from rethinker_jax.step_metrics import CLOCKS

    pairs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (ours, theirs)]
    if [row["step"] for row in pairs[0]] != [row["step"] for row in pairs[1]]:
        yield f"metrics.jsonl: steps {[row['step'] for row in pairs[0]]}"
        return
    for one, other in zip(*pairs, strict=True):
        wrong = [key for key in one.keys() | other.keys() if key not in CLOCKS and one.get(key) != other.get(key)]
        yield from (f"metrics.jsonl step {one['step']}: {key}" for key in sorted(wrong))
    summaries = [json.loads((run / "summary.json").read_text()) for run in (ours, theirs)]
    for key in sorted(summaries[0].keys() | summaries[1].keys()):
        if key not in ("wall_s", "cpu_s", "commit") and summaries[0].get(key) != summaries[1].get(key):
            yield f"summary.json: {key}"


def _files_differ(ours: Path, theirs: Path) -> Iterator[str]:
    for folder in ("rollouts", "evaluations"):
        found = [
            {path.relative_to(run): path.read_bytes() for path in (run / folder).rglob("*") if path.is_file()}
            for run in (ours, theirs)
        ]
        names = found[0].keys() | found[1].keys()
        yield from (f"{name}" for name in sorted(names) if found[0].get(name) != found[1].get(name))


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())


def _checkpoints_differ(ours: Path, theirs: Path) -> Iterator[str]:
    """A kill between the last checkpoint and the deletion of an old one leaves that one; it is no difference."""
    import jax
    import numpy as np

    for step in steps_of(theirs):
        if step not in steps_of(ours):
            yield f"checkpoint {step} is missing"
            continue
        (one, meta), (other, other_meta) = checkpoint_of(ours, step), checkpoint_of(theirs, step)
        if meta != other_meta:
            wrong = [key for key in meta.keys() | other_meta.keys() if meta.get(key) != other_meta.get(key)]
            yield f"checkpoint {step}: {', '.join(sorted(wrong))}"
        leaves, others = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (one, other))
        for path in leaves.keys() | others.keys():
            if path not in leaves or path not in others or not np.array_equal(leaves[path], others[path]):
                yield f"checkpoint {step}: {jax.tree_util.keystr(path)}"
    if any((ours / "checkpoints").glob("*tmp*")):
        yield "checkpoints: a half-written one is left"


def checkpoint_of(run: Path, step: int) -> tuple[Any, dict[str, Any]]:
    """All arrays of a checkpoint (weights, optimizer, replay) as numpy, and its JSON without the clocks."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(
        state=ocp.args.StandardRestore(), arrays=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore()
    )
    with contextlib.closing(ocp.CheckpointManager((run / "checkpoints").resolve())) as manager:
        found: Any = manager.restore(step, args=args)
    meta = {key: value for key, value in found.meta.items() if key not in ("wall_s", "cpu_s", "manifest")}
    arrays = {key: value for key, value in found.meta["manifest"].items() if key in ("state", "arrays", "config")}
    return jax.tree.map(np.asarray, {"state": found.state, "arrays": found.arrays}), meta | arrays


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="a new one, in which the runs lie; kept")
    parser.add_argument("--chosen", action="store_true")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()) if options.folder is None else options.folder)
        folder = folder.resolve()
        if options.folder is not None:
            folder.mkdir(parents=True)
        prepare(folder)
        finish(folder / "straight")
        began = cpu_of_children()
        finish(folder / "again")  # with all programs compiled: this is how long a run takes
        seconds = cpu_of_children() - began
        wrong = {"again": differences(folder / "again", folder / "straight")}
        print(
            f"seed {options.seed}, {seconds:.1f} s of CPU uninterrupted, {platform.machine()}, {os.cpu_count()} cores"
        )
        print(json.dumps(versions()))
        phases: collections.Counter[str] = collections.Counter()
        for number in range(options.runs):
            name, rng = f"random{number}", random.Random(f"{options.seed} {number}")
            hits = kill_at_random(folder / name, rng, seconds)
            phases.update(hits)
            wrong[name] = differences(folder / name, folder / "straight")
            print(f"{name}: killed in {'; '.join(hits) or 'nothing'}: {wrong[name] or 'no difference'}", flush=True)
        if options.chosen:
            run = folder / "chosen"
            missed = [title for title, place, call in CHOSEN if not kill_at(run, place, call)]
            finish(run)
            wrong["chosen"] = differences(run, folder / "straight") + [f"never killed at: {title}" for title in missed]
            print(f"chosen: killed at {len(CHOSEN) - len(missed)} places: {wrong['chosen'] or 'no difference'}")
        print("\n".join(f"{count:4d} kills in {phase}" for phase, count in phases.most_common()))
        bad = [name for name, found in wrong.items() if found]
        print(f"{sum(phases.values())} random kills of {options.runs} runs; {len(bad)} runs differ {bad or ''}")
    return 1 if bad else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        from rethinker_jax.main import main as command

        tell_phases(Path(sys.argv[2]))
        sys.exit(command(sys.argv[3:]))
    sys.exit(main())
