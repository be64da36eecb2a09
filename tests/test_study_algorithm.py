"""The algorithm study's numbers, from runs made up by hand; and that each of its commands can be read."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
from commands import REPOSITORY

from rethinker_jax.config_file import load_config

sys.path.insert(0, str(REPOSITORY / "scripts" / "study"))
runs, results, tables, algorithm = map(
    importlib.import_module, ("study_runs", "algorithm_results", "algorithm_tables", "algorithm")
)


def test_interval_is_students():
    """Values 1, 2, 3: mean 2, std 1, t(2) = 4.303, so half-width 4.303 / √3 = 2.484. Catches the normal 1.96 / √3."""
    found = runs.interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0 and found["half"] == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(runs.interval([1.0])["half"])


def test_a_curve_is_smoothed_over_what_was_measured():
    """Width 3 over 0, nothing, 6, 0: 0, (0+6)/2, (6+0)/2, (6+0)/2. Catches zeros for steps without a measurement."""
    run = [{"step": step, "x": value} for step, value in enumerate((0.0, None, 6.0, 0.0))]
    assert runs.near(run, "x", 1) == {0: 0.0, 1: 3.0, 2: 3.0, 3: 3.0}
    other = [{"step": step} | ({"x": 2.0} if step < 2 else {}) for step in range(4)]
    assert runs.curve([run, other], "x", 1)["step"] == [0]  # the only one that both measured
    assert runs.curve([run, other], "x", 3)["mean"] == [1.0, 2.5, 2.5]


def write_run(directory: Path, score: float, advantages: list[float]) -> None:
    """Twelve steps; from the eleventh on (the first ten are left out) `advantages` are trained on."""
    (directory / "rollouts").mkdir(parents=True)
    scores = dict.fromkeys(results.SCORES, score)
    summary = {
        "before": dict.fromkeys(results.SCORES, 0.25), "after": scores, "after_per_source": {"sum": score},
        "validation": {"best": {"reward": score}}, "cpu_s": 30.0, "commit": "abc",
    }  # fmt: skip
    (directory / "summary.json").write_text(json.dumps(summary))
    rows = [dict.fromkeys(results.CURVES, score / 2) | {"step": step} for step in range(12)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in range(12):
        trained = [{"update": step, "rows": [{"advantage": one} for one in (advantages if step >= 10 else [0.5])]}]
        (directory / "rollouts" / f"trained_{step:06d}.json").write_text(json.dumps(trained))
    (directory / "report.html").write_text("")


def test_arms_are_compared_seed_by_seed(tmp_path: Path):
    """Both arms differ between seeds by far more than from each other. Catches intervals that are not of the pairs."""
    for seed, base in enumerate((0.2, 0.5, 0.8)):
        write_run(tmp_path / "steep" / "grpo" / f"{seed}", base, [0.0])
        write_run(tmp_path / "steep" / "ssr" / f"{seed}", base + 0.1, [-0.875, 0.125, 0.125, 0.0])
    write_run(tmp_path / "steep" / "ssr" / "3", 0.9, [])  # the other arm has no fourth seed
    write_run(tmp_path / "steep" / "parent" / "0", 0.6, [])
    (tmp_path / "cpu_seconds.json").write_text(json.dumps({"steep/grpo/0": 60.0, "steep/ssr/0": 30.0}))
    found = results.collect(tmp_path, {"steep": ("grpo", "ssr"), "noise": ("grpo",)}, ["words"])
    assert found["provenance"]["cpu_minutes"] == 1.5 and found["provenance"]["runs_at"] == ["abc"]
    assert set(found["regimes"]) == {"steep"}
    entry = found["regimes"]["steep"]
    assert entry["seeds"] == 3 and entry["parent"]["pass@1"] == 0.6
    ssr = entry["arms"]["ssr"]
    assert ssr["difference"]["pass@1"] == pytest.approx({"mean": 0.1, "half": 0.0}, abs=1e-9)
    assert ssr["after"]["pass@1"]["mean"] == pytest.approx(0.6)
    assert ssr["advantages"]["-7"] == 0.25 and ssr["advantages"]["1"] == 0.5 and ssr["advantages"]["0"] == 0.25
    lines = list(tables.table(entry))
    assert "| 60.0 ± 74.5 (**+10.0 ± 0.0**)" in next(line for line in lines if line.startswith("| SSR"))
    assert [line.split(" | ")[2] for line in lines if line.startswith("| clean parent")] == ["60.0"]


def test_every_job_can_be_read(tmp_path: Path):
    """Catches a key that was renamed, and a job that would wait for none."""
    jobs = list(algorithm.jobs(tmp_path, 2))
    names = {job.name for job in jobs}
    assert len(names) == len(jobs) and all(set(job.after) <= names for job in jobs)
    training = [job for job in jobs if job.words[0] == "train"]
    for job in training:
        load_config(Path(job.words[1]), list(job.words[2:]))
    assert {f"{regime}/{arm}/1" for regime, arms in algorithm.REGIMES.items() for arm in arms} <= names
    assert set(algorithm.ARMS) <= set(tables.LABELS)


def test_tables_stand_between_their_markers(tmp_path: Path):
    """Catches prose that is lost, and a regime that the page does not show."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- provenance -->\nold\n<!-- end -->\nafter\n")
    tables.write(page, {"provenance": {"commit": "abc"}, "regimes": {}})
    assert page.read_text() == "before\n<!-- provenance -->\n- commit: `abc`\n<!-- end -->\nafter\n"
    with pytest.raises(SystemExit, match="noise"):
        tables.write(
            page,
            {"provenance": {}, "regimes": {"noise": {"seeds": 1, "compared_with": "grpo", "arms": {"grpo": _arm()}}}},
        )


def _arm() -> dict:
    score = {"mean": 0.5, "half": 0.1}
    columns = dict.fromkeys(tables.COLUMNS, score)
    return {"before": columns, "after": columns, "late": {"zero_advantage_share": score, "effective_share": score}}
