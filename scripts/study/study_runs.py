"""Many runs of the command line, a process each, and the numbers they leave. Used by the studies beside this file.

A job is a command that leaves a directory; it is done when that directory has the file that its command writes last.
What is done is not run again, what was cut goes on, so a study that was stopped is started again with the same words.
"""

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent
STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # two-sided, 1 to 9 degrees of freedom


@dataclasses.dataclass(frozen=True)
class Job:
    """`words` of a command; `leaves` is the file whose presence says that the command has ended well.

    after: names of jobs that must be done before. program: what python is started with.
    """

    name: str
    words: tuple[str, ...]
    leaves: Path
    after: tuple[str, ...] = ()
    program: tuple[str, ...] = ("-m", "rethinker_jax.main")


def options_of(description: str | None, seeds: int, runs: str) -> argparse.Namespace:
    """What the command line of a study says: seeds, processes, runs, output, collect_only."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path(runs))
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs" / "results")
    parser.add_argument("--collect-only", action="store_true")
    return parser.parse_args()


class Failed(Exception):
    """A job ended with another exit code than 0."""


def run_all(jobs: Sequence[Job], root: Path, processes: int) -> None:
    """Run what is not done, in the order given, at most one job a core. Raises Failed at the first one that fails.

    `root`/cpu_seconds.json says what each took, of all its starts together: of the process and of its workers.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that jobs do not outlive the study
    (root / "logs").mkdir(parents=True, exist_ok=True)
    spent_path = root / "cpu_seconds.json"
    spent: dict[str, float] = json.loads(spent_path.read_text()) if spent_path.is_file() else {}
    done = {job.name for job in jobs if job.leaves.is_file()}
    waiting = [job for job in jobs if job.name not in done]
    cores = sorted(os.sched_getaffinity(0))[:processes]
    free, running = list(cores), dict[int, tuple[Job, int]]()
    began_at = time.monotonic()
    try:
        while waiting or running:
            ready = next((job for job in waiting if set(job.after) <= done), None)
            if free and ready is not None:
                waiting.remove(ready)
                core = free.pop(0)
                running[_start(ready, root, core)] = ready, core
                continue
            process, status, usage = os.wait4(-1, 0)
            job, core = running.pop(process)
            free.append(core)
            spent[job.name] = round(spent.get(job.name, 0.0) + usage.ru_utime + usage.ru_stime, 1)
            spent_path.write_text(json.dumps(spent, indent=1) + "\n")
            code = os.waitstatus_to_exitcode(status)
            if code != 0 or not job.leaves.is_file():
                raise Failed(f"{job.name}: exit code {code}; see {root / 'logs' / _file_name(job)}.log")
            done.add(job.name)
            seconds = time.monotonic() - began_at
            print(f"{len(done)}/{len(jobs)} {job.name}: {spent[job.name]:.0f} CPU s, {seconds:.0f} s in", flush=True)
    finally:
        for process in running:
            os.kill(process, 15)
        for process in running:
            os.waitpid(process, 0)


def _start(job: Job, root: Path, core: int) -> int:
    """One process on one core: two of them on two cores do more than one on both."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    with (root / "logs" / f"{_file_name(job)}.log").open("ab") as log:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), sys.executable, *job.program, *job.words],
            env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=root,
        )  # fmt: skip
    return process.pid


def _file_name(job: Job) -> str:
    return job.name.replace("/", "_")


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean over seeds and the half-width of its 95% interval by Student's t; the half-width is NaN for one value."""
    half = float("nan")
    if len(values) > 1:
        half = STUDENT_95[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": statistics.fmean(values), "half": half}


def curve(runs: Sequence[Sequence[Mapping[str, Any]]], metric: str, width: int = 1) -> dict[str, list[Any]]:
    """A metric step by step: its mean over runs and half-widths of the 95% intervals, where every run has it.

    Of each run it is first averaged over `width` neighbouring steps, those in which it was measured.
    """
    values = [near(run, metric, width // 2) for run in runs]
    steps = [step for step in values[0] if all(step in one for one in values)]
    found = [interval([one[step] for one in values]) for step in steps]
    return {"step": steps, "mean": [one["mean"] for one in found], "half": [one["half"] for one in found]}


def near(run: Sequence[Mapping[str, Any]], metric: str, reach: int) -> dict[int, float]:
    """Step → mean of the metric from `reach` steps before to as many behind; no step without any."""
    known = {row["step"]: row[metric] for row in run if row.get(metric) is not None}
    around = {row["step"]: range(row["step"] - reach, row["step"] + reach + 1) for row in run}
    found = {step: [known[one] for one in places if one in known] for step, places in around.items()}
    return {step: statistics.fmean(some) for step, some in found.items() if some}


def provenance(root: Path, command: Sequence[str]) -> dict[str, Any]:
    """What a reader needs to run it again, and what it cost."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    spent = json.loads((root / "cpu_seconds.json").read_text())
    return {
        "commit": commit.stdout.strip() + (" with changes" if dirty.stdout.strip() else ""),
        "command": " ".join(command),
        "cpu_minutes": round(sum(spent.values()) / 60, 1),
        "longest_job_cpu_s": max(spent.values()),
        "num_jobs": len(spent),
    }
