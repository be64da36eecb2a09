"""scripts/study/pipeline.py: its arms, its traces, and how it counts."""

import importlib
import json
from collections.abc import Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest

from rethinker_jax.pipeline import dry_run
from rethinker_jax.pipeline.plan import plan
from rethinker_jax.pipeline.recipe import read_recipe

STUDY = Path(__file__).parent.parent / "scripts" / "study"
ARMS = ("iterations", "continue", "hard_only", "rl_only", "shortest", "raw", "truncated")


@pytest.fixture(scope="module")
def study() -> Generator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDY))  # its modules import each other
        yield importlib.import_module("pipeline")


@pytest.fixture(scope="module")
def root(study: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    study.write_inputs(root, 16, 40)
    return root


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_recipe_that_can_be_run(
    study: ModuleType, root: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Catches a stage that reads or starts from one that its arm has not."""
    monkeypatch.chdir(root)
    (job,) = [one for one in study.seed_jobs(root, 0) if one.name == f"{name}/0"]
    dry_run(Path(job.words[1]), job.words[2:], None)
    assert f"{job.leaves.parent.relative_to(root)}" in capsys.readouterr().out


def parents(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Stage → what it starts from."""
    monkeypatch.chdir(root)
    asked = read_recipe(Path(f"{name}.yaml"), ["sources.pool=pool.parquet"])
    return {one.stage.name: one.parent for one in plan(asked, None)}


def test_fine_tuning_restarts_from_the_base_and_rl_goes_on_from_it(root: Path, monkeypatch: pytest.MonkeyPatch):
    found = parents(root, "iterations", monkeypatch)
    for number, drawn_by in ((1, "base"), (2, "hard1"), (3, "hard2")):
        assert found[f"drawn{number}"] == drawn_by
        assert found[f"sft{number}"] == "base"
        assert (found[f"medium{number}"], found[f"hard{number}"]) == (f"sft{number}", f"medium{number}")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        # Iteration 3 must be drawn by the arm's own model, not by that of the recipe.
        (
            "continue",
            {"sft2_continue": "hard1", "drawn3_continue": "hard2_continue", "sft3_continue": "hard2_continue"},
        ),
        ("hard_only", {"hard1_hard_only": "sft1"}),
        ("rl_only", {"medium1_rl_only": "base", "hard1_rl_only": "medium1_rl_only"}),
        ("truncated", {"sft1_truncated": "base"}),
    ],
)
def test_arms_part_where_they_should(root: Path, name: str, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    found = parents(root, name, monkeypatch)
    assert {stage: found[stage] for stage in wanted} == wanted
    assert "medium1_hard_only" not in found


def test_hard_only_has_the_steps_of_both_stages(study: ModuleType):
    (arm,) = [one for one in study.ARMS if one.name == "hard_only"]
    assert study.recipe_of(arm)["stages"][-1]["set"] == {"run.num_steps": 30}  # 15 on medium and 15 on hard questions


CUTS = [
    # A first solution, doubted: the doubt goes, and the box of the first answer with it.
    ("1+2=4 \\boxed{4}\n\nWait, does it seem right?\n1+2=3 \\boxed{3}", "1+2=4 \\boxed{3}", ""),
    # A guess, doubted: no reasoning would be left.
    ("\\boxed{4}\n\nWait:\n1+2=3 \\boxed{3}", None, "empty"),
    ("1+2=3 \\boxed{3}", None, "unchanged"),
    ("1+2=3", None, "no_answer"),
]


@pytest.mark.parametrize(("text", "cut", "why"), CUTS)
def test_a_trace_is_cut_before_its_second_look(study: ModuleType, text: str, cut: str | None, why: str):
    assert study.cut_text(text) == (text if cut is None else cut, why)


def test_distilled_traces_are_right_and_truncated_ones_look_once(root: Path):
    """Catches captions among them, and a truncation that loses the final answer."""
    raw, cut = (pq.read_table(root / f"{name}.parquet").to_pylist() for name in ("raw", "truncated"))
    counts = json.loads((root / "truncated.json").read_text())
    assert len(raw) == 40 == sum(counts.values())
    assert len(cut) == counts["cut"] + counts["unchanged"]
    for row in raw + cut:
        assert row["completion"].endswith(f"\\boxed{{{row['answer']}}}")
    assert sum("Wait" in row["completion"] for row in raw) == counts["cut"] + counts["empty"]
    assert not any("Wait" in row["completion"] for row in cut)


# Two problems, two samples each: (source, text, verdict, tokens).
SAMPLES = (
    ("sum", "\\boxed{3}\n\nWait, wait:\n \\boxed{4}", "correct", 10),
    ("sum", "1+2=3 \\boxed{3}", "wrong", 6),
    ("count", "\\boxed{2}", "correct", 4),
    ("count", "no red no2 \\boxed{2}", "no_answer", 9),
)


def write_stage(stage: Path, greedy: float) -> None:
    (stage / "evaluations").mkdir(parents=True)
    scores = {"greedy": greedy, "pass@1": 0.5, "pass@8": 1.0}
    (stage / "summary.json").write_text(json.dumps({"before": scores | {"greedy": 0.1}, "after": scores}))
    groups = [
        {
            "problem": {"source": source},
            "samples": [
                {"segments": [{"text": text[:5]}, {"text": text[5:]}], "verdict": verdict, "num_tokens": tokens}
                for of, text, verdict, tokens in SAMPLES
                if of == source
            ],
        }
        for source in ("sum", "count")
    ]
    for when in ("before", "after"):
        (stage / "evaluations" / f"{when}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in groups))


def write_traces(stage: Path) -> None:
    stage.mkdir()
    rates = {"tallest": (0.4, "easy"), "count": (0.6, "medium"), "sum": (0.8, "hard")}
    sources = [{"source": name, "error_rate": rate, "label": label} for name, (rate, label) in rates.items()]
    report = {"difficulty": {"sources": sources}}
    (stage / "traces.parquet.report.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def results(study: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two seeds, of which all stages are alike but for the greedy accuracy of three."""
    root = tmp_path_factory.mktemp("runs")
    study.write_inputs(root, 4, 20)
    greedy = {"hard1": (0.9, 0.8), "hard1_hard_only": (0.7, 0.7), "sft1": (0.8, 0.9)}
    for seed in (0, 1):
        for name in study.evaluated():
            write_stage(root / f"seed{seed}" / name, greedy.get(name, (0.5, 0.5))[seed])
        for number in (1, 2, 3):
            write_traces(root / f"seed{seed}" / f"traces{number}")
            pq.write_table(pq.read_table(root / "raw.parquet"), root / f"seed{seed}/traces{number}/traces.parquet")
    (root / "cpu_seconds.json").write_text(json.dumps({"iterations/0": 60.0, "iterations/1": 120.0}))
    provenance = {"command": "run", "commit": "0" * 40, "cpu_minutes": 3.0}
    return study.collect(root, (0, 1)) | {"provenance": provenance}


def test_numbers_of_a_stage(results: dict[str, Any]):
    found = {metric: one["mean"] for metric, one in results["stages"]["medium2"].items()}
    wanted = {
        "greedy": 0.5,
        "pass@1": 0.5,
        "pass@8": 1.0,
        "pass@1 medium": 0.5,  # of count: one of two
        "pass@1 hard": 0.5,  # of sum
        "words": 2.75,  # (4 + 2 + 1 + 4) / 4
        "words incorrect": 3.0,  # (2 + 4) / 2: no answer is not right either
        "tokens": 7.25,  # (10 + 6 + 4 + 9) / 4
        "tokens incorrect": 7.5,  # (6 + 9) / 2
        "at once": 0.5,  # the first and the third begin with a box
        "keywords": 50.0,  # "wait" twice in four samples
        "keyword wait": 50.0,
        "keyword mistake": 0.0,
    }
    assert {metric: found[metric] for metric in wanted} == pytest.approx(wanted)


def test_the_base_is_what_was_measured_before_the_first_stage(results: dict[str, Any]):
    assert results["stages"]["base"]["greedy"]["values"] == [0.1, 0.1]


def test_differences_are_paired_by_seed(results: dict[str, Any]):
    found = {tuple(one["stages"]): one["greedy"] for one in results["comparisons"]}
    # 0.9 - 0.7 and 0.8 - 0.7: mean 0.15, standard deviation 0.0707, half-width 12.706 x 0.0707 / sqrt 2 = 0.6353.
    assert found["hard1", "hard1_hard_only"] == {
        "values": pytest.approx([0.2, 0.1]), "mean": pytest.approx(0.15), "half": pytest.approx(0.6353)
    }  # fmt: skip
    # 0.9 - 0.8 and 0.8 - 0.9: of means alone no seed would be lost.
    assert found["hard1", "sft1"]["values"] == pytest.approx([0.1, -0.1])


def test_tables_and_figures_leave_the_prose(results: dict[str, Any], study: ModuleType, tmp_path: Path):
    page = tmp_path / "pipeline.md"
    page.write_text((STUDY.parent.parent / "docs" / "results" / "pipeline.md").read_text())
    prose = [line for line in page.read_text().splitlines() if line.startswith(("- ", "#"))]
    for _ in range(2):  # the second time there are tables to replace
        study.write_tables(results, page)
        text = page.read_text()
        assert [line for line in text.splitlines() if line.startswith(("- ", "#"))] == prose
        assert text.count("| medium then hard − hard only | +15.0 ± 63.5 |") == 1
        assert "the three iterations of one seed took 1.5." in text  # minutes: (60 + 120) / 2 s
    study.draw_figures(results, tmp_path)
    figures = {name: (tmp_path / f"pipeline-{name}.svg").read_bytes() for name in ("accuracy", "lengths", "keywords")}
    study.draw_figures(results, tmp_path)
    assert {name: (tmp_path / f"pipeline-{name}.svg").read_bytes() for name in figures} == figures
