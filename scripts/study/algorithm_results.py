"""The numbers of the runs: means over seeds with 95% intervals, differences paired by seed, curves, histograms."""

import collections
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study_runs import curve, interval, provenance

from rethinker_jax.metrics import read_metrics

SCORES = ("greedy", "pass@1", "pass@8", "rethink_ratio", "completion_length")
CURVES = ("zero_advantage_share", "effective_share", "validation_reward", "accuracy", "rethink_ratio", "entropy")
SECOND_LOOKS = ("forced_first_accuracy", "forced_final_accuracy", "wrong_to_right", "right_to_wrong")
SMOOTHED_OVER = 5  # steps: a step of eight groups is a small sample
LAST = 10  # steps that "late in training" means

Run = list[dict[str, Any]]


def collect(root: Path, regimes: Mapping[str, Sequence[str]], command: Sequence[str]) -> dict[str, Any]:
    """Everything tables and figures show, of the seeds that every arm of a regime has finished."""
    found: dict[str, Any] = {"provenance": provenance(root, command), "regimes": {}}
    found["provenance"]["runs_at"] = sorted(
        {_summary(path.parent)["commit"] for path in root.glob("*/*/*/summary.json")}
    )
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
    runs = [read_metrics(directory / "metrics.jsonl") for directory in directories]
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
        "rollout_batches": interval([_rollout_batches(run) for run in runs]),
        "cpu_s": interval([one["cpu_s"] for one in summaries]),
        "late": {name: interval([_late(run, name) for run in runs]) for name in CURVES},
        "curves": {name: _curve(runs, name) for name in (*CURVES, *SECOND_LOOKS)},
        "advantages": _histogram(directories),
    }


def _per_source(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sources = summaries[0]["after_per_source"]
    return {source: interval([one["after_per_source"][source] for one in summaries]) for source in sources}


def _rollout_batches(run: Run) -> float:
    """How many were drawn: one a step, and more by dynamic resampling."""
    return sum(1 + row.get("resample_rounds", 0) for row in run)


def _late(run: Run, name: str) -> float:
    values = [row[name] for row in run[-LAST:] if row.get(name) is not None]
    return statistics.fmean(values) if values else float("nan")


def _curve(runs: Sequence[Run], name: str) -> dict[str, list[Any]]:
    return curve(runs, name, 1 if name == "validation_reward" else SMOOTHED_OVER)


def _histogram(directories: Sequence[Path]) -> dict[str, float]:
    """Shares of advantages, in eighths, among the rows of all optimizer steps but the first ten, over all seeds."""
    counts: collections.Counter[int] = collections.Counter()
    for directory in directories:
        for path in sorted((directory / "rollouts").glob("trained_*.json"))[LAST:]:
            for update in json.loads(path.read_text()):
                counts.update(round(8 * row["advantage"]) for row in update["rows"])
    total = counts.total()
    return {str(eighths): counts[eighths] / total for eighths in range(-8, 9)} if total else {}
