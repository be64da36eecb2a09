"""The numbers of the runs: means over seeds with 95% intervals, differences paired by seed, curves, histograms."""

import collections
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runs import curve, interval, provenance, read_metrics, smooth

SCORES = ("greedy", "pass@1", "pass@8", "rethink_ratio", "completion_length")
CURVES = ("zero_advantage_share", "effective_share", "validation_reward", "accuracy", "rethink_ratio", "entropy")
SECOND_LOOKS = ("forced_first_accuracy", "forced_final_accuracy", "wrong_to_right", "right_to_wrong")
SMOOTHED_OVER = 5  # steps: a step of eight groups is a small sample
LAST = 10  # steps that "late in training" means

Run = list[dict[str, Any]]


def collect(root: Path, regimes: Mapping[str, Sequence[str]], command: Sequence[str]) -> dict[str, Any]:
    """Everything tables and figures show, of the seeds that every arm of a regime has finished."""
    found: dict[str, Any] = {"provenance": provenance(root, command), "regimes": {}}
    for regime, arms in regimes.items():
        seeds = [seed for seed in range(100) if all(_is_done(root / regime / arm / f"{seed}") for arm in arms)]
        if not seeds:
            continue
        directories = {arm: [root / regime / arm / f"{seed}" for seed in seeds] for arm in arms}
        first = [_summary(directory) for directory in directories[arms[0]]]
        entry: dict[str, Any] = {"seeds": len(seeds), "compared_with": arms[0]}
        entry["arms"] = {arm: _arm(some, first) for arm, some in directories.items()}
        parent = root / regime / "parent" / "0"
        if _is_done(parent):
            entry["parent"] = {score: _summary(parent)["after"][score] for score in SCORES}
        found["regimes"][regime] = entry
    return found


def _is_done(directory: Path) -> bool:
    return (directory / "report.html").is_file()


def _summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


def _arm(directories: Sequence[Path], first: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    summaries = [_summary(directory) for directory in directories]
    runs = [read_metrics(directory) for directory in directories]
    scores = {score: [one["after"][score] for one in summaries] for score in SCORES}
    return {
        "before": {score: interval([one["before"][score] for one in summaries]) for score in SCORES},
        "after": {score: interval(values) | {"values": values} for score, values in scores.items()},
        "difference": {
            score: interval([value - one["after"][score] for value, one in zip(values, first, strict=True)])
            for score, values in scores.items()
        },
        "per_source": _per_source(summaries),
        "best_validation": interval([one["validation"]["best"]["reward"] for one in summaries]),
        "samples_drawn": interval([_samples_drawn(run) for run in runs]),
        "cpu_s": interval([one["cpu_s"] for one in summaries]),
        "late": {name: interval([_late(run, name) for run in runs]) for name in CURVES if name in runs[0][-1]},
        "curves": {name: _smoothed(runs, name) for name in (*CURVES, *SECOND_LOOKS) if _is_measured(runs, name)},
        "advantages": _histogram(directories),
        "zero_advantage_share_late": interval([_late(run, "zero_advantage_share") for run in runs]),
    }


def _per_source(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sources = summaries[0]["after_per_source"]
    return {source: interval([one["after_per_source"][source] for one in summaries]) for source in sources}


def _samples_drawn(run: Run) -> float:
    """Rollout batches, those of dynamic resampling included, in batches of a plain step."""
    return sum(1 + row.get("resample_rounds", 0) for row in run)


def _late(run: Run, name: str) -> float:
    return statistics.fmean(row[name] for row in run[-LAST:] if name in row)


def _is_measured(runs: Sequence[Run], name: str) -> bool:
    """In the same steps of every run: some steps have no second look that was forced."""
    steps = [[row["step"] for row in run if name in row] for run in runs]
    return bool(steps[0]) and all(one == steps[0] for one in steps)


def _smoothed(runs: Sequence[Run], name: str) -> dict[str, list[float]]:
    if name == "validation_reward":
        return curve(runs, name)
    even = []
    for run in runs:
        values = smooth([row[name] for row in run if name in row], SMOOTHED_OVER)
        steps = [row["step"] for row in run if name in row]
        even.append([{"step": step, name: value} for step, value in zip(steps, values, strict=True)])
    return curve(even, name)


def _histogram(directories: Sequence[Path]) -> dict[str, float]:
    """Shares of advantages, in eighths, among the rows of all optimizer steps but the first ten, over all seeds."""
    counts: collections.Counter[int] = collections.Counter()
    for directory in directories:
        for path in sorted((directory / "rollouts").glob("trained_*.json"))[LAST:]:
            for update in json.loads(path.read_text()):
                counts.update(round(8 * row["advantage"]) for row in update["rows"])
    total = counts.total()
    return {str(eighths): counts[eighths] / total for eighths in range(-8, 9)} if total else {}
